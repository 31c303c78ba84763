"""Edges of a tile as products of nodes, packed storage of tiles, and the gradients of both.

Owns every move between a tile (R S, C) and packed storage (P, C), P = N (N + 1) / 2, upper triangle row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import store
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import (
    PER_TILE,
    TRITON_TYPES,
    PairSchedule,
    Rectangle,
    add_parts,
    blocks,
    channel_schedule,
    load_edges,
    load_node,
    load_rows,
    own_columns,
    own_rows,
    packed_place,
    row_chunks,
    store_column_parts,
    store_part,
    wide_dtype,
)


def storage_schedule(width: int) -> PairSchedule:
    """Of all kernels here."""
    return channel_schedule(width)


@triton.jit(**PER_TILE)
def tile_edges_kernel(
    source_ptr,  # (N, C) or (P, C), see KIND
    out_ptr,  # (R S, C)
    n, r0, c0, columns,
    KIND: tl.constexpr, SYMMETRIC: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of products u_r u_c (2), or of packed storage: mirrored below the diagonal, or 0 unless SYMMETRIC.

    A program owns BLOCK_J columns of one row and BLOCK_D channels. Bytes: reads (nodes: from the cache) and writes
    the tile once.
    """
    i, first = own_columns(columns, BLOCK_J)
    j = first + tl.arange(0, BLOCK_J)
    row, column, place, stored = r0 + i, c0 + j, i * columns + j, j < columns
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    present = stored if SYMMETRIC else stored & (column >= row)
    value = load_edges(source_ptr, row, column, place, channel, present, n, KIND, WIDTH, TYPE)
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    store(out_ptr + place[:, None] * WIDTH + channel[None, :], value, inside)


