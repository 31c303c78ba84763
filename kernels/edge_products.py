"""The products of an edge layer (13) with the passes around them in their epilogues.

Each kernel here does the work of a product and of a pass of :mod:`gcng.kernels.edge_hidden` or
:mod:`gcng.kernels.edge_epilogue`, so that the product's result is not written and read again.
:func:`gcng.kernels.product_tiles.edge_products` says which of them run; elsewhere the product of the library and the
pass do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import gelu, round_to, store
from gcng.kernels.edge_mlp import meta_layer
from gcng.kernels.launch import CompilationCase, Schedule, input_precision, launch
from gcng.kernels.pair_tiles import (
    EPS,
    PER_TILE,
    TRITON_TYPES,
    Rectangle,
    blocks,
    is_exact,
    packed_place,
)
from gcng.kernels.product_tiles import ProductSchedule, available_products, finish_edges, multiply, own_tile


@triton.jit(**PER_TILE)
def edge_first_map_kernel(
    x_ptr,  # (R S, D)
    weight_ptr, bias_ptr,  # (H, D), (H,)
    h0_ptr,  # (R S, H) or None
    stash_ptr,  # (P, H) or None, receives h0
    out_ptr,  # (R S, H)
    stats_ptr,  # (2, blocks of H, R S) parts of sum h and sum h^2
    n, r0, c0, columns, pairs,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h0 = x W1^T + b1, h = gelu(h0), and the parts of the sums that its norm needs: (13).

    A program owns BLOCK_M pairs and BLOCK_N channels. Bytes for each pair: reads x for each block of channels, from
    the cache but once, writes h, and h0 where it is wanted.
    """
    block_m, block_n = own_tile(pairs, HIDDEN, BLOCK_M, BLOCK_N, GROUP)
    place = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    stored, within = place < pairs, (unit < HIDDEN)[None, :]
    last = tl.minimum(unit, HIDDEN - 1).to(tl.int64)
    row = tl.minimum(place, pairs - 1)
    h0 = multiply(x_ptr, row, weight_ptr, last, WIDTH, WIDTH, 1, BLOCK_K, PRECISION, TYPE)
    h0 += tl.load(bias_ptr + last).to(TYPE)[None, :]
    inside = stored[:, None] & within
    offsets = place[:, None] * HIDDEN + unit[None, :]
    if h0_ptr is not None:
        store(h0_ptr + offsets, h0, inside)
    if stash_ptr is not None:
        i = place // columns
        node, partner = r0 + i, c0 + place - i * columns
        target = stash_ptr + packed_place(node, partner, n)[:, None] * HIDDEN + unit[None, :]
        store(target, h0, inside & (partner >= node)[:, None])
    h = round_to(gelu(h0, EXACT), out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, h, mask=inside)
    wide = tl.where(within, h.to(TYPE), 0.0)
    across: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    first = block_n.to(tl.int64) * pairs + place
    tl.store(stats_ptr + first, tl.sum(wide, 1), mask=stored)
    tl.store(stats_ptr + across * tl.cast(pairs, tl.int64) + first, tl.sum(wide * wide, 1), mask=stored)


