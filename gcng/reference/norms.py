"""Definition of norms and of the dtype of losses, so that 16-bit tensors neither overflow nor underflow inside."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that losses have: float32 for 16-bit tensors, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def row_norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Euclidean norm over the last axis in the dtype of ``x``, (..., D) -> (...) or (..., 1).

    Squares and the quotients of the backward are not 16 bits wide: 300² is more than float16 holds.
    """
    return torch.linalg.vector_norm(wide(x), dim=-1, keepdim=keepdim).to(x.dtype)