@triton.jit(**PER_TILE)
def store_tile_kernel(
    values_ptr,  # (R S, C)
    packed_ptr,  # (P, C)
    n, r0, c0, columns, mirror,
    ADD: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The pairs on and above the diagonal of a tile to packed storage; ADD: added to it, both orders of a pair.

    A program owns BLOCK_J columns of one row and BLOCK_D channels of packed storage: in the square of the rows it
    reads the mirrored pair of the tile too. Bytes: reads the tile once, writes (ADD: and reads) half a square less.
    """
    i, first = own_columns(columns, BLOCK_J)
    j = first + tl.arange(0, BLOCK_J)
    row, column, stored = r0 + i, c0 + j, j < columns
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    upper = stored & (column >= row)
    value = load_rows(values_ptr, i * columns + j, channel, upper, WIDTH, TYPE)
    target = packed_ptr + packed_place(row, column, n)[:, None] * WIDTH + channel[None, :]
    inside = upper[:, None] & (channel < WIDTH)[None, :]
    if ADD:
        # Columns below mirror are the rows of the tile: (j, i) lies below the diagonal.
        twice = upper & (column > row) & (j < mirror)
        value += load_rows(values_ptr, j * columns + i, channel, twice, WIDTH, TYPE)
        value += tl.load(target, mask=inside, other=0.0).to(TYPE)
    store(target, value, inside)


@triton.jit(**PER_TILE)
def add_product_kernel(
    nodes_ptr,  # (N, D)
    grad_ptr,  # (R S, D) of the products
    parts_ptr,  # (R, runs, D) sums of the rows
    column_parts_ptr,  # (S, chunks, D) sums of the columns
    r0, c0, rows, columns, chunk,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts of du_c = sum_r de u_r and of du_r = sum_c de u_c: the backward of (2).

    A program owns BLOCK_J columns and BLOCK_D channels and walks down a chunk of rows. Bytes for each pair: reads de.
    """
    run = tl.program_id(0).to(tl.int64)
    j = run * BLOCK_J + tl.arange(0, BLOCK_J)
    column, stored = c0 + j, j < columns
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = load_rows(nodes_ptr, column, channel, stored, WIDTH, TYPE)
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    start, end = own_rows(rows, chunk)
    for i in range(start, end):
        grad = load_rows(grad_ptr, tl.cast(i, tl.int64) * columns + j, channel, stored, WIDTH, TYPE)
        total += grad * load_node(nodes_ptr, r0 + i, channel, WIDTH, TYPE)[None, :]
        store_part(parts_ptr, grad * own, channel, WIDTH, tl.cast(i, tl.int64) * tl.num_programs(0) + run)
    store_column_parts(column_parts_ptr, j, stored, channel, total, WIDTH)


def tile_edges(source: Tensor, kind: str, n: int, tile: Rectangle, out: Tensor, symmetric: bool = True) -> None:
    """A tile to ``out`` (R S, C) from nodes (N, C), kind "product", or packed storage (P, C), kind "packed".

    Below the diagonal packed storage gives the mirrored values, or zeros where ``symmetric`` is False.
    """
    r0, r1, c0, c1 = tile
    columns, width = c1 - c0, out.shape[-1]
    schedule = storage_schedule(width)
    launch(
        tile_edges_kernel, ((r1 - r0) * blocks(columns, schedule.block_j), blocks(width, schedule.block_d)),
        source, out, n, r0, c0, columns,
        schedule=schedule, KIND=kind, SYMMETRIC=symmetric, TYPE=TRITON_TYPES[wide_dtype(source, out)],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip


def store_tile(packed: Tensor, n: int, tile: Rectangle, values: Tensor, add: bool = False) -> None:
    """Write a tile (R S, C) to packed storage (P, C), or ``add`` both orders of its pairs to it."""
    r0, r1, c0, c1 = tile
    columns, width = c1 - c0, values.shape[-1]
    schedule = storage_schedule(width)
    launch(
        store_tile_kernel, ((r1 - r0) * blocks(columns, schedule.block_j), blocks(width, schedule.block_d)),
        values, packed, n, r0, c0, columns, max(r1 - c0, 0),
        schedule=schedule, ADD=add, TYPE=TRITON_TYPES[wide_dtype(values, packed)],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip


def add_product(nodes: Tensor, tile: Rectangle, grad: Tensor, out: Tensor) -> None:
    """Add the gradient of ``nodes`` (N, D) to ``out`` (N, D), given that of their products, ``grad`` (R S, D)."""
    r0, r1, c0, c1 = tile
    rows, columns, width = r1 - r0, c1 - c0, out.shape[-1]
    schedule = storage_schedule(width)
    runs, channel_runs = blocks(columns, schedule.block_j), blocks(width, schedule.block_d)
    chunk, chunks = row_chunks(rows, runs * channel_runs)
    parts = out.new_empty((1, rows, runs, width))
    column_parts = out.new_empty((1, columns, chunks, width))
    launch(
        add_product_kernel, (runs, channel_runs, chunks),
        nodes, grad, parts, column_parts, r0, c0, rows, columns, chunk,
        schedule=schedule, TYPE=TRITON_TYPES[out.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
    add_parts(parts, [out[r0:r1]])
    add_parts(column_parts, [out[c0:c1]])


def compilation_cases() -> Iterator[CompilationCase]:
    """Every kernel in float32 and in both 16-bit types, at a width that is no power of two."""
    n, width, tile = 2048, 384, (64, 80, 64, 2048)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def call(dtype: torch.dtype = dtype) -> None:
            def empty(rows: int, kind: torch.dtype = dtype) -> Tensor:
                return torch.empty(rows, width, dtype=kind, device="meta")

            nodes, packed, values = empty(n), empty(n * (n + 1) // 2), empty(16 * 1984)
            wide = empty(16 * 1984, torch.float32)
            tile_edges(nodes, "product", n, tile, values)
            if dtype == torch.float16:
                return
            tile_edges(packed, "packed", n, tile, values)
            tile_edges(packed, "packed", n, tile, wide, symmetric=False)
            store_tile(packed, n, tile, values)
            store_tile(packed, n, tile, wide, add=True)
            add_product(nodes, tile, wide, empty(n, torch.float32))

        yield CompilationCase(str(dtype).removeprefix("torch."), call)
