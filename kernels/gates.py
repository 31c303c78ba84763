"""Gates of a tile, (14) and (26), around their product: sigmoid, sums of gates, gradients; and the batch statistics.

The passes over edges in any order, which are not bound to a tile, take them as (B, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def gates_schedule(width: int) -> PairSchedule:
    """Of all kernels here; ``steps`` is for those that sum over pairs, whose parts it makes fewer."""
    return channel_schedule(width, steps=2)


@triton.jit(**PER_TILE)
def gates_kernel(
    logits_ptr,  # (R S, D), become the gates
    stash_ptr,  # (P, D) or None, receives the gates
    center_ptr,  # (D,), None without sums
    parts_ptr,  # (R, runs, D) sums of the rows
    column_parts_ptr,  # (S, chunks, D) sums of the columns, 0 unless mirrored
    squares_ptr,  # (chunks, runs, channel blocks) float64
    n, r0, c0, rows, columns, mirror, chunk,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gate = sigmoid(logit), and the sums of gate - center over the partners of a node, and of its square: (14), (26).

    A program owns BLOCK_J columns and BLOCK_D channels and walks down a chunk of rows: it leaves a part for each row
    and each column, and one number for the squares, a mirrored pair counting twice. Sums are of the gates before they
    are rounded. Bytes for each pair: reads a logit, writes a gate, above the diagonal twice.
    """
    run = tl.program_id(0).to(tl.int64)
    j = run * BLOCK_J + tl.arange(0, BLOCK_J)
    column, stored = c0 + j, j < columns
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    squares = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    start, end = own_rows(rows, chunk)
    for i in range(start, end):
        row, place = tl.cast(r0 + i, tl.int64), tl.cast(i, tl.int64) * columns + j
        gate = 1.0 / (1.0 + tl.exp(-load_rows(logits_ptr, place, channel, stored, WIDTH, TYPE)))
        store(logits_ptr + place[:, None] * WIDTH + channel[None, :], gate, inside)
        if stash_ptr is not None:
            target = stash_ptr + packed_place(row, column, n)[:, None] * WIDTH + channel[None, :]
            store(target, gate, inside & (column >= row)[:, None])
        if center_ptr is not None:
            center = load_node(center_ptr, 0, channel, WIDTH, TYPE)[None, :]
            centered = tl.where(inside, gate - center, 0.0)
            total += centered
            squares += centered * centered
            store_part(parts_ptr, centered, channel, WIDTH, tl.cast(i, tl.int64) * tl.num_programs(0) + run)
    if center_ptr is not None:
        mirrored = (j >= mirror)[:, None]
        store_column_parts(column_parts_ptr, j, stored, channel, tl.where(mirrored, total, 0.0), WIDTH)
        twice = tl.where(mirrored, 2.0 * squares, squares).to(tl.float64)
        place = (tl.program_id(2) * tl.num_programs(0) + run) * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares_ptr + place, tl.sum(tl.sum(twice, 1), 0))


