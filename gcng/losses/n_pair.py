"""Plain N-pair loss (19) for any class counts."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from gcng import reference
from gcng.mode import in_reference_mode
from gcng.ops.class_cross_entropy import linear_cross_entropy
from gcng.ops.layout import ClassMajor, class_boundaries
from gcng.ops.transfers import kept_on_device, sent
from gcng.ops.validation import autocasts


def n_pair(z: Tensor, layout: ClassMajor, *, l2_reg: float) -> Tensor:
    """(19) on class-major embeddings (N, D); logits between two groups of samples are never stored."""
    if in_reference_mode():
        return reference.losses.n_pair(z, layout.labels, l2_reg=l2_reg)
    boundaries = class_boundaries(layout.class_start)
    wide = z if z.dtype == torch.float64 else z.float()
    groups = []
    # Logits are inner products of vectors of any length: with 16-bit operands their rounding would be that of the loss.
    with torch.autocast(z.device.type, enabled=False) if autocasts(z.device) else contextlib.nullcontext():
        for k, anchor in enumerate(_group_anchors(tuple(boundaries), z.device), start=1):
            target = torch.arange(anchor.shape[0], device=z.device)
            groups.append(linear_cross_entropy(wide[anchor], wide[anchor + k], target))
    penalty = 0.25 * l2_reg * wide.square().sum() / max(len(boundaries) - 1, 1)
    return torch.stack(groups).mean() + penalty if groups else penalty


@kept_on_device
def _group_anchors(boundaries: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """For k = 1, 2, ...: the first sample of every class that has more than k samples, on a device."""
    counts = [stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)]
    firsts = [
        [start for start, count in zip(boundaries, counts, strict=False) if count > k]
        for k in range(1, max(counts, default=0))
    ]
    with torch.inference_mode(False):  # an evaluation may be the first to ask, and a training saves these
        together = torch.tensor([start for first in firsts for start in first], dtype=torch.int64)
        return sent(together, device).split([len(first) for first in firsts]) if firsts else ()
