"""Matrix products over the pairs of a tile: operands in 16 bit or wider, sums never narrower than float32.

On the CPU there are two libraries to choose from: what ``torch.mm`` uses (MKL in the wheels for x86), and oneDNN, which
torch ships beside it and which is the faster of the two where the second operand is small and the result is not
(docs/kernels.md has the numbers). oneDNN brings the memory of its result along; the other one is told where to put it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Where the result goes if the library does not bring memory of its own.
Room = Callable[[], Tensor]

# Below the first it is not faster; oneDNN adds up a row in one go, MKL in blocks, so that sums longer than the second
# would lose digits against torch.mm.
_SHORTEST_SUM, _LONGEST_SUM = 256, 1024
# Multiplications below which choosing, and oneDNN's preparation of every new shape, cost more than they gain.
_FEWEST_PRODUCTS = 2**25


def linear(x: Tensor, weight: Tensor, bias: Tensor, room: Room) -> Tensor:
    """``x`` (B, D) through a map ``weight`` (C, D) with ``bias`` (C,), of one dtype: (B, C), perhaps in ``room``."""
    if _onednn_is_faster(x, weight.shape[0]):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.addmm(bias, x, weight.T, out=room())


def product(x: Tensor, y: Tensor, room: Room) -> Tensor:
    """``x @ y`` in the dtype of ``room``, which may be wider than that of the operands; perhaps in ``room``."""
    if _onednn_is_faster(x, y.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(x, y.T, None, "none", [], "")
    return product_to(x, y, room())


def product_to(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """``x @ y`` to ``out``, whose dtype may be wider than that of the operands; sums of any length."""
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


def _onednn_is_faster(x: Tensor, columns: int) -> bool:
    """Whether to take oneDNN for ``x`` (B, D) times (D, ``columns``); ``torch.backends.mkldnn.enabled`` is obeyed."""
    rows, length = x.shape
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and _SHORTEST_SUM <= length <= _LONGEST_SUM
        and rows * length * columns >= _FEWEST_PRODUCTS
        and torch.backends.mkldnn.enabled
        and _has_onednn()
    )


def _has_onednn() -> bool:
    # The op that torch.compile maps linear layers to: not documented, so its absence has to be bearable.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
