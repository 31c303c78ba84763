"""What all passes over tiles of pairs share: the pairs of a program, packed positions, and sums over programs.

A tile is a rectangle (r0, r1, c0, c1) of pairs, R = r1 - r0 rows by S = c1 - c0 columns (gcng/ops/tiles.py); its pair
(i, j) is row i S + j of a tensor (R S, D). A program owns a run of columns, of one row or of a chunk of rows:
neither needs a division for each pair. What is summed over more pairs than a program has is written as one part for
each program, and :func:`add_parts` adds the parts up in their order: no atomics, every run has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.launch import Schedule, launch, unspecialized

Rectangle = tuple[int, int, int, int]  # r0, r1, c0, c1
TRITON_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32}
STORED_TYPES = {**TRITON_TYPES, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
EPS = tl.constexpr(1e-5)  # of every layer norm
PARTS_CHUNK = 64  # parts that one program adds up where two steps do it
MANY_PROGRAMS = 1024  # of four warps: eight for each multiprocessor of the largest GPUs
LEAST_ROWS = 8  # of a chunk: a column's part for fewer would cost as much as the rows that it is the sum of
FEW_PROGRAMS = 512  # below this many, a GPU has idle multiprocessors or too few loads on their way
PER_TILE = unspecialized(
    ("n", "r0", "c0", "rows", "columns", "mirror", "pairs", "layer", "seed", "parts", "groups", "chunk"),
    ("identity_ptr", "weights_ptr", "weight_row_ptr", "weight_column_ptr", "mean_ptr", "rstd_ptr", "mean_grad_ptr",
     "mean_product_ptr", "total_ptr", "second_ptr", "third_ptr", "fourth_ptr"),
)  # fmt: skip


@dataclass(frozen=True)
class PairSchedule(Schedule):
    """Pairs and channels of a block, and how many blocks a program walks along its row."""

    block_j: int = 8
    block_d: int = 512
    steps: int = 1


def whole_row_schedule(width: int, dtype: torch.dtype, *, backward: bool = False) -> PairSchedule:
    """For passes that normalize: a block holds all channels of some pairs, whatever their number.

    16 elements for each of 256 threads, 8 in a backward, which holds four blocks of sums beside; where a row is longer,
    one pair and as many threads as a block may have. A backward walks through 8 blocks, so that its parts are few.
    Not timed on a GPU: registers and spills are those that tests/test_triton_compiles.py prints.
    """
    block_d = triton.next_power_of_2(width)
    elements = (2048 if backward else 4096) // (2 if dtype == torch.float64 else 1)
    warps = min(32, max(8, block_d // 512))
    return PairSchedule(warps, 2, max(1, min(64, elements // block_d)), block_d, 8 if backward else 1)


def channel_schedule(width: int, *, steps: int = 1) -> PairSchedule:
    """For passes that do not mix channels: blocks of 32 pairs by up to 64 channels, 16 elements a thread."""
    return PairSchedule(4, 2, 32, min(64, triton.next_power_of_2(width)), steps)


def blocks(extent: int, size: int) -> int:
    """Blocks of ``size`` that cover ``extent``."""
    return -(-extent // size)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What a pass over these tensors computes in: float64 where one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def is_exact(stored: torch.dtype) -> bool:
    """Whether GELU has to be as exact as float32: not where the operands are stored in 16 bits."""
    return stored in TRITON_TYPES


@triton.jit
def own_columns(columns, BLOCK: tl.constexpr):
    """Row of the tile and first column, int64, of the run of BLOCK columns that a program owns."""
    runs = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    return (program // runs).to(tl.int64), (program % runs).to(tl.int64) * BLOCK


def row_chunks(rows: int, programs: int) -> tuple[int, int]:
    """Rows of a chunk, and chunks, for a pass that walks down the columns of a tile with so many programs side by side.

    One chunk where these fill a GPU. Else the rows are cut, so that more programs load at a time. What each sums over
    its rows is a part. By sizes alone, not timed.
    """
    chunks = max(1, min(blocks(rows, LEAST_ROWS), blocks(MANY_PROGRAMS, max(programs, 1))))
    chunk = blocks(rows, chunks)
    return chunk, blocks(rows, chunk) if chunk else 1


@triton.jit
def own_rows(rows, chunk):
    """First row of the tile, and the row behind the last one, that a program walks along: chunk of its third index."""
    first = tl.program_id(2) * chunk
    return first, tl.minimum(first + chunk, rows)


@triton.jit
def store_column_parts(parts_ptr, j, stored, channel, total, WIDTH: tl.constexpr):
    """Write the sums of a program's columns over its chunk of rows, (J, channels), to parts (S, chunks, WIDTH).

    j: place in the tile, int64 (J,). stored: bool (J,), inside the tile.
    """
    place = (j * tl.num_programs(2) + tl.program_id(2))[:, None] * WIDTH + channel[None, :]
    tl.store(parts_ptr + place, total, mask=stored[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def packed_place(row, column, n):
    """Position of a pair in packed storage, either order, int64."""
    low = tl.minimum(row, column)
    return low * n - ((low * (low - 1)) >> 1) + tl.maximum(row, column) - low


@triton.jit
def load_node(ptr, node, channel, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Channels of one node of (N, WIDTH), 0 beyond WIDTH."""
    return tl.load(ptr + tl.cast(node, tl.int64) * WIDTH + channel, mask=channel < WIDTH, other=0.0).to(TYPE)


