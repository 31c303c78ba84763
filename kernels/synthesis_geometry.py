"""Distances of anchors and negatives (15), and the two numbers by which a pair's gate is multiplied and added to.

Owns the geometry of a block of pairs in GPU form (:class:`Block`, :class:`Geometry`). Distances to positives and to
negatives are summed in one order, so that equal vectors are at equal distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.launch import CompilationCase, Schedule, launch, unspecialized

DISTANCE_OFFSET = 1e-6  # (15): added to every channel before the norm
PER_BLOCK = unspecialized(
    ("N", "A", "B", "M", "first_anchor", "first_negative", "stride_weights", "channel_blocks", "sample_blocks",
     "per_span"),
    ("starts_ptr", "reach_ptr", "positive_ptr", "rank_ptr", "weights_ptr", "distance_ptr", "near_ptr", "ratio_ptr",
     "weight_ptr", "offset_ptr", "slope_ptr", "dots_ptr", "squares_ptr", "grad_dots_ptr", "grad_squares_ptr",
     "plain_ptr", "gated_ptr", "grad_distance_ptr", "grad_reach_ptr"),
)  # fmt: skip


class Block(NamedTuple):
    """A block of A anchors against m whole classes, which have B samples: rows and columns of a class-major batch."""

    z: Tensor  # (N, D) contiguous, float32 or float64
    starts: Tensor  # (M + 1,) int64 first sample of every class, then N
    anchors: slice
    negatives: slice
    classes: slice
    most: int  # samples of the largest of these classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(A, m, B)."""
        return tuple(part.stop - part.start for part in (self.anchors, self.classes, self.negatives))

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors (A, D), negatives (B, D), and the starts (m + 1,) of their classes in the whole batch."""
        return self.z[self.anchors], self.z[self.negatives], self.starts[self.classes.start : self.classes.stop + 1]


class Geometry(NamedTuple):
    """What a synthetic negative takes of each anchor and negative, (A, B) contiguous; near is bool."""

    distance: Tensor
    near: Tensor
    ratio: Tensor
    weight: Tensor
    offset: Tensor
    slope: Tensor


@dataclass(frozen=True)
class DistanceTile(Schedule):
    """Anchors, negatives, and channels of a step."""

    block_a: int = 4
    block_b: int = 8
    block_d: int = 64


def distance_tile(width: int) -> DistanceTile:
    """By D alone, so that the distances to positives and to negatives are summed in one order."""
    return DistanceTile(4, 2, 4, 8, min(64, max(16, triton.next_power_of_2(width))))


@triton.jit
def root(x):
    """Square root, rounded to nearest; triton's own is an approximation for float32."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def quotient(x, y):
    """x / y, rounded to nearest; triton's own is an approximation for float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def _distances(z_ptr, rows, partners, WIDTH: tl.constexpr, OFFSET: tl.constexpr, BLOCK_D: tl.constexpr):
    """|z[row] - z[partner] + OFFSET| (15), (BLOCK_A, BLOCK_B); rows (BLOCK_A,), partners (BLOCK_A, BLOCK_B) int64."""
    total = tl.zeros((partners.shape[0], partners.shape[1], BLOCK_D), z_ptr.dtype.element_ty)
    for first in range(0, WIDTH, BLOCK_D):
        channels = (first + tl.arange(0, BLOCK_D).to(tl.int64))[None, None, :]
        a = tl.load(z_ptr + rows[:, None, None] * WIDTH + channels, mask=channels < WIDTH, other=0.0)
        n = tl.load(z_ptr + partners[:, :, None] * WIDTH + channels, mask=channels < WIDTH, other=0.0)
        difference = tl.where(channels < WIDTH, a - n + OFFSET, 0.0)
        total += difference * difference
    return root(tl.sum(total, 2))


@triton.jit(**PER_BLOCK)
def positive_distance_kernel(
    z_ptr, positive_ptr, distance_ptr,
    N, WIDTH: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dp of (15), (N,). A program owns BLOCK_A nodes; it computes each distance BLOCK_B times over.

    So it is the tile of pair_geometry_kernel, with the same order of sums: equal vectors are at equal distances.
    Reads two rows of z a node. z: (N, D). positive: (N,) int64.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    stored = rows < N
    rows = tl.minimum(rows, N - 1)
    columns = tl.arange(0, BLOCK_B)
    partners = tl.load(positive_ptr + rows)[:, None] + 0 * columns[None, :]
    distance = _distances(z_ptr, rows, partners, WIDTH, OFFSET, BLOCK_D)
    places = rows[:, None] + 0 * columns[None, :]
    tl.store(distance_ptr + places, distance, mask=stored[:, None] & (columns == 0)[None, :])


@triton.jit(**PER_BLOCK)
def pair_geometry_kernel(
    z_ptr, reach_ptr, positive_ptr, rank_ptr, weights_ptr, kappa_ptr,
    distance_ptr, near_ptr, ratio_ptr, weight_ptr, offset_ptr, slope_ptr,
    A, B, first_anchor, first_negative, stride_weights,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(15)-(17) of every pair: dn; near = dp >= dn; rho = dp / dn or 1; w of (18); w rho; w kappa (1 - rho).

    A program owns BLOCK_A x BLOCK_B pairs. Distances come from differences, channel by channel: products of z would
    lose the digits of close vectors. Reads (BLOCK_A + BLOCK_B) D of z, writes six numbers a pair.
    z: (N, D), the whole batch: the start of a slice can be aligned or not, by which the compiler would choose the order
    of sums. reach, positive, rank: (A,). weights: (K, B), rows apart by their stride. kappa: 0-dim.
    """
    blocks = tl.cdiv(B, BLOCK_B)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    stored = (rows < A)[:, None] & (columns < B)[None, :]
    rows, columns = tl.minimum(rows, A - 1), tl.minimum(columns, B - 1)
    partners = first_negative + columns[None, :] + 0 * rows[:, None]
    distance = _distances(z_ptr, first_anchor + rows, partners, WIDTH, OFFSET, BLOCK_D)
    reach = tl.load(reach_ptr + rows)[:, None] + 0.0 * distance
    # A positive in its own column is at distance dp by definition, whatever the rounding of two norms says.
    own = tl.load(positive_ptr + rows)[:, None] == columns[None, :] + first_negative
    near = (reach >= distance) | own
    divisor = tl.where(near, 1.0, distance)
    ratio = tl.where(near, 1.0, quotient(reach, divisor))
    # 1 - rho: where the distances nearly tie, their difference is exact, and that from a rounded rho is not.
    rest = tl.where(near, 0.0, quotient(distance - reach, divisor))
    rank = tl.load(rank_ptr + rows)[:, None]
    weight = tl.load(weights_ptr + rank * stride_weights + columns[None, :])
    place = rows[:, None] * B + columns[None, :]
    tl.store(distance_ptr + place, distance, mask=stored)
    tl.store(near_ptr + place, near.to(tl.uint8), mask=stored)
    tl.store(ratio_ptr + place, ratio, mask=stored)
    tl.store(weight_ptr + place, weight, mask=stored)
    tl.store(offset_ptr + place, weight * ratio, mask=stored)
    tl.store(slope_ptr + place, weight * tl.load(kappa_ptr) * rest, mask=stored)


