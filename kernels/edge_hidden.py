"""The hidden layer (13) of an edge between its two products: gelu and the statistics of its norm, and the backward.

The norm itself never happens here: it folds into the product behind it (I4), which needs two numbers for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import gelu, gelu_and_derivative, round_to, store
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import (
    EPS,
    PER_TILE,
    STORED_TYPES,
    TRITON_TYPES,
    PairSchedule,
    Rectangle,
    add_parts,
    blocks,
    is_exact,
    load_rows,
    own_columns,
    packed_place,
    store_part,
    wide_dtype,
)


def hidden_schedule(width: int) -> PairSchedule:
    """For a hidden layer of ``width`` channels: 4 pairs by up to 1024 of them at a time. Not timed on a GPU."""
    return PairSchedule(4, 2, 4, min(1024, triton.next_power_of_2(width)))


def hidden_backward_schedule(width: int) -> PairSchedule:
    """Blocks of 16 pairs by up to 128 channels, 64 pairs a program. Not timed on a GPU."""
    return PairSchedule(4, 2, 16, min(128, triton.next_power_of_2(width)), 4)


@triton.jit(**PER_TILE)
def edge_hidden_kernel(
    h0_ptr,  # (R S, H), or (P, H) where PACKED
    out_ptr,  # (R S, H), may be h0
    stash_ptr,  # (P, H) or None
    mean_ptr, rstd_ptr,  # (R S,)
    n, r0, c0, columns,
    PACKED: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h = gelu(h0), its mean m = sum h / H and s = 1 / sqrt(sum h^2 / H - m^2 + eps): (13), H = 4 D channels.

    A program owns BLOCK_J columns of one row and walks through the channels. The statistics are those of h as it is
    stored, which is what gets multiplied; the mean of a gelu is of the size of its deviation, so that the difference
    of squares is safe. Bytes for each pair: reads h0, writes h, two numbers and, above the diagonal, the stash.
    """
    i, first = own_columns(columns, BLOCK_J)
    j = first + tl.arange(0, BLOCK_J)
    row, column, place, stored = r0 + i, c0 + j, i * columns + j, j < columns
    packed = packed_place(row, column, n)
    upper = stored & (column >= row)
    total = tl.zeros((BLOCK_J,), TYPE)
    squares = tl.zeros((BLOCK_J,), TYPE)
    for start in range(0, WIDTH, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        within = (channel < WIDTH)[None, :]
        h0 = load_rows(h0_ptr, packed if PACKED else place, channel, stored, WIDTH, TYPE)
        if stash_ptr is not None:
            store(stash_ptr + packed[:, None] * WIDTH + channel[None, :], h0, upper[:, None] & within)
        h = round_to(gelu(h0, EXACT), out_ptr.dtype.element_ty)
        tl.store(out_ptr + place[:, None] * WIDTH + channel[None, :], h, mask=stored[:, None] & within)
        wide = h.to(TYPE)
        total += tl.sum(wide, 1)
        squares += tl.sum(wide * wide, 1)
    mean = total / WIDTH
    variance = squares / WIDTH - mean * mean
    rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + EPS)
    tl.store(mean_ptr + place, mean, mask=stored)
    tl.store(rstd_ptr + place, rstd, mask=stored)


