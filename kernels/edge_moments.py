"""Batch statistics of the edges (14) and their part in the backward: passes over edges (B, D) in any order."""

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
    add_parts,
    blocks,
    channel_schedule,
    load_node,
    load_rows,
    store_part,
)


def moments_schedule(width: int) -> PairSchedule:
    """Of all kernels here; ``steps`` is for the sums."""
    return channel_schedule(width, steps=2)


@triton.jit(**PER_TILE)
def edge_moments_kernel(
    values_ptr,  # (B, D)
    weights_ptr,  # (B,)
    shift_ptr,  # (D,)
    parts_ptr,  # (2, runs, D): sums, sums of squares
    rows,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Parts of sum w (e - shift) and sum w (e - shift)^2 over edges, of which the statistics of (14) are made.

    A program owns STEPS runs of BLOCK_J edges, BLOCK_D channels. Bytes for each edge: reads it once.
    """
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    shift = load_node(shift_ptr, 0, channel, WIDTH, TYPE)[None, :]
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    squares = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_J + tl.arange(0, BLOCK_J)
        # Beyond the edges the weight is 0, and e - shift finite.
        weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0).to(TYPE)[:, None]
        inside = (row < rows)[:, None] & (channel < WIDTH)[None, :]
        centered = tl.where(inside, load_rows(values_ptr, row, channel, row < rows, WIDTH, TYPE) - shift, 0.0)
        total += weight * centered
        squares += weight * centered * centered
    program = tl.program_id(0).to(tl.int64)
    store_part(parts_ptr, total, channel, WIDTH, program)
    store_part(parts_ptr, squares, channel, WIDTH, tl.num_programs(0) + program)


@triton.jit(**PER_TILE)
def norm_gradient_kernel(
    grad_ptr, e_ptr,  # (B, D)
    weights_ptr,  # (B,)
    mean_ptr, constant_ptr, linear_ptr,  # (D,)
    rows,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad -= w (constant + (e - mean) linear): what the batch statistics of (14) send back to an edge.

    A program owns BLOCK_J edges and BLOCK_D channels. Bytes for each edge: reads it and its gradient, writes that.
    """
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    stored = row < rows
    weight = tl.load(weights_ptr + row, mask=stored, other=0.0).to(TYPE)[:, None]
    centered = load_rows(e_ptr, row, channel, stored, WIDTH, TYPE)
    centered -= load_node(mean_ptr, 0, channel, WIDTH, TYPE)[None, :]
    sent = centered * load_node(linear_ptr, 0, channel, WIDTH, TYPE)[None, :]
    sent += load_node(constant_ptr, 0, channel, WIDTH, TYPE)[None, :]
    grad = load_rows(grad_ptr, row, channel, stored, WIDTH, TYPE) - weight * sent
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    store(grad_ptr + row[:, None] * WIDTH + channel[None, :], grad, inside)


@triton.jit(**PER_TILE)
def center_kernel(
    values_ptr,  # (B, D)
    mean_ptr,  # (D,)
    out_ptr,  # (B, D)
    rows,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """e - mean. A program owns BLOCK_J edges and BLOCK_D channels; bytes for each edge: reads and writes it."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    value = load_rows(values_ptr, row, channel, row < rows, WIDTH, TYPE)
    value -= load_node(mean_ptr, 0, channel, WIDTH, TYPE)[None, :]
    inside = (row < rows)[:, None] & (channel < WIDTH)[None, :]
    store(out_ptr + row[:, None] * WIDTH + channel[None, :], value, inside)


def edge_moments(values: Tensor, weights: Tensor, shift: Tensor, total: Tensor, squares: Tensor) -> None:
    """Add weighted sums of ``values`` (B, D) - ``shift`` (D,), and of its squares, to float64 totals (D,).

    weights: (B, 1). A program's sums are in the dtype of ``shift``, the sums of these in float64.
    """
    rows, width = values.shape
    schedule = moments_schedule(width)
    programs = blocks(rows, schedule.block_j * schedule.steps)
    parts = shift.new_empty((2, 1, programs, width))
    launch(
        edge_moments_kernel, (programs, blocks(width, schedule.block_d)), values, weights, shift, parts, rows,
        schedule=schedule, TYPE=TRITON_TYPES[shift.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d, STEPS=schedule.steps,
    )  # fmt: skip
    add_parts(parts, [total, squares])


def norm_gradient(grad: Tensor, e: Tensor, weights: Tensor, mean: Tensor, constant: Tensor, linear: Tensor) -> None:
    """``grad`` (B, D) -= weights (constant + (e - mean) linear); e: (B, D), weights: (B, 1), the rest (D,)."""
    rows, width = grad.shape
    schedule = moments_schedule(width)
    launch(
        norm_gradient_kernel, (blocks(rows, schedule.block_j), blocks(width, schedule.block_d)),
        grad, e, weights, mean, constant, linear, rows,
        schedule=schedule, TYPE=TRITON_TYPES[mean.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip


def center(values: Tensor, mean: Tensor, out: Tensor) -> None:
    """``values`` (B, D) minus ``mean`` (D,), to ``out`` (B, D)."""
    rows, width = values.shape
    schedule = moments_schedule(width)
    launch(
        center_kernel, (blocks(rows, schedule.block_j), blocks(width, schedule.block_d)), values, mean, out, rows,
        schedule=schedule, TYPE=TRITON_TYPES[mean.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip


def compilation_cases() -> Iterator[CompilationCase]:
    """Every kernel in float32 and in bfloat16; float16 is loaded and stored alike."""
    rows, width = 16 * 1984, 384
    for dtype in (torch.float32, torch.bfloat16):

        def call(dtype: torch.dtype = dtype) -> None:
            e, grad = torch.empty(rows, width, dtype=dtype, device="meta"), torch.empty(rows, width, device="meta")
            weights, mean = torch.empty(rows, 1, device="meta"), torch.empty(width, device="meta")
            totals = [torch.empty(width, dtype=torch.float64, device="meta") for _ in range(2)]
            edge_moments(e, weights, mean, *totals)
            norm_gradient(grad, e, weights, mean, mean, mean)
            center(e, mean, e)

        yield CompilationCase(str(dtype).removeprefix("torch."), call)