def positive_distance(z: Tensor, positive: Tensor) -> Tensor:
    """dp of (15), (N,) in the dtype of z (N, D) contiguous, given the positives (N,) int64."""
    n, width = z.shape
    distance = z.new_empty((n,))
    tile = distance_tile(width)
    launch(
        positive_distance_kernel, (triton.cdiv(n, tile.block_a),), z, positive, distance, n,
        schedule=tile, WIDTH=width, OFFSET=DISTANCE_OFFSET,
        BLOCK_A=tile.block_a, BLOCK_B=tile.block_b, BLOCK_D=tile.block_d,
    )  # fmt: skip
    return distance


def pair_geometry(
    block: Block, reach: Tensor, positive: Tensor, rank: Tensor, weights: Tensor, kappa: Tensor
) -> Geometry:
    """(15)-(17) of every pair of a block.

    reach: (N,), of :func:`positive_distance`. positive, rank: (N,) int64. weights: (K, N) of (18). kappa: 0-dim.
    All floating tensors in the dtype of z. Memory: the result.
    """
    z, rows, (a, _, b), width = block.z, block.anchors, block.shape, block.z.shape[1]
    numbers = z.new_empty((5, a, b))
    near = torch.empty((a, b), dtype=torch.bool, device=z.device)
    out = Geometry(numbers[0], near, *numbers[1:].unbind())
    tile = distance_tile(width)
    part = weights[:, block.negatives]
    launch(
        pair_geometry_kernel, (triton.cdiv(a, tile.block_a) * triton.cdiv(b, tile.block_b),),
        z, reach[rows], positive[rows], rank[rows], part, kappa,
        *out._replace(near=near.view(torch.uint8)), a, b, rows.start, block.negatives.start, part.stride(0),
        schedule=tile, WIDTH=width, OFFSET=DISTANCE_OFFSET,
        BLOCK_A=tile.block_a, BLOCK_B=tile.block_b, BLOCK_D=tile.block_d,
    )  # fmt: skip
    return out


def meta_block(dtype: torch.dtype, width: int, samples: int) -> tuple[Block, Geometry]:
    """64 anchors against 512 classes of ``samples``, on meta tensors: what is compiled ahead of time."""
    n = 512 * samples
    z = torch.empty((n, width), dtype=dtype, device="meta")
    starts = torch.empty((513,), dtype=torch.int64, device="meta")
    block = Block(z, starts, slice(0, 64), slice(0, n), slice(0, 512), samples)
    index = torch.empty((n,), dtype=torch.int64, device="meta")
    weights = torch.empty((samples, n), dtype=dtype, device="meta")
    reach = positive_distance(z, index)
    return block, pair_geometry(block, reach, index, index, weights, torch.empty((), dtype=dtype, device="meta"))


# Dtype of the gates, dtype of z, D, samples of a class: what the published settings use, and one block of every kind.
KINDS = (
    (torch.float32, torch.float32, 512, 2),
    (torch.bfloat16, torch.float32, 384, 3),
    (torch.float16, torch.float32, 512, 2),
    (torch.float64, torch.float64, 100, 5),
)


def compilation_cases() -> Iterator[CompilationCase]:
    """Both dtypes of z, every width."""
    for wide, width in dict.fromkeys((wide, width) for _, wide, width, _ in KINDS):
        name = f"{wide}, D {width}".removeprefix("torch.")
        yield CompilationCase(name, lambda wide=wide, width=width: meta_block(wide, width, 2))
