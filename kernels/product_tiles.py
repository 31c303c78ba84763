"""What the products with epilogues share: which of them run, their tiles, and the end of an edge layer.

Owns the launch tables of :mod:`gcng.kernels.edge_products`, :mod:`gcng.kernels.edge_wide_rows`,
:mod:`gcng.kernels.edge_mlp` and :mod:`gcng.kernels.message_products`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gcng.kernels.arithmetic import dot, gelu, store
from gcng.kernels.launch import Schedule
from gcng.kernels.pair_tiles import load_node, load_rows, normalize, packed_place


@dataclass(frozen=True)
class ProductSchedule(Schedule):
    """Pairs and channels of the tile that a program owns, and channels that it multiplies at a time."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8  # tiles of pairs that follow each other for one block of the map: it then stays in the cache

    def holds_rows(self, width: int) -> bool:
        """Whether a program has all channels of its pairs."""
        return width <= self.block_n


@dataclass(frozen=True)
class EdgeProducts:
    """Which products of a layer take the kernels with epilogues; None: the product of the library and a pass."""

    first_map: ProductSchedule | None = None
    second_map: ProductSchedule | None = None  # where it holds no whole rows: gcng.kernels.edge_wide_rows
    hidden_gradient: ProductSchedule | None = None
    mlp: ProductSchedule | None = None  # gcng.kernels.edge_mlp: both maps in one kernel
    messages: ProductSchedule | None = None  # gcng.kernels.message_products


def available_products(width: int, dtype: torch.dtype, arch: int) -> EdgeProducts:
    """Schedules of every kernel that can run: what tests and benchmarks choose from.

    16-bit operands in rows of whole 16 bytes only: without tensor cores, or without loads that run ahead of them, a
    product of the library is at least as good.
    """
    if dtype not in (torch.float16, torch.bfloat16) or width < 16 or width % 8:
        return EdgeProducts()
    stages = 3 if arch >= 90 else 2
    whole = triton.next_power_of_2(width)
    return EdgeProducts(
        first_map=ProductSchedule(8, stages, 128, 128, 64),
        second_map=_second_map_schedule(whole, stages) if width <= 1024 else None,
        hidden_gradient=ProductSchedule(8, stages, 128, 64, 64),
        mlp=_mlp_schedule(whole) if width <= 256 else None,
        messages=ProductSchedule(8, stages, 64, 128, 64),
    )


def _second_map_schedule(whole: int, stages: int) -> ProductSchedule:
    # Whole rows as long as their sums fit into the registers.
    if whole > 256:
        return ProductSchedule(8, stages, 128, 128, 64)
    return ProductSchedule(8, stages, 64 if whole > 128 else 128, whole, 32)


def _mlp_schedule(whole: int) -> ProductSchedule:
    # More pairs at 256 channels spill: the sums of whole rows alone take half of the registers.
    return ProductSchedule(8, 2, 64, 32) if whole > 128 else ProductSchedule(8, 2, 128, 64)


def edge_products(width: int, dtype: torch.dtype, arch: int) -> EdgeProducts:
    """The kernels that ship: both maps in one kernel for up to 128 channels, on Hopper and later.

    Nothing here is timed on a GPU. The choice follows a count of instructions and bytes: a narrow hidden layer costs
    more to write and read than to multiply, and rounds alike in both forms. Elsewhere the count sees no clear winner,
    and the product of the library with its pass is the form that is known to be fast.
    """
    if arch < 90 or width > 128:
        return EdgeProducts()
    return EdgeProducts(mlp=available_products(width, dtype, arch).mlp)


@triton.jit
def own_tile(rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Block of rows and block of channels of a program, GROUP blocks of rows beside each other."""
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program, down = tl.program_id(0), tl.cdiv(rows, BLOCK_M)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def multiply(
    a_ptr, row, map_ptr, unit, INNER: tl.constexpr, STRIDE_UNIT: tl.constexpr, STRIDE_INNER: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Rows of a (B, INNER) by a map: sum_k a[row, k] map[unit, k], (rows, units). row, unit: int64, within range."""
    total = tl.zeros((row.shape[0], unit.shape[0]), TYPE)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row[:, None] * INNER + inner[None, :]
    map_ptrs = map_ptr + unit[None, :] * STRIDE_UNIT + inner[:, None].to(tl.int64) * STRIDE_INNER
    for start in range(0, INNER, BLOCK_K):
        if INNER % BLOCK_K == 0:
            a = tl.load(a_ptrs)
            b = tl.load(map_ptrs)
        else:
            a = tl.load(a_ptrs, mask=inner[None, :] < INNER - start, other=0.0)
            b = tl.load(map_ptrs, mask=inner[:, None] < INNER - start, other=0.0)
        total = dot(a, b, total, PRECISION)
        a_ptrs += BLOCK_K
        map_ptrs += BLOCK_K * STRIDE_INNER
    return total


@triton.jit
def finish_map(
    y, mean, rstd, x_ptr, row_sums_ptr, shift_ptr, w2_ptr, stash_ptr, place, stored, channel, packed, upper,
    TYPE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """w2 from the second product of (13) y (M, channels), any block of the channels; also to w2_ptr and stash_ptr.

    w2_ptr: (R S, D) or None. stash_ptr: (P, D) or None. packed, upper: of the pairs, int64 and bool.
    """
    within = (channel < WIDTH)[None, :]
    y = (y - mean[:, None] * load_node(row_sums_ptr, 0, channel, WIDTH, TYPE)[None, :]) * rstd[:, None]
    y += load_node(shift_ptr, 0, channel, WIDTH, TYPE)[None, :] + load_rows(x_ptr, place, channel, stored, WIDTH, TYPE)
    if w2_ptr is not None:
        store(w2_ptr + place[:, None] * WIDTH + channel[None, :], y, stored[:, None] & within)
    if stash_ptr is not None:
        store(stash_ptr + packed[:, None] * WIDTH + channel[None, :], y, upper[:, None] & within)
    return y


@triton.jit
def finish_edges(
    y, mean, rstd, x_ptr, row_sums_ptr, shift_ptr, ln_weight_ptr, ln_bias_ptr, w2_ptr, stash_ptr, out_ptr,
    place, stored, channel, n, r0, c0, columns,
    PACKED: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What follows the second product of (13), on whole rows y (M, channels): see edge_epilogue_kernel.

    w2_ptr: (R S, D) or None. stash_ptr: (P, D) or None. out_ptr: (R S, D), or (P, D) where PACKED.
    """
    i = place // columns
    row, column = r0 + i, c0 + place - i * columns
    packed = packed_place(row, column, n)
    within, upper = (channel < WIDTH)[None, :], stored & (column >= row)
    y = finish_map(
        y, mean, rstd, x_ptr, row_sums_ptr, shift_ptr, w2_ptr, stash_ptr, place, stored, channel, packed, upper,
        TYPE, WIDTH,
    )  # fmt: skip
    normalized, _ = normalize(tl.where(within, gelu(y, EXACT), 0.0), channel, WIDTH)
    gain = load_node(ln_weight_ptr, 0, channel, WIDTH, TYPE)[None, :]
    value = normalized * gain + load_node(ln_bias_ptr, 0, channel, WIDTH, TYPE)[None, :]
    if PACKED:
        store(out_ptr + packed[:, None] * WIDTH + channel[None, :], value, upper[:, None] & within)
    else:
        store(out_ptr + place[:, None] * WIDTH + channel[None, :], value, stored[:, None] & within)
