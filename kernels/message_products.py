"""The messages (7) of the first layer with their product: neither the edges nor what is behind the map is stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import dot, gelu, round_to, store
from gcng.kernels.launch import CompilationCase, input_precision, launch
from gcng.kernels.pair_tiles import (
    PER_TILE,
    TRITON_TYPES,
    Rectangle,
    add_parts,
    blocks,
    is_exact,
    packed_place,
    store_part,
)
from gcng.kernels.product_tiles import ProductSchedule, available_products


@triton.jit(**PER_TILE)
def product_messages_kernel(
    nodes_ptr,  # (N, D)
    weight_ptr, bias_ptr,  # (C, D), (C,)
    stash_ptr,  # (P, C) or None, receives what the gelu is taken of
    out_ptr,  # (N, C) running sum
    parts_ptr,  # (R, runs, C) sums of the rows
    n, r0, c0, rows, columns, mirror,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gelu(W (u_r u_c) + b) summed over partners: (2), (7) for edges that are products of nodes.

    A program owns BLOCK_M columns and BLOCK_N channels and walks down the rows: it makes each block of edges in
    registers, rounded once as a stored edge would be, adds the sums of its mirrored columns, and leaves a part for
    each row. Bytes for each pair: none but the stash above the diagonal; nodes and map come from the cache.
    """
    run = tl.program_id(0).to(tl.int64)
    j = run * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = j < columns
    column = c0 + tl.minimum(j, columns - 1)
    unit = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.minimum(unit, CHANNELS - 1).to(tl.int64)
    inside = stored[:, None] & (unit < CHANNELS)[None, :]
    inner = tl.arange(0, BLOCK_K)
    bias = tl.load(bias_ptr + last).to(TYPE)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), TYPE)
    for i in range(rows):
        row = tl.cast(r0 + i, tl.int64)
        before = tl.zeros((BLOCK_M, BLOCK_N), TYPE)
        for start in range(0, WIDTH, BLOCK_K):
            channel = start + inner
            within = channel < WIDTH
            own = tl.load(nodes_ptr + row * WIDTH + channel, mask=within, other=0.0).to(TYPE)
            others = tl.load(nodes_ptr + column[:, None] * WIDTH + channel[None, :], mask=within[None, :], other=0.0)
            edges = round_to(own[None, :] * others.to(TYPE), nodes_ptr.dtype.element_ty)
            weight = tl.load(weight_ptr + last[None, :] * WIDTH + channel[:, None], mask=within[:, None], other=0.0)
            before = dot(edges, weight, before, PRECISION)
        before += bias
        if stash_ptr is not None:
            target = stash_ptr + packed_place(row, c0 + j, n)[:, None] * CHANNELS + unit[None, :]
            store(target, before, inside & (c0 + j >= row)[:, None])
        message = tl.where(inside, gelu(before, EXACT), 0.0)
        total += message
        store_part(parts_ptr, message, unit, CHANNELS, tl.cast(i, tl.int64) * tl.num_programs(0) + run)
    target = out_ptr + column[:, None] * CHANNELS + unit[None, :]
    mirrored = inside & (j >= mirror)[:, None]
    tl.store(target, tl.load(target, mask=mirrored, other=0.0) + total, mask=mirrored)


def product_messages(
    nodes: Tensor,
    weight: Tensor,
    bias: Tensor,
    n: int,
    tile: Rectangle,
    out: Tensor,
    stash: Tensor | None,
    schedule: ProductSchedule,
) -> None:
    """Add the messages of a tile of products of ``nodes`` (N, D) to their receivers in ``out`` (N, C).

    weight: (C, D). bias: (C,). stash: (P, C) or None, receives what the gelu is taken of. Memory: C numbers for each
    row and run of columns.
    """
    r0, r1, c0, c1 = tile
    rows, columns, (channels, width) = r1 - r0, c1 - c0, weight.shape
    runs = blocks(columns, schedule.block_m)
    parts = out.new_empty((1, rows, runs, channels))
    launch(
        product_messages_kernel, (runs, blocks(channels, schedule.block_n)),
        nodes, weight, bias, stash, out, parts, n, r0, c0, rows, columns, max(r1 - c0, 0),
        schedule=schedule, EXACT=is_exact(nodes.dtype), PRECISION=input_precision(nodes.dtype),
        TYPE=TRITON_TYPES[out.dtype], WIDTH=width, CHANNELS=channels,
        BLOCK_M=schedule.block_m, BLOCK_N=schedule.block_n, BLOCK_K=schedule.block_k,
    )  # fmt: skip
    add_parts(parts, [out[r0:r1]])


def compilation_cases() -> Iterator[CompilationCase]:
    """Both 16-bit types, with and without a stash, at the width of the published models and below."""
    n, tile = 2048, (64, 80, 64, 2048)
    for dtype, width, kept in ((torch.bfloat16, 512, True), (torch.float16, 384, False)):

        def call(dtype: torch.dtype = dtype, width: int = width, kept: bool = kept) -> None:
            nodes, weight = (torch.empty(rows, width, dtype=dtype, device="meta") for rows in (n, width))
            bias, sums = torch.empty(width, dtype=dtype, device="meta"), torch.empty(n, width, device="meta")
            stash = torch.empty(n * (n + 1) // 2, width, dtype=dtype, device="meta") if kept else None
            schedule = available_products(width, dtype, 90).messages
            product_messages(nodes, weight, bias, n, tile, sums, stash, schedule)

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width}", call)
