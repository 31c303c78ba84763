"""The second map of an edge layer (13) with its epilogue, for rows too wide for a program.

Owns the form of :func:`gcng.kernels.edge_products.edge_second_map` in two kernels: one multiplies, finishes w2 for a
block of the channels and leaves mean and sum of squares around it of the gelus in its block; the other merges those of
a row in their order and normalizes. :func:`gcng.kernels.product_tiles.edge_products` says where it runs.
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
from gcng.kernels.edge_products import product_constants
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import (
    EPS,
    PER_TILE,
    TRITON_TYPES,
    PairSchedule,
    Rectangle,
    blocks,
    is_exact,
    load_node,
    load_rows,
    packed_place,
)
from gcng.kernels.product_tiles import ProductSchedule, available_products, finish_map, multiply, own_tile


def normalize_schedule(width: int) -> PairSchedule:
    """4 pairs by up to 1024 channels at a time. Not timed on a GPU."""
    return PairSchedule(4, 2, 4, min(1024, triton.next_power_of_2(width)))


@triton.jit(**PER_TILE)
def edge_wide_map_kernel(
    hidden_ptr,  # (R S, H)
    folded_ptr,  # (D, H)
    x_ptr,  # (R S, D)
    mean_ptr, rstd_ptr,  # (R S,)
    row_sums_ptr, shift_ptr,  # (D,)
    w2_ptr, stash_ptr,  # (R S, D), and (P, D) or None
    stats_ptr,  # (2, blocks of D, R S) means, and sums of squares around them
    n, r0, c0, columns, pairs,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """w2 = s (W2g h - m c1) + c2 + x, and of gelu(w2) what its norm needs: (13) up to the norm.

    A program owns BLOCK_M pairs and BLOCK_N channels. Statistics are of w2 as it is stored, around the mean of their
    block, so that nothing cancels in a row without spread. Bytes for each pair: reads h for each block of channels,
    from the cache but once, and x; writes w2.
    """
    block_m, block_n = own_tile(pairs, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    place = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    stored, within = place < pairs, (channel < WIDTH)[None, :]
    row, last = tl.minimum(place, pairs - 1), tl.minimum(channel, WIDTH - 1).to(tl.int64)
    y = multiply(hidden_ptr, row, folded_ptr, last, HIDDEN, HIDDEN, 1, BLOCK_K, PRECISION, TYPE)
    mean = tl.load(mean_ptr + place, mask=stored, other=0.0).to(TYPE)
    rstd = tl.load(rstd_ptr + place, mask=stored, other=0.0).to(TYPE)
    i = place // columns
    node, partner = r0 + i, c0 + place - i * columns
    y = finish_map(
        y, mean, rstd, x_ptr, row_sums_ptr, shift_ptr, w2_ptr, stash_ptr, place, stored, channel,
        packed_place(node, partner, n), stored & (partner >= node), TYPE, WIDTH,
    )  # fmt: skip
    activated = tl.where(within, gelu(round_to(y, w2_ptr.dtype.element_ty).to(TYPE), EXACT), 0.0)
    center = tl.sum(activated, 1) / tl.minimum(WIDTH - block_n * BLOCK_N, BLOCK_N).to(TYPE)
    centered = tl.where(within, activated - center[:, None], 0.0)
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    part = block_n.to(tl.int64) * pairs + place
    tl.store(stats_ptr + part, center, mask=stored)
    tl.store(stats_ptr + across * tl.cast(pairs, tl.int64) + part, tl.sum(centered * centered, 1), mask=stored)


@triton.jit(**PER_TILE)
def edge_wide_norm_kernel(
    w2_ptr,  # (R S, D)
    stats_ptr,  # (2, blocks of D, R S) of edge_wide_map_kernel
    ln_weight_ptr, ln_bias_ptr,  # (D,)
    out_ptr,  # (R S, D), or (P, D) where PACKED
    n, r0, c0, columns, pairs,
    PACKED: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LN(gelu(w2)), the end of (13); statistics of blocks of BLOCK_N channels are merged in their order.

    A program owns BLOCK_J pairs and walks through their channels. Bytes for each pair: reads w2, writes the edge.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    stored = place < pairs
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    mean = tl.zeros((BLOCK_J,), TYPE)
    squares = tl.zeros((BLOCK_J,), TYPE)
    for block in range(across):
        part = tl.cast(block, tl.int64) * pairs + place
        center = tl.load(stats_ptr + part, mask=stored, other=0.0)
        spread = tl.load(stats_ptr + across * tl.cast(pairs, tl.int64) + part, mask=stored, other=0.0)
        before = tl.cast(block * BLOCK_N, TYPE)
        size = tl.cast(tl.minimum(WIDTH - block * BLOCK_N, BLOCK_N), TYPE)
        share = size / (before + size)
        squares += spread + (center - mean) * (center - mean) * (before * share)
        mean += (center - mean) * share
    rstd = tl.rsqrt(squares / WIDTH + EPS)
    i = place // columns
    row, column = r0 + i, c0 + place - i * columns
    target, wanted = place, stored
    if PACKED:
        target, wanted = packed_place(row, column, n), stored & (column >= row)
    for start in range(0, WIDTH, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        activated = gelu(load_rows(w2_ptr, place, channel, stored, WIDTH, TYPE), EXACT)
        value = (activated - mean[:, None]) * rstd[:, None] * load_node(ln_weight_ptr, 0, channel, WIDTH, TYPE)[None, :]
        value += load_node(ln_bias_ptr, 0, channel, WIDTH, TYPE)[None, :]
        inside = wanted[:, None] & (channel < WIDTH)[None, :]
        store(out_ptr + target[:, None] * WIDTH + channel[None, :], value, inside)


def edge_wide_second_map(
    hidden: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    prepared: Any,
    n: int,
    tile: Rectangle,
    w2: Tensor,
    out: Tensor,
    packed: bool,
    stash: Tensor | None,
    schedule: ProductSchedule,
) -> None:
    """As :func:`gcng.kernels.edge_products.edge_second_map`, for any width; ``w2`` (R S, D) is always written.

    Memory: two numbers for each pair and block of channels.
    """
    r0, _, c0, c1 = tile
    (pairs, width), layer, dtype = x.shape, prepared.layer, mean.dtype
    across, whole = blocks(width, schedule.block_n), normalize_schedule(width)
    stats = mean.new_empty((2, across, pairs))
    launch(
        edge_wide_map_kernel, (blocks(pairs, schedule.block_m) * across,),
        hidden, prepared.folded, x, mean, rstd, prepared.row_sums, prepared.shift, w2, stash, stats,
        n, r0, c0, c1 - c0, pairs,
        schedule=schedule, GROUP=schedule.group, **product_constants(schedule, x.dtype, dtype, width),
    )  # fmt: skip
    launch(
        edge_wide_norm_kernel, (blocks(pairs, whole.block_j),),
        w2, stats, layer.ln_weight, layer.ln_bias, out, n, r0, c0, c1 - c0, pairs,
        schedule=whole, PACKED=packed, EXACT=is_exact(x.dtype), TYPE=TRITON_TYPES[dtype], WIDTH=width,
        BLOCK_N=schedule.block_n, BLOCK_J=whole.block_j, BLOCK_D=whole.block_d,
    )  # fmt: skip


def compilation_cases() -> Iterator[CompilationCase]:
    """Widths that fill their blocks and that do not, w2 wide and as an operand, to a tile and to packed storage."""
    n, tile = 2048, (64, 80, 64, 2048)
    shapes = ((torch.bfloat16, 512, False), (torch.float16, 384, True), (torch.bfloat16, 1000, False))
    for dtype, width, packed in shapes:

        def call(dtype: torch.dtype = dtype, width: int = width, packed: bool = packed) -> None:
            def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=kind, device="meta")

            x, kept = empty(16 * 1984, width), empty(n * (n + 1) // 2, width)
            mean, rstd = (empty(len(x), kind=torch.float32) for _ in range(2))
            w2 = empty(len(x), width) if packed else empty(len(x), width, kind=torch.float32)
            edge_wide_second_map(
                empty(len(x), 4 * width), x, mean, rstd, meta_layer(width, dtype), n, tile, w2, kept if packed else x,
                packed, kept if packed else None, available_products(width, dtype, 90).second_map,
            )  # fmt: skip

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width}{' packed' * packed}", call)
