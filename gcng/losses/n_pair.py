"""Plain N-pair loss (19) for any class counts."""

from __future__ import annotations

import torch
from torch import Tensor

from gcng import reference
from gcng.mode import in_reference_mode
from gcng.ops.class_cross_entropy import linear_cross_entropy
from gcng.ops.layout import ClassMajor, class_boundaries


def n_pair(z: Tensor, layout: ClassMajor, *, l2_reg: float) -> Tensor:
    """(19) on class-major embeddings (N, D); logits between two groups of samples are never stored."""
    if in_reference_mode():
        return reference.losses.n_pair(z, layout.labels, l2_reg=l2_reg)
    boundaries = class_boundaries(layout.class_start)
    counts = [stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)]
    wide = z if z.dtype == torch.float64 else z.float()
    groups = []
    for k in range(1, max(counts, default=0)):
        first = [start for start, count in zip(boundaries, counts, strict=False) if count > k]
        anchor = torch.tensor(first, device=z.device)
        target = torch.arange(len(first), device=z.device)
        groups.append(linear_cross_entropy(wide[anchor], wide[anchor + k], target))
    penalty = 0.25 * l2_reg * wide.square().sum() / max(len(counts), 1)
    return torch.stack(groups).mean() + penalty if groups else penalty