@triton.jit(**PER_TILE)
def edge_hidden_backward_kernel(
    grad_ptr,  # (R S, H) product with the folded map, becomes the gradient of h0
    h0_ptr,  # (R S, H), or (P, H) where PACKED
    mean_ptr, rstd_ptr, mean_grad_ptr, mean_product_ptr,  # (R S,)
    parts_ptr,  # (R runs, H) of the gradient of ff1_bias
    n, r0, c0, columns,
    PACKED: tl.constexpr, EXACT: tl.constexpr, STORED: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dh0 = (dh - s m1 - (h - m) s^2 m2) gelu'(h0), with the norm's two row means m1, m2 known beforehand; (13).

    A program owns STEPS runs of BLOCK_J columns of one row, BLOCK_D channels, and their part of sum dh0. h is made
    again, rounded to STORED as it was. Bytes for each pair: reads dh and h0, writes dh0, four numbers from the cache.
    """
    i, first = own_columns(columns, BLOCK_J * STEPS)
    row = r0 + i
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    for step in range(STEPS):
        j = first + step * BLOCK_J + tl.arange(0, BLOCK_J)
        place, stored = i * columns + j, j < columns
        mean = tl.load(mean_ptr + place, mask=stored, other=0.0).to(TYPE)
        rstd = tl.load(rstd_ptr + place, mask=stored, other=0.0).to(TYPE)
        slope = rstd * rstd * tl.load(mean_product_ptr + place, mask=stored, other=0.0).to(TYPE)
        constant = slope * mean - rstd * tl.load(mean_grad_ptr + place, mask=stored, other=0.0).to(TYPE)
        h0 = load_rows(h0_ptr, packed_place(row, c0 + j, n) if PACKED else place, channel, stored, WIDTH, TYPE)
        h, derivative = gelu_and_derivative(h0, EXACT)
        h = round_to(h, STORED).to(TYPE)
        grad = load_rows(grad_ptr, place, channel, stored, WIDTH, TYPE)
        grad = (grad - slope[:, None] * h + constant[:, None]) * derivative
        inside = stored[:, None] & (channel < WIDTH)[None, :]
        store(grad_ptr + place[:, None] * WIDTH + channel[None, :], grad, inside)
        total += grad
    store_part(parts_ptr, total, channel, WIDTH, tl.program_id(0))


def edge_hidden(
    h0: Tensor, out: Tensor, n: int, tile: Rectangle, packed: bool, stash: Tensor | None
) -> tuple[Tensor, Tensor]:
    """gelu of h0 (R S, H), or (P, H) where ``packed``, to ``out`` (R S, H), which may be h0; h0 to ``stash`` (P, H).

    Returns mean and 1 / deviation of every row of ``out``, (R S,) in float32 or, for float64 rows, float64.
    """
    r0, r1, c0, c1 = tile
    columns, width, dtype = c1 - c0, out.shape[-1], wide_dtype(out)
    schedule = hidden_schedule(width)
    mean, rstd = out.new_empty((2, out.shape[0]), dtype=dtype).unbind()
    launch(
        edge_hidden_kernel, ((r1 - r0) * blocks(columns, schedule.block_j),),
        h0, out, stash, mean, rstd, n, r0, c0, columns,
        schedule=schedule, PACKED=packed, EXACT=is_exact(out.dtype), TYPE=TRITON_TYPES[dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
    return mean, rstd


def edge_hidden_backward(
    grad: Tensor,
    h0: Tensor,
    mean: Tensor,
    rstd: Tensor,
    means: tuple[Tensor, Tensor],
    n: int,
    tile: Rectangle,
    packed: bool,
    stored: torch.dtype,
    bias: Tensor,
) -> None:
    """``grad`` (R S, H), the product with the folded map, becomes the gradient of h0; its column sum goes to ``bias``.

    h0: (R S, H), or (P, H) where ``packed``. mean, rstd, means: (R S,). stored: dtype of the hidden layer. bias: (H,).
    """
    r0, r1, c0, c1 = tile
    columns, width = c1 - c0, grad.shape[-1]
    schedule = hidden_backward_schedule(width)
    programs = (r1 - r0) * blocks(columns, schedule.block_j * schedule.steps)
    parts = bias.new_empty((1, 1, programs, width))
    launch(
        edge_hidden_backward_kernel, (programs, blocks(width, schedule.block_d)),
        grad, h0, mean, rstd, *means, parts, n, r0, c0, columns,
        schedule=schedule, PACKED=packed, EXACT=is_exact(grad.dtype), STORED=STORED_TYPES[stored],
        TYPE=TRITON_TYPES[bias.dtype], WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
        STEPS=schedule.steps,
    )  # fmt: skip
    add_parts(parts, [bias])


def compilation_cases() -> Iterator[CompilationCase]:
    """Both kernels from tiles and from packed storage, at a width of D = 512 and at one that does not fill a block."""
    n, tile = 2048, (64, 80, 64, 2048)
    pairs, total = 16 * 1984, n * (n + 1) // 2
    for dtype, width, packed in (
        (torch.float32, 2048, False),
        (torch.bfloat16, 2048, False),
        (torch.float16, 768, True),
    ):

        def call(dtype: torch.dtype = dtype, width: int = width, packed: bool = packed) -> None:
            h, kept = (torch.empty(rows, width, dtype=dtype, device="meta") for rows in (pairs, total))
            mean, rstd = edge_hidden(kept if packed else h, h, n, tile, packed, None if packed else kept)
            bias = torch.empty(width, device="meta")
            means = torch.empty_like(mean), torch.empty_like(mean)
            source = kept if packed else h
            edge_hidden_backward(torch.empty_like(h), source, mean, rstd, means, n, tile, packed, dtype, bias)

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width}{' packed' * packed}", call)
