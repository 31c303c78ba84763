"""Matrix products over the pairs of a tile: operands in 16 bit or wider, sums never narrower than float32."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``x`` (B, D) through a map ``weight`` (C, D) with ``bias`` (C,) of the same dtype, to ``out`` (B, C)."""
    return torch.addmm(bias, x, weight.T, out=out)


def product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """``x @ y`` to ``out``, whose dtype may be wider than that of the operands."""
    if out.dtype == x.dtype:
        return torch.mm(x, y, out=out)
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=out.dtype, out=out)
    return torch.mm(x.to(out.dtype), y.to(out.dtype), out=out)


def accumulate(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add ``x @ y`` to ``total``, whose dtype may be wider than that of the operands."""
    if total.dtype == x.dtype:
        total.addmm_(x, y)
    elif x.is_cuda:
        total += torch.mm(x, y, out_dtype=total.dtype)
    else:
        total.addmm_(x.to(total.dtype), y.to(total.dtype))
