"""Definition of the linear classifier with cross-entropy, the inner part of (24)."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``x weight^T + bias``, -> scalar or (N,); all rows ignored gives 0.

    The loss of 16-bit inputs is float32; a target outside [0, C) that is not ``ignore_index`` gives NaN.
    """
    logits = torch.nn.functional.linear(x, weight, bias)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    target = target.long()
    ignored = target == ignore_index
    known = (target >= 0) & (target < weight.shape[0])
    chosen = wide.log_softmax(-1).gather(1, torch.where(known, target, 0)[:, None]).squeeze(1)
    losses = torch.where(known, -chosen, torch.nan)
    losses = torch.where(ignored, 0.0, losses)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (~ignored).sum().clamp(min=1)
