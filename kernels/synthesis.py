"""Channel-weighted synthetic negatives (15)-(18) of a tile of pairs: their values and the gradient of gates.

Owns the GPU form of what ``gcng.ops.synthesis_tiles`` says of a block of anchors against whole classes, but for its
geometry and the gradients of embeddings (``synthesis_geometry``, ``synthesis_gradient``). A program has a few anchors,
a block of channels and a span of classes; it walks over the classes one at a time with all their samples in registers,
so that ragged counts cost nothing and no tensor of size A x B x D is written. Gates are read where they lie, through
their strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import store
from gcng.kernels.launch import CompilationCase, Schedule, launch
from gcng.kernels.synthesis_geometry import KINDS, PER_BLOCK, Block, Geometry, meta_block

# Programs wanted at once, about four for each multiprocessor of a large GPU; a constant, so that sums never depend
# on the machine.
PROGRAMS = 528


class Upstream(NamedTuple):
    """Gradients of the synthetic negatives: of their values (A, m, D), inner products and squared norms (A, m)."""

    values: Tensor | None
    dots: Tensor | None
    squares: Tensor | None

    def contiguous(self) -> Upstream:
        """The same numbers, each tensor dense."""
        return Upstream(*(None if x is None else x.contiguous() for x in self))


@dataclass(frozen=True)
class SynthesisTile(Schedule):
    """Samples of a class at a time, anchors of a program, channels of a program."""

    block_g: int = 2
    block_a: int = 4
    block_d: int = 256

    @property
    def tiles(self) -> dict[str, int]:
        """The constexpr parameters of the kernels."""
        return {"BLOCK_G": self.block_g, "BLOCK_A": self.block_a, "BLOCK_D": self.block_d}


def synthesis_tile(most: int, width: int, dtype: torch.dtype) -> SynthesisTile:
    """By the largest class, D and the dtype of z: 16 numbers of every operand a thread; not timed on a GPU."""
    block_g = min(8, triton.next_power_of_2(max(most, 1)))
    most_channels = 128 if dtype == torch.float64 else 256
    block_d = min(most_channels, max(16, triton.next_power_of_2(width)))
    return SynthesisTile(4, 2, block_g, 8 // block_g, block_d)


def spans(length: int, others: int) -> tuple[int, int]:
    """Spans that a walk over ``length`` steps is cut into, and the steps of each, given the programs beside it."""
    per_span = triton.cdiv(max(length, 1), min(max(length, 1), triton.cdiv(PROGRAMS, max(others, 1))))
    return triton.cdiv(length, per_span), per_span


@triton.jit
def class_span(starts_ptr, index):
    """First sample of class ``index`` and the one behind its last, int64, counted from the first class given."""
    base = tl.load(starts_ptr)
    return tl.load(starts_ptr + index) - base, tl.load(starts_ptr + index + 1) - base


@triton.jit
def load_rows(x_ptr, rows, channels, WIDTH: tl.constexpr):
    """(rows, channels) of a contiguous matrix, 0 in channels beyond WIDTH; rows must exist."""
    return tl.load(x_ptr + rows[:, None] * WIDTH + channels[None, :], mask=(channels < WIDTH)[None, :], other=0.0)


@triton.jit
def load_differences(n_ptr, a, samples, channels, WIDTH: tl.constexpr):
    """n - a, (BLOCK_G, BLOCK_A, BLOCK_D); samples (BLOCK_G,) must exist, a is 0 in channels beyond WIDTH.

    Every warp loads the n of its own anchors, from the cache: one load for all would meet at a barrier.
    """
    pointers = n_ptr + samples[:, None, None] * WIDTH + channels[None, None, :]
    pointers = tl.broadcast_to(pointers, (samples.shape[0], a.shape[0], a.shape[1]))
    return tl.load(pointers, mask=(channels < WIDTH)[None, None, :], other=0.0) - a[None, :, :]


@triton.jit
def load_samples(
    n_ptr, gate_ptr, offset_ptr, slope_ptr, a, anchors, first, stop, channels, B,
    stride_gate_a, stride_gate_b, stride_gate_d, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Gate, ``n - a`` and pull ``w t = w rho + w kappa (1 - rho) gate`` of BLOCK_G samples before ``stop``.

    a: (BLOCK_A, BLOCK_D), rows ``anchors``, which must exist. Returns three tensors (BLOCK_G, BLOCK_A, BLOCK_D); pull
    is 0 where there is no sample, gate and pull n - a are where there is no channel.
    """
    samples = first + tl.arange(0, BLOCK_G)
    inside = samples < stop
    samples = tl.minimum(samples, stop - 1)
    place = anchors[None, :] * B + samples[:, None]
    offset = tl.load(offset_ptr + place, mask=inside[:, None], other=0.0)
    slope = tl.load(slope_ptr + place, mask=inside[:, None], other=0.0)
    gate_ptrs = gate_ptr + anchors[None, :, None] * stride_gate_a + samples[:, None, None] * stride_gate_b
    live = inside[:, None, None] & (channels < WIDTH)[None, None, :]
    gate = tl.load(gate_ptrs + channels[None, None, :] * stride_gate_d, mask=live, other=0.0).to(a.dtype)
    return gate, load_differences(n_ptr, a, samples, channels, WIDTH), gate * slope[:, :, None] + offset[:, :, None]


