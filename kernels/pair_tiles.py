"""What all passes over tiles of pairs share: the pairs of a program, packed positions, and sums over programs.

A tile is a rectangle (r0, r1, c0, c1) of pairs, R = r1 - r0 rows by S = c1 - c0 columns (gcng/ops/tiles.py); its pair
(i, j) is row i S + j of a tensor (R S, D). A program owns a run of columns of one row, or a run of columns in all rows:
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
PER_TILE = unspecialized(
    ("n", "r0", "c0", "rows", "columns", "mirror", "pairs", "layer", "seed", "parts", "groups"),
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
    TYPE: tl.constexpr = total_ptr.dtype.element_ty
    first = (tl.cast(target, tl.int64) * groups + group) * parts
    summed = tl.zeros((BLOCK_P, BLOCK_D), TYPE)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        summed += load_rows(parts_ptr, first + part, channel, part < parts, WIDTH, TYPE)
    value, place = tl.sum(summed, 0), group * WIDTH + channel
    _add_to(total_ptr, place, value, channel < tl.where(target == 0, WIDTH, 0))
    _add_to(second_ptr, place, value, channel < tl.where(target == 1, WIDTH, 0))
    _add_to(third_ptr, place, value, channel < tl.where(target == 2, WIDTH, 0))
    _add_to(fourth_ptr, place, value, channel < tl.where(target == 3, WIDTH, 0))


def add_parts(parts: Tensor, totals: Sequence[Tensor]) -> None:
    """Add sums over programs to running sums.

    parts: (T, G, P, W). totals: T tensors (G, W) of one dtype, in which the parts are summed.
    """
    count, groups, number, width = parts.shape
    schedule = PairSchedule(4, 2, 16, min(64, triton.next_power_of_2(width)))
    pointers = [*totals, None, None, None][:4]
    launch(
        add_parts_kernel, (groups * blocks(width, schedule.block_d), count), parts, *pointers, groups, number,
        schedule=schedule, WIDTH=width, BLOCK_P=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
