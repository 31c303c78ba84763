"""What the edges of a node tell it (7), behind the product: gelu, the sums over partners, and their backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import gelu, gelu_and_derivative, store
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import (
    PER_TILE,
    TRITON_TYPES,
    PairSchedule,
    Rectangle,
    add_parts,
    blocks,
    channel_schedule,
    is_exact,
    load_node,
    load_rows,
    own_columns,
    own_rows,
    packed_place,
    row_chunks,
    store_column_parts,
    store_part,
)


def messages_schedule(width: int) -> PairSchedule:
    """Of both kernels; ``steps`` is for the backward, whose parts it makes fewer."""
    return channel_schedule(width, steps=2)


@triton.jit(**PER_TILE)
def messages_kernel(
    before_ptr,  # (R S, D)
    stash_ptr,  # (P, D) or None, receives before
    parts_ptr,  # (R, runs, D) sums of the rows
    column_parts_ptr,  # (S, chunks, D) sums of the columns
    n, r0, c0, rows, columns, mirror, chunk,
    EXACT: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts of out_c = sum_r gelu(before_rc), 0 unless mirrored, and of out_r = sum_c gelu(before_rc): (7).

    A program owns BLOCK_J columns and BLOCK_D channels and walks down a chunk of rows.
    Bytes for each pair: reads before and, above the diagonal, writes the stash; the messages are never stored.
    """
    run = tl.program_id(0).to(tl.int64)
    j = run * BLOCK_J + tl.arange(0, BLOCK_J)
    column, stored = c0 + j, j < columns
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = (channel < WIDTH)[None, :]
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    start, end = own_rows(rows, chunk)
    for i in range(start, end):
        row = tl.cast(r0 + i, tl.int64)
        before = load_rows(before_ptr, tl.cast(i, tl.int64) * columns + j, channel, stored, WIDTH, TYPE)
        if stash_ptr is not None:
            upper = (stored & (column >= row))[:, None] & within
            store(stash_ptr + packed_place(row, column, n)[:, None] * WIDTH + channel[None, :], before, upper)
        message = gelu(before, EXACT)
        total += message
        store_part(parts_ptr, message, channel, WIDTH, tl.cast(i, tl.int64) * tl.num_programs(0) + run)
    total = tl.where((j >= mirror)[:, None], total, 0.0)
    store_column_parts(column_parts_ptr, j, stored, channel, total, WIDTH)


@triton.jit(**PER_TILE)
def messages_backward_kernel(
    grad_ptr,  # (N, D) of the sums
    before_ptr,  # (R S, D), or (P, D) where PACKED
    out_ptr,  # (R S, D)
    parts_ptr,  # (R runs, D) of the gradient of the bias
    n, r0, c0, columns, mirror,
    PACKED: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(grad_r + [mirrored] grad_c) gelu'(before): a mirrored pair is a message to both of its endpoints.

    A program owns STEPS runs of BLOCK_J columns of one row, BLOCK_D channels, and their part of the sum over pairs.
    Bytes for each pair: reads before, writes its gradient; node rows come from the cache.
    """
    i, first = own_columns(columns, BLOCK_J * STEPS)
    row = r0 + i
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = load_node(grad_ptr, row, channel, WIDTH, TYPE)[None, :]
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    for step in range(STEPS):
        j = first + step * BLOCK_J + tl.arange(0, BLOCK_J)
        column, place, stored = c0 + j, i * columns + j, j < columns
        source = packed_place(row, column, n) if PACKED else place
        before = load_rows(before_ptr, source, channel, stored, WIDTH, TYPE)
        received = own + load_rows(grad_ptr, column, channel, stored & (j >= mirror), WIDTH, TYPE)
        inside = stored[:, None] & (channel < WIDTH)[None, :]
        grad = tl.where(inside, received * gelu_and_derivative(before, EXACT)[1], 0.0)
        store(out_ptr + place[:, None] * WIDTH + channel[None, :], grad, inside)
        total += grad
    store_part(parts_ptr, total, channel, WIDTH, tl.program_id(0))


def messages(before: Tensor, n: int, tile: Rectangle, out: Tensor, stash: Tensor | None) -> None:
    """Add the messages gelu(before) of a tile (R S, D) to their receivers in ``out`` (N, D).

    stash: (P, D), receives before, or None. Memory: D numbers for each row and run of columns, and for each column and
    chunk of rows.
    """
    r0, r1, c0, c1 = tile
    rows, columns, width = r1 - r0, c1 - c0, out.shape[-1]
    schedule = messages_schedule(width)
    runs, channel_runs = blocks(columns, schedule.block_j), blocks(width, schedule.block_d)
    chunk, chunks = row_chunks(rows, runs * channel_runs)
    parts = out.new_empty((1, rows, runs, width))
    column_parts = out.new_empty((1, columns, chunks, width))
    launch(
        messages_kernel, (runs, channel_runs, chunks),
        before, stash, parts, column_parts, n, r0, c0, rows, columns, max(r1 - c0, 0), chunk,
        schedule=schedule, EXACT=is_exact(before.dtype), TYPE=TRITON_TYPES[out.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
    add_parts(parts, [out[r0:r1]])
    add_parts(column_parts, [out[c0:c1]])


def messages_backward(
    grad: Tensor, before: Tensor, n: int, tile: Rectangle, out: Tensor, bias: Tensor, packed: bool
) -> None:
    """Gradient of before (R S, D) to ``out``, from that of the sums, ``grad`` (N, D); its column sum to ``bias`` (D,).

    before: (R S, D), or (P, D) where ``packed``. bias: a running sum.
    """
    r0, r1, c0, c1 = tile
    columns, width = c1 - c0, out.shape[-1]
    schedule = messages_schedule(width)
    programs = (r1 - r0) * blocks(columns, schedule.block_j * schedule.steps)
    parts = bias.new_empty((1, 1, programs, width))
    launch(
        messages_backward_kernel, (programs, blocks(width, schedule.block_d)),
        grad, before, out, parts, n, r0, c0, columns, max(r1 - c0, 0),
        schedule=schedule, PACKED=packed, EXACT=is_exact(out.dtype), TYPE=TRITON_TYPES[bias.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d, STEPS=schedule.steps,
    )  # fmt: skip
    add_parts(parts, [bias])


def compilation_cases() -> Iterator[CompilationCase]:
    """Both kernels in float32 and in both 16-bit types, with and without packed storage."""
    n, width, tile = 2048, 512, (64, 80, 64, 2048)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def call(dtype: torch.dtype = dtype) -> None:
            before, packed = (torch.empty(k, width, dtype=dtype, device="meta") for k in (16 * 1984, n * (n + 1) // 2))
            sums, bias = torch.empty(n, width, device="meta"), torch.empty(width, device="meta")
            messages(before, n, tile, sums, packed)
            messages_backward(sums, packed, n, tile, before, bias, packed=True)
            if dtype != torch.float16:
                messages_backward(sums, before, n, tile, before, bias, packed=False)

        yield CompilationCase(str(dtype).removeprefix("torch."), call)