@triton.jit
def grad_of_values(
    grad_values_ptr, grad_dots_ptr, grad_squares_ptr, values, a, places, channels, WIDTH: tl.constexpr
):
    """The whole gradient of synthetic negatives, (BLOCK_A, BLOCK_D): their own, ``2 values`` and ``a`` times numbers.

    values: (BLOCK_A, BLOCK_D), read where the gradient of squared norms is given. places: (BLOCK_A,) int64 in (A, m).
    """
    grad = tl.zeros_like(a)
    if grad_squares_ptr is not None:
        grad += 2.0 * tl.load(grad_squares_ptr + places)[:, None] * values
    if grad_dots_ptr is not None:
        grad += tl.load(grad_dots_ptr + places)[:, None] * a
    if grad_values_ptr is not None:
        grad += load_rows(grad_values_ptr, places, channels, WIDTH)
    return grad


@triton.jit(**PER_BLOCK)
def synthesize_forward_kernel(
    a_ptr, n_ptr, starts_ptr, gate_ptr, offset_ptr, slope_ptr, values_ptr, dots_ptr, squares_ptr,
    A, B, M, per_span, stride_gate_a, stride_gate_b, stride_gate_d,
    WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(17), (18): v = a + sum_g w_g t_g (n_g - a) over the samples of a class; v, v . a and |v|^2.

    A program owns BLOCK_A anchors, BLOCK_D channels and per_span classes: v (A, m, D), where wanted, and its block's
    part of the two sums, (channel blocks, A, m). Reads every gate once, n from the cache.
    a: (A, D). n: (B, D). starts: (m + 1,) int64. gate: (A, B, D), any strides. offset, slope: (A, B). M: m.
    """
    anchors = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    channels = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = anchors < A
    anchors = tl.minimum(anchors, A - 1)
    a = load_rows(a_ptr, anchors, channels, WIDTH)
    begin = tl.program_id(1).to(tl.int64) * per_span
    for index in range(begin, tl.minimum(begin + per_span, M)):
        start, stop = class_span(starts_ptr, index)
        values = a
        for first in range(start, stop, BLOCK_G):
            _, difference, pull = load_samples(
                n_ptr, gate_ptr, offset_ptr, slope_ptr, a, anchors, first, stop, channels, B,
                stride_gate_a, stride_gate_b, stride_gate_d, WIDTH, BLOCK_G,
            )  # fmt: skip
            values += tl.sum(pull * difference, 0)
        places = anchors * M + index
        part = tl.program_id(2).to(tl.int64) * A * M
        tl.store(dots_ptr + part + places, tl.sum(values * a, 1), mask=stored)
        tl.store(squares_ptr + part + places, tl.sum(values * values, 1), mask=stored)
        if values_ptr is not None:
            live = stored[:, None] & (channels < WIDTH)[None, :]
            tl.store(values_ptr + places[:, None] * WIDTH + channels[None, :], values, mask=live)


@triton.jit(**PER_BLOCK)
def add_gate_gradient_kernel(
    a_ptr, n_ptr, starts_ptr, slope_ptr, values_ptr, grad_values_ptr, grad_dots_ptr, grad_squares_ptr, out_ptr,
    A, B, M, per_span, stride_out_a, stride_out_b, stride_out_d,
    WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the gates: out += w kappa (1 - rho) (n - a) dv, dv that of the synthetic negative of n's class.

    A program owns BLOCK_A anchors, BLOCK_D channels and per_span classes. Reads and writes out once, dv and v once.
    a: (A, D). n: (B, D). starts: (m + 1,) int64. slope: (A, B). out: (A, B, D), any strides. M: m. values and
    grad_values: (A, m, D). grad_dots and grad_squares: (A, m). The gradients may be None; values is read with the last.
    """
    anchors = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    channels = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = (anchors < A)[:, None] & (channels < WIDTH)[None, :]
    anchors = tl.minimum(anchors, A - 1)
    a = load_rows(a_ptr, anchors, channels, WIDTH)
    begin = tl.program_id(1).to(tl.int64) * per_span
    for index in range(begin, tl.minimum(begin + per_span, M)):
        start, stop = class_span(starts_ptr, index)
        places = anchors * M + index
        values = a
        if grad_squares_ptr is not None:
            values = load_rows(values_ptr, places, channels, WIDTH)
        grad = grad_of_values(
            grad_values_ptr, grad_dots_ptr, grad_squares_ptr, values, a, places, channels, WIDTH
        )  # fmt: skip
        for first in range(start, stop, BLOCK_G):
            samples = first + tl.arange(0, BLOCK_G)
            live = (samples < stop)[:, None, None] & stored[None, :, :]
            samples = tl.minimum(samples, stop - 1)
            slope = tl.load(slope_ptr + anchors[None, :] * B + samples[:, None])
            difference = load_differences(n_ptr, a, samples, channels, WIDTH)
            out_ptrs = out_ptr + anchors[None, :, None] * stride_out_a + samples[:, None, None] * stride_out_b
            out_ptrs += channels[None, None, :] * stride_out_d
            before = tl.load(out_ptrs, mask=live, other=0.0).to(a.dtype)
            store(out_ptrs, before + grad[None, :, :] * difference * slope[:, :, None], live)


def walk_over_classes(block: Block, tile: SynthesisTile) -> tuple[tuple[int, int, int], int]:
    """Grid of the kernels that own anchors and walk over classes, and the classes of each of their spans."""
    (a, m, _), width = block.shape, block.z.shape[1]
    anchor_blocks, channel_blocks = triton.cdiv(a, tile.block_a), triton.cdiv(width, tile.block_d)
    count, per_span = spans(m, anchor_blocks * channel_blocks)
    return (anchor_blocks, count, channel_blocks), per_span


def synthesize_forward(
    block: Block, geometry: Geometry, gate: Tensor, *, need_values: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Synthetic negatives (A, m, D) where wanted, their inner products with the anchors, their squared norms (A, m).

    gate: (A, B, D), any floating dtype and strides. Memory: the result, twice (A, m) for each block of channels.
    """
    (a, m, b), width = block.shape, block.z.shape[1]
    tile = synthesis_tile(block.most, width, block.z.dtype)
    grid, per_span = walk_over_classes(block, tile)
    values = block.z.new_empty((a, m, width)) if need_values else None
    sums = block.z.new_empty((2, grid[2], a, m))
    launch(
        synthesize_forward_kernel, grid, *block.operands, gate, geometry.offset, geometry.slope, values, *sums.unbind(),
        a, b, m, per_span, *gate.stride(), schedule=tile, WIDTH=width, **tile.tiles,
    )  # fmt: skip
    dots, squares = (sums[:, 0] if grid[2] == 1 else sums.sum(1)).unbind()
    return values, dots, squares


def add_gate_gradient(
    block: Block, slope: Tensor, values: Tensor | None, upstream: Upstream, out: Tensor
) -> None:
    """Add the gradient of the gates to ``out`` (A, B, D), any floating dtype and strides.

    slope: (A, B), of the geometry. values: (A, m, D), of the forward; needed with the gradient of squared norms.
    """
    (a, m, b), width = block.shape, block.z.shape[1]
    tile = synthesis_tile(block.most, width, block.z.dtype)
    grid, per_span = walk_over_classes(block, tile)
    values = None if values is None or upstream.squares is None else values.contiguous()
    launch(
        add_gate_gradient_kernel, grid, *block.operands, slope, values, *upstream.contiguous(), out,
        a, b, m, per_span, *out.stride(), schedule=tile, WIDTH=width, **tile.tiles,
    )  # fmt: skip


def compilation_cases() -> Iterator[CompilationCase]:
    """All passes for every dtype of gates, with everything that they can be asked for."""
    for stored, wide, width, samples in KINDS:

        def passes(stored=stored, wide=wide, width=width, samples=samples) -> None:
            block, geometry = meta_block(wide, width, samples)
            a, _, b = block.shape
            gate = torch.empty((a, b, width), dtype=stored, device="meta")
            values, dots, squares = synthesize_forward(block, geometry, gate, need_values=True)
            out = torch.empty((a, b, width), dtype=wide, device="meta")
            add_gate_gradient(block, geometry.slope, values, Upstream(values, dots, squares), out)

        yield CompilationCase(f"{stored} gates, D {width}, K {samples}".removeprefix("torch."), passes)