@triton.jit(**PER_TILE)
def hidden_statistics_kernel(
    stats_ptr,  # (2, blocks of H, R S)
    mean_ptr, rstd_ptr,  # (R S,)
    pairs, BLOCKS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of the hidden rows from the parts of their sums, in the order of the channels.

    A program owns BLOCK_M pairs; two numbers for each block of channels are read.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = place < pairs
    total = tl.zeros((BLOCK_M,), mean_ptr.dtype.element_ty)
    squares = tl.zeros((BLOCK_M,), mean_ptr.dtype.element_ty)
    for block in range(BLOCKS):
        part = tl.cast(block, tl.int64) * pairs + place
        total += tl.load(stats_ptr + part, mask=stored, other=0.0)
        squares += tl.load(stats_ptr + BLOCKS * tl.cast(pairs, tl.int64) + part, mask=stored, other=0.0)
    mean = total / HIDDEN
    variance = squares / HIDDEN - mean * mean
    tl.store(mean_ptr + place, mean, mask=stored)
    tl.store(rstd_ptr + place, tl.rsqrt(tl.where(variance < 0, 0.0, variance) + EPS), mask=stored)


@triton.jit(**PER_TILE)
def edge_second_map_kernel(
    hidden_ptr,  # (R S, H)
    folded_ptr,  # (D, H)
    x_ptr,  # (R S, D)
    mean_ptr, rstd_ptr,  # (R S,)
    row_sums_ptr, shift_ptr, ln_weight_ptr, ln_bias_ptr,  # (D,)
    w2_ptr, stash_ptr, out_ptr,  # (R S, D) or None, (P, D) or None, (R S, D) or (P, D) where PACKED
    n, r0, c0, columns, pairs,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product of the folded map and all that follows it in (13), for D <= BLOCK_N.

    A program owns BLOCK_M pairs, all channels. Bytes for each pair: reads h and x, writes the edge, and w2 where it
    is wanted.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = place < pairs
    channel = tl.arange(0, BLOCK_N)
    row, last = tl.minimum(place, pairs - 1), tl.minimum(channel, WIDTH - 1).to(tl.int64)
    y = multiply(hidden_ptr, row, folded_ptr, last, HIDDEN, HIDDEN, 1, BLOCK_K, PRECISION, TYPE)
    mean = tl.load(mean_ptr + place, mask=stored, other=0.0).to(TYPE)
    rstd = tl.load(rstd_ptr + place, mask=stored, other=0.0).to(TYPE)
    finish_edges(
        y, mean, rstd, x_ptr, row_sums_ptr, shift_ptr, ln_weight_ptr, ln_bias_ptr, w2_ptr, stash_ptr, out_ptr,
        place, stored, channel, n, r0, c0, columns, PACKED, EXACT, TYPE, WIDTH,
    )  # fmt: skip


def product_constants(
    schedule: ProductSchedule, stored: torch.dtype, dtype: torch.dtype, width: int
) -> dict[str, object]:
    return {
        "EXACT": is_exact(stored),
        "PRECISION": input_precision(stored),
        "TYPE": TRITON_TYPES[dtype],
        "WIDTH": width,
        "HIDDEN": 4 * width,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": schedule.block_k,
    }


def edge_first_map(
    x: Tensor,
    prepared: Any,
    h0: Tensor | None,
    out: Tensor,
    n: int,
    tile: Rectangle,
    stash: Tensor | None,
    schedule: ProductSchedule,
) -> tuple[Tensor, Tensor]:
    """gelu of the first map of x (R S, D) to ``out`` (R S, H); before its gelu to h0 (R S, H) and ``stash`` (P, H).

    prepared: the fields of ``Prepared`` of gcng/ops/pair_kernels.py. Returns mean and 1 / deviation of the rows of
    ``out``, (R S,). Memory: two numbers for each pair and block of channels.
    """
    r0, _, c0, c1 = tile
    pairs, width = x.shape
    dtype = prepared.shift.dtype
    across = blocks(4 * width, schedule.block_n)
    stats = prepared.shift.new_empty((2, across, pairs))
    mean, rstd = prepared.shift.new_empty((2, pairs)).unbind()
    launch(
        edge_first_map_kernel, (blocks(pairs, schedule.block_m) * across,),
        x, prepared.ff1_weight, prepared.ff1_bias, h0, stash, out, stats, n, r0, c0, c1 - c0, pairs,
        schedule=schedule, GROUP=schedule.group, **product_constants(schedule, x.dtype, dtype, width),
    )  # fmt: skip
    launch(
        hidden_statistics_kernel, (blocks(pairs, 128),), stats, mean, rstd, pairs,
        schedule=Schedule(), BLOCKS=across, HIDDEN=4 * width, BLOCK_M=128,
    )  # fmt: skip
    return mean, rstd


def edge_second_map(
    hidden: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    prepared: Any,
    n: int,
    tile: Rectangle,
    w2: Tensor | None,
    out: Tensor,
    packed: bool,
    stash: Tensor | None,
    schedule: ProductSchedule,
) -> None:
    """The folded map of ``hidden`` (R S, H) and :func:`gcng.kernels.edge_epilogue.edge_epilogue` in one kernel.

    w2: (R S, D), receives what the last gelu is taken of, or None. Widths up to the schedule's block_n.
    """
    r0, _, c0, c1 = tile
    (pairs, width), layer = x.shape, prepared.layer
    launch(
        edge_second_map_kernel, (blocks(pairs, schedule.block_m),),
        hidden, prepared.folded, x, mean, rstd, prepared.row_sums, prepared.shift, layer.ln_weight, layer.ln_bias,
        w2, stash, out, n, r0, c0, c1 - c0, pairs,
        schedule=schedule, PACKED=packed, **product_constants(schedule, x.dtype, mean.dtype, width),
    )  # fmt: skip


def compilation_cases() -> Iterator[CompilationCase]:
    """Every kernel at the width of the published models and at one whose rows a program owns."""
    n, tile = 2048, (64, 80, 64, 2048)
    pairs = 16 * 1984
    for dtype, width in ((torch.bfloat16, 512), (torch.float16, 192)):

        def call(dtype: torch.dtype = dtype, width: int = width) -> None:
            def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=kind, device="meta")

            layer, schedules = meta_layer(width, dtype), available_products(width, dtype, 90)
            x, h = empty(pairs, width), empty(pairs, 4 * width)
            kept = empty(n * (n + 1) // 2, 4 * width)
            if width > 256:
                edge_first_map(x, layer, h, h, n, tile, kept, schedules.first_map)
                return
            mean, rstd = (empty(pairs, kind=torch.float32) for _ in range(2))
            out, wide = empty(n * (n + 1) // 2, width), empty(pairs, width, kind=torch.float32)
            edge_second_map(h, x, mean, rstd, layer, n, tile, wide, x, False, None, schedules.second_map)
            edge_second_map(h, x, mean, rstd, layer, n, tile, None, out, True, out, schedules.second_map)

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width}", call)
