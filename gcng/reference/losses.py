"""Definition of the losses (19)-(27) on dense tensors, for any class counts (docs/maths.md 6, 7 and 9b).

Losses of 16-bit tensors are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gcng.reference.layout import ClassLayout, class_layout
from gcng.reference.norms import wide


def _zero(*tensors: Tensor) -> Tensor:
    """A zero that is attached to the graph: gradients are 0 and not missing."""
    return sum((0 * torch.nan_to_num(x).sum() for x in tensors), torch.zeros((), device=tensors[0].device))


def n_pair(z: Tensor, labels: Tensor, *, l2_reg: float = 3e-3) -> Tensor:
    """(19): cross-entropy of rank-0 samples against the rank-k samples of the classes that have one."""
    z, layout = wide(z), class_layout(labels)
    counts = [len(members) for members in layout.members]
    groups = []
    for k in range(1, max(counts, default=0)):
        held = [members for members in layout.members if len(members) > k]
        anchors = z[torch.stack([members[0] for members in held])]
        candidates = z[torch.stack([members[k] for members in held])]
        target = torch.arange(len(held), device=z.device)
        groups.append(F.cross_entropy(anchors @ candidates.T, target))
    penalty = 0.25 * l2_reg * z.square().sum() / max(len(counts), 1)
    return torch.stack(groups).mean() + penalty if groups else penalty


def has_negatives(layout: ClassLayout) -> bool:
    """Whether any anchor has a negative: at least two classes, one of them with two samples."""
    return len(layout.members) > 1 and bool(layout.is_anchor.any())


def synthetic_n_pair(z: Tensor, labels: Tensor, syn: Tensor, *, l2_reg: float = 3e-3) -> Tensor:
    """(20): cross-entropy of each anchor over the classes, the positive in its own column; not yet weighted."""
    z, syn, layout = wide(z), wide(syn), class_layout(labels)
    if not has_negatives(layout):
        return _zero(z, syn)
    rows = layout.is_anchor.nonzero()[:, 0]
    own = F.one_hot(layout.class_index[rows], len(layout.members)).bool()
    candidates = torch.where(own[..., None], z[layout.positive[rows]][:, None], syn[rows])
    logits = (z[rows][:, None] * candidates).sum(-1)
    penalty = z[rows].square().sum(-1).mean() + candidates.square().sum(-1).mean()
    return F.cross_entropy(logits, layout.class_index[rows]) + 0.25 * l2_reg * penalty


def class_cross_entropy(
    labels: Tensor, syn: Tensor, weight: Tensor, bias: Tensor | None, *, softmax_factor: float = 20.0
) -> Tensor:
    """(24): classifier cross-entropy of every synthetic negative against the label of the class it comes from."""
    syn, weight, layout = wide(syn), wide(weight), class_layout(labels)
    bias = None if bias is None else wide(bias)
    if not has_negatives(layout):
        return _zero(syn, weight)
    rows = syn[layout.is_anchor]
    target = layout.class_labels.expand(rows.shape[0], -1)
    return softmax_factor * F.cross_entropy(F.linear(rows, weight, bias).flatten(0, 1), target.flatten())


def similarity(z: Tensor, labels: Tensor, syn: Tensor, *, official_mask: bool = False) -> Tensor:
    """(25): mean cosine distance between anchors and synthetic negatives, own-class entries counted as 0.

    ``official_mask`` drops the entry ``floor(n / K)`` of sample-major slot ``n = k M + i`` instead of the own
    class, as the authors' code does (docs/maths.md S1); it needs M classes of K samples.
    """
    z, syn, layout = wide(z), wide(syn), class_layout(labels)
    if not has_negatives(layout):
        return _zero(z, syn)
    rows = layout.is_anchor.nonzero()[:, 0]
    num_classes = len(layout.members)
    own = layout.class_index[rows]
    if official_mask:
        own = (layout.rank[rows] * num_classes + own) // len(layout.members[0])
    distance = 1 - F.cosine_similarity(z[rows][:, None], syn[rows], dim=-1)
    kept = ~F.one_hot(own, num_classes).bool()
    return torch.where(kept, distance, torch.zeros_like(distance)).mean()


def diversity(gate: Tensor) -> Tensor:
    """(26): 0.01 (1 - spread of the gates around their row means); a spread of exactly 0 has gradient 0."""
    gate = wide(gate)
    centered = gate - gate.mean(1, keepdim=True)
    squared = centered.square().sum() / max(gate.shape[0], 1) ** 2
    flat = squared.detach() == 0
    spread = torch.where(flat, torch.zeros_like(squared), torch.where(flat, torch.ones_like(squared), squared).sqrt())
    return 0.01 * (1 - spread)
