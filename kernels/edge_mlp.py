"""Both maps of an edge layer (13) in one kernel, for up to 256 channels: the hidden layer never leaves the chip."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import dot, gelu, round_to
from gcng.kernels.launch import CompilationCase, input_precision, launch
from gcng.kernels.pair_tiles import EPS, PER_TILE, TRITON_TYPES, Rectangle, blocks, is_exact
from gcng.kernels.product_tiles import ProductSchedule, available_products, finish_edges


@triton.jit(**PER_TILE)
def edge_mlp_kernel(
    x_ptr,  # (R S, D)
    weight_ptr, bias_ptr,  # (H, D), (H,)
    folded_ptr,  # (D, H)
    row_sums_ptr, shift_ptr, ln_weight_ptr, ln_bias_ptr,  # (D,)
    out_ptr,  # (R S, D), or (P, D) where PACKED
    n, r0, c0, columns, pairs,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """e = LN(gelu(s (W2g h - m c1) + c2 + x)) with h = gelu(W1 x + b1), its mean m and s = 1 / deviation: (13).

    A program owns BLOCK_M pairs with all channels and walks through the hidden layer, BLOCK_N units at a time. Bytes
    for each pair: reads x, writes the edge; both maps are read from the cache for every BLOCK_M pairs.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = place < pairs
    channel = tl.arange(0, BLOCK_D)
    within = channel < WIDTH
    row = tl.minimum(place, pairs - 1)
    HIDDEN: tl.constexpr = 4 * WIDTH
    x = tl.load(x_ptr + row[:, None] * WIDTH + channel[None, :], mask=within[None, :], other=0.0)
    y = tl.zeros((BLOCK_M, BLOCK_D), TYPE)
    total = tl.zeros((BLOCK_M,), TYPE)
    squares = tl.zeros((BLOCK_M,), TYPE)
    for start in range(0, HIDDEN, BLOCK_N):
        unit = start + tl.arange(0, BLOCK_N)
        known = unit < HIDDEN
        first = tl.load(
            weight_ptr + unit[None, :] * WIDTH + channel[:, None], mask=known[None, :] & within[:, None], other=0.0
        )
        h = dot(x, first, tl.zeros((BLOCK_M, BLOCK_N), TYPE), PRECISION)
        h += tl.load(bias_ptr + unit, mask=known, other=0.0).to(TYPE)[None, :]
        # Beyond the hidden layer weights and bias are 0, and so is the gelu.
        h = round_to(gelu(h, EXACT), x_ptr.dtype.element_ty)
        wide = h.to(TYPE)
        total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)
        second = tl.load(
            folded_ptr + channel[None, :] * HIDDEN + unit[:, None], mask=within[None, :] & known[:, None], other=0.0
        )
        y = dot(h, second, y, PRECISION)
    mean = total / HIDDEN
    variance = squares / HIDDEN - mean * mean
    rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + EPS)
    finish_edges(
        y, mean, rstd, x_ptr, row_sums_ptr, shift_ptr, ln_weight_ptr, ln_bias_ptr, None, None, out_ptr,
        place, stored, channel, n, r0, c0, columns, PACKED, EXACT, TYPE, WIDTH,
    )  # fmt: skip


def edge_mlp(
    x: Tensor, prepared: Any, n: int, tile: Rectangle, out: Tensor, packed: bool, schedule: ProductSchedule
) -> None:
    """The edges of a tile from x (R S, D), to ``out``: (R S, D), or (P, D) where ``packed``.

    prepared: the fields of ``Prepared`` of gcng/ops/pair_kernels.py. Nothing is kept for a backward.
    """
    r0, _, c0, c1 = tile
    (pairs, width), layer, dtype = x.shape, prepared.layer, prepared.shift.dtype
    launch(
        edge_mlp_kernel, (blocks(pairs, schedule.block_m),),
        x, prepared.ff1_weight, prepared.ff1_bias, prepared.folded, prepared.row_sums, prepared.shift,
        layer.ln_weight, layer.ln_bias, out, n, r0, c0, c1 - c0, pairs,
        schedule=schedule, PACKED=packed, EXACT=is_exact(x.dtype), PRECISION=input_precision(x.dtype),
        TYPE=TRITON_TYPES[dtype], WIDTH=width, BLOCK_M=schedule.block_m, BLOCK_N=schedule.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip


def meta_layer(width: int, dtype: torch.dtype) -> SimpleNamespace:
    """The tensors of a layer without storage, for compilation."""

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    names = ("row_sums", "shift", "ln_weight", "ln_bias")
    layer = SimpleNamespace(**{name: empty(width) for name in names})
    layer.ff1_weight, layer.ff1_bias = empty(4 * width, width, kind=dtype), empty(4 * width, kind=dtype)
    layer.folded, layer.layer = empty(width, 4 * width, kind=dtype), layer
    return layer


def compilation_cases() -> Iterator[CompilationCase]:
    """Widths that fill a block and that do not, to a tile and to packed storage."""
    n, tile = 2048, (64, 80, 64, 2048)
    shapes = ((torch.bfloat16, 256, False), (torch.bfloat16, 128, True), (torch.float16, 192, False))
    for dtype, width, packed in shapes:

        def call(dtype: torch.dtype = dtype, width: int = width, packed: bool = packed) -> None:
            x, kept = (torch.empty(r, width, dtype=dtype, device="meta") for r in (16 * 1984, n * (n + 1) // 2))
            schedule = available_products(width, dtype, 90).mlp
            edge_mlp(x, meta_layer(width, dtype), n, tile, kept if packed else x, packed, schedule)

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width}{' packed' * packed}", call)
