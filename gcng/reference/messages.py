"""Definition of (7): what the edges of a node tell it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def messages(e: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(7), the sum: ``Σ_b gelu(e[a, b] Wᵀ + bias)`` over all N column endpoints, (N, N, D) -> (N, D)."""
    return F.gelu(F.linear(e, weight, bias)).sum(1)