@triton.jit
def load_rows(ptr, row, channel, stored, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Rows of (B, WIDTH), 0 outside; row: int64 (J,), stored: bool (J,)."""
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0).to(TYPE)


@triton.jit
def load_edges(
    ptr, row, column, place, channel, stored, n, KIND: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr
):
    """Edges (J, channels) of pairs: products of nodes, packed or of the tile; 0 outside.

    row: node, int64 scalar. column: nodes (J,). place: of the pairs in the tile (J,). Products are not rounded.
    """
    if KIND == "product":
        edges = load_rows(ptr, column, channel, stored, WIDTH, TYPE)
        return load_node(ptr, row, channel, WIDTH, TYPE)[None, :] * edges
    elif KIND == "packed":
        return load_rows(ptr, packed_place(row, column, n), channel, stored, WIDTH, TYPE)
    else:
        return load_rows(ptr, place, channel, stored, WIDTH, TYPE)


@triton.jit
def normalize(x, channel, WIDTH: tl.constexpr):
    """Rows of x (J, channels), 0 beyond WIDTH, to mean 0 and deviation 1, and 1 / deviation (J,)."""
    mean = tl.sum(x, 1) / WIDTH
    centered = tl.where((channel < WIDTH)[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / WIDTH + EPS)
    return centered * rstd[:, None], rstd


@triton.jit
def normalize_backward(grad, normalized, rstd, channel, WIDTH: tl.constexpr):
    """Gradient of what :func:`normalize` was given, from that of what it returned; 0 beyond WIDTH."""
    mean = tl.sum(grad, 1) / WIDTH
    slope = tl.sum(grad * normalized, 1) / WIDTH
    result = (grad - mean[:, None] - normalized * slope[:, None]) * rstd[:, None]
    return tl.where((channel < WIDTH)[None, :], result, 0.0)


@triton.jit
def store_part(ptr, block, channel, WIDTH: tl.constexpr, offset):
    """Write the sum of a block (J, channels) over its pairs as row ``offset`` of (parts, WIDTH)."""
    tl.store(ptr + tl.cast(offset, tl.int64) * WIDTH + channel, tl.sum(block, 0), mask=channel < WIDTH)


@triton.jit
def _sum_of_parts(
    parts_ptr, first, begin, end, channel, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, TYPE: tl.constexpr
):
    """Sum (channels,) of the rows ``first + begin`` to ``first + end`` of (.., WIDTH), in their order."""
    summed = tl.zeros((BLOCK_P, channel.shape[0]), TYPE)
    for start in range(begin, end, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        summed += load_rows(parts_ptr, first + part, channel, part < end, WIDTH, TYPE)
    return tl.sum(summed, 0)


@triton.jit(**PER_TILE)
def sum_parts_kernel(
    parts_ptr,  # (T, G, P, W)
    out_ptr,  # (T, G, chunks, W)
    groups, parts,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t, g, c] = the sum of the CHUNK parts from c CHUNK on: what many parts are made few by.

    A program owns one chunk of one group and BLOCK_D channels of one total.
    """
    runs: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    chunks = tl.cdiv(parts, CHUNK)
    program, target = tl.program_id(0), tl.program_id(1)
    place, run = program // runs, program % runs
    group, chunk = place // chunks, place % chunks
    channel = run * BLOCK_D + tl.arange(0, BLOCK_D)
    owner = tl.cast(target, tl.int64) * groups + group
    begin = chunk * CHUNK
    summed = _sum_of_parts(
        parts_ptr, owner * parts, begin, tl.minimum(begin + CHUNK, parts), channel, WIDTH, BLOCK_P,
        out_ptr.dtype.element_ty,
    )  # fmt: skip
    tl.store(out_ptr + (owner * chunks + chunk) * WIDTH + channel, summed, mask=channel < WIDTH)


@triton.jit
def _add_to(total_ptr, place, summed, mask):
    if total_ptr is not None:
        tl.store(total_ptr + place, tl.load(total_ptr + place, mask=mask, other=0.0) + summed, mask=mask)


@triton.jit(**PER_TILE)
def add_parts_kernel(
    parts_ptr,  # (T, G, P, W) with T up to 4
    total_ptr, second_ptr, third_ptr, fourth_ptr,  # (G, W), None beyond T
    groups, parts,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total_t[g] += sum_p parts[t, g, p]: the second half of every sum over pairs, parts in their order.

    A program owns one group and BLOCK_D channels of one total; it reads the parts of the group once.
    """
    runs: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    program, target = tl.program_id(0), tl.program_id(1)
    group = (program // runs).to(tl.int64)
    channel = (program % runs) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = (tl.cast(target, tl.int64) * groups + group) * parts
    value = _sum_of_parts(parts_ptr, first, 0, parts, channel, WIDTH, BLOCK_P, total_ptr.dtype.element_ty)
    place = group * WIDTH + channel
    _add_to(total_ptr, place, value, channel < tl.where(target == 0, WIDTH, 0))
    _add_to(second_ptr, place, value, channel < tl.where(target == 1, WIDTH, 0))
    _add_to(third_ptr, place, value, channel < tl.where(target == 2, WIDTH, 0))
    _add_to(fourth_ptr, place, value, channel < tl.where(target == 3, WIDTH, 0))


def adds_twice(number: int, programs: int) -> bool:
    """Whether parts are added up in chunks first.

    A program reads the parts of its total one block after the other, and waits for memory at each. Where they are many
    and totals few, as in the sums over all pairs of a tile, most of a GPU would look on. Not timed: by sizes alone.
    """
    return number > 2 * PARTS_CHUNK and programs < FEW_PROGRAMS


def add_parts(parts: Tensor, totals: Sequence[Tensor]) -> None:
    """Add sums over programs to running sums.

    parts: (T, G, P, W). totals: T tensors (G, W) of one dtype, in which the parts are summed.
    """
    count, groups, number, width = parts.shape
    schedule = PairSchedule(4, 2, 16, min(64, triton.next_power_of_2(width)))
    runs = blocks(width, schedule.block_d)
    if adds_twice(number, groups * runs * count):
        chunks = blocks(number, PARTS_CHUNK)
        sums = totals[0].new_empty((count, groups, chunks, width))
        launch(
            sum_parts_kernel, (groups * chunks * runs, count), parts, sums, groups, number,
            schedule=schedule, WIDTH=width, CHUNK=PARTS_CHUNK, BLOCK_P=schedule.block_j, BLOCK_D=schedule.block_d,
        )  # fmt: skip
        parts, number = sums, chunks
    pointers = [*totals, None, None, None][:4]
    launch(
        add_parts_kernel, (groups * runs, count), parts, *pointers, groups, number,
        schedule=schedule, WIDTH=width, BLOCK_P=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
