"""Definition of (14): batch statistics, the channel gates of all pairs, the node predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch statistics over all leading axes, biased variance, eps 1e-5, gain only.

    Returns:
        The normalized tensor, the mean (D,) and the variance (D,).
    """
    axes = tuple(range(x.dim() - 1))
    mean = x.mean(axes)
    var = (x - mean).square().mean(axes)
    return (x - mean) / torch.sqrt(var + 1e-5) * weight, mean, var


def gates(e: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(14): ``sigmoid(Wg BN(e) + bg)``, (N, N, D) -> (N, N, D), statistics over all N² ordered pairs."""
    return torch.sigmoid(F.linear(batch_norm(e, norm_weight)[0], weight, bias))