@triton.jit(**PER_TILE)
def spread_gradient_kernel(
    gates_ptr,  # (R S, D)
    row_means_ptr,  # (N, D)
    scale_ptr,  # 0-dim
    out_ptr,  # (R S, D)
    r0, c0, columns, mirror,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale (gate - mean_r + [mirrored] (gate - mean_c)): gradient of (26), both orders of a pair.

    A program owns BLOCK_J columns of one row and BLOCK_D channels. Bytes for each pair: reads a gate, writes one
    gradient; means come from the cache.
    """
    i, first = own_columns(columns, BLOCK_J)
    j = first + tl.arange(0, BLOCK_J)
    column, place, stored = c0 + j, i * columns + j, j < columns
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gate = load_rows(gates_ptr, place, channel, stored, WIDTH, TYPE)
    mirrored = load_rows(row_means_ptr, column, channel, stored & (j >= mirror), WIDTH, TYPE)
    value = gate - load_node(row_means_ptr, r0 + i, channel, WIDTH, TYPE)[None, :]
    value += tl.where((j >= mirror)[:, None], gate - mirrored, 0.0)
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    value *= tl.load(scale_ptr).to(TYPE)
    store(out_ptr + place[:, None] * WIDTH + channel[None, :], value, inside)


@triton.jit(**PER_TILE)
def gate_logits_gradient_kernel(
    grad_ptr, gates_ptr, out_ptr,  # (B, D), out may be grad
    parts_ptr,  # (runs, D) of the gradient of the bias, or None
    rows,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad gate (1 - gate), and its sum over the STEPS runs of BLOCK_J rows, BLOCK_D channels, that a program owns.

    Bytes for each row: reads the gradient and the gate, writes one gradient.
    """
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_J + tl.arange(0, BLOCK_J)
        gate = load_rows(gates_ptr, row, channel, row < rows, WIDTH, TYPE)
        grad = load_rows(grad_ptr, row, channel, row < rows, WIDTH, TYPE) * gate * (1.0 - gate)
        inside = (row < rows)[:, None] & (channel < WIDTH)[None, :]
        store(out_ptr + row[:, None] * WIDTH + channel[None, :], grad, inside)
        total += grad
    if parts_ptr is not None:
        store_part(parts_ptr, total, channel, WIDTH, tl.program_id(0))


def gates(logits: Tensor, n: int, tile: Rectangle, stash: Tensor | None, spread: Any) -> None:
    """Sigmoid of ``logits`` (R S, D) in place; ``stash`` (P, D) receives the gates, ``spread`` their sums.

    spread: center (D,), row_sums (N, D) and squares, 0-dim float64, or None.
    """
    r0, r1, c0, c1 = tile
    rows, columns, width = r1 - r0, c1 - c0, logits.shape[-1]
    schedule = gates_schedule(width)
    runs, channel_runs = blocks(columns, schedule.block_j), blocks(width, schedule.block_d)
    chunk, chunks = row_chunks(rows, runs * channel_runs)
    center, row_sums, squares = (None, None, None) if spread is None else spread
    parts = column_parts = square_parts = None
    if spread is not None:
        parts = row_sums.new_empty((1, rows, runs, width))
        column_parts = row_sums.new_empty((1, columns, chunks, width))
        square_parts = squares.new_empty((1, 1, chunks * runs * channel_runs, 1))
    launch(
        gates_kernel, (runs, channel_runs, chunks),
        logits, stash, center, parts, column_parts, square_parts, n, r0, c0, rows, columns, max(r1 - c0, 0), chunk,
        schedule=schedule, TYPE=TRITON_TYPES[wide_dtype(logits)], WIDTH=width,
        BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
    if spread is not None:
        add_parts(parts, [row_sums[r0:r1]])
        add_parts(column_parts, [row_sums[c0:c1]])
        add_parts(square_parts, [squares])


def spread_gradient(gate: Tensor, row_means: Tensor, scale: Tensor, tile: Rectangle, out: Tensor) -> None:
    """Gradient of (26) to ``out`` (R S, D). gate: (R S, D). row_means: (N, D). scale: 0-dim."""
    r0, r1, c0, c1 = tile
    columns, width = c1 - c0, out.shape[-1]
    schedule = gates_schedule(width)
    launch(
        spread_gradient_kernel, ((r1 - r0) * blocks(columns, schedule.block_j), blocks(width, schedule.block_d)),
        gate, row_means, scale, out, r0, c0, columns, max(r1 - c0, 0),
        schedule=schedule, TYPE=TRITON_TYPES[row_means.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip


def gate_logits_gradient(grad: Tensor, gate: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """Gradient of the logits to ``out`` (B, D), which may be ``grad``, from that of the gates; its sum to ``bias``."""
    rows, width = out.shape
    schedule = gates_schedule(width)
    programs = blocks(rows, schedule.block_j * schedule.steps)
    parts = None if bias is None else bias.new_empty((1, 1, programs, width))
    launch(
        gate_logits_gradient_kernel, (programs, blocks(width, schedule.block_d)), grad, gate, out, parts, rows,
        schedule=schedule, TYPE=TRITON_TYPES[grad.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d, STEPS=schedule.steps,
    )  # fmt: skip
    if bias is not None:
        add_parts(parts, [bias])


def compilation_cases() -> Iterator[CompilationCase]:
    """Every kernel in float32 and in both 16-bit types."""
    n, width, tile = 2048, 512, (64, 80, 64, 2048)
    pairs, total = 16 * 1984, n * (n + 1) // 2
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def call(dtype: torch.dtype = dtype) -> None:
            logits, kept = (torch.empty(rows, width, dtype=dtype, device="meta") for rows in (pairs, total))
            sums, center, wide = (torch.empty(*shape, width, device="meta") for shape in ((n,), (), (pairs,)))
            squares = torch.empty((), dtype=torch.float64, device="meta")
            gates(logits, n, tile, kept, (center, sums, squares))
            if dtype == torch.float16:
                return
            gates(logits, n, tile, None, None)
            spread_gradient(logits, sums, torch.empty((), device="meta"), tile, wide)
            gate_logits_gradient(wide, logits, logits, center)

        yield CompilationCase(str(dtype).removeprefix("torch."), call)
