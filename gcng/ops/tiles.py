"""Tiles of unordered pairs, and the packed storage of a tensor over all of them.

Nodes are class-major. A tile is a rectangle of rows [r0, r1) and columns [c0, c1) with c0 = r0 (it then starts with
the square of its rows, evaluated as ordered pairs) or c0 >= r1. Every column from r1 on is *mirrored*: its pair is
evaluated once and serves both endpoints. The square costs (R - 1) / (N + 1) more than the triangle and spares every
op a mask.

Packed storage holds the upper triangle row by row, N (N + 1) / 2 vectors: pair (r, c), r <= c, is at
``r N - r (r - 1) / 2 + c - r``. It does not depend on tiles, so that ops with different tiles can share it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcng.ops.registration import compute_dtype


class Tile(NamedTuple):
    """A rectangle of pairs; see the module docstring."""

    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def rows(self) -> slice:
        """Nodes of the rows."""
        return slice(self.r0, self.r1)

    @property
    def columns(self) -> slice:
        """Nodes of the columns."""
        return slice(self.c0, self.c1)

    @property
    def mirror(self) -> int:
        """Offset in the tile of the first mirrored column."""
        return max(self.r1 - self.c0, 0)

    @property
    def mirrored(self) -> slice:
        """Nodes of the mirrored columns."""
        return slice(self.c0 + self.mirror, self.c1)

    @property
    def is_diagonal(self) -> bool:
        """Whether the tile starts with the square of its rows."""
        return self.c0 < self.r1

    @property
    def shape(self) -> tuple[int, int]:
        """(R, S): rows and columns."""
        return self.r1 - self.r0, self.c1 - self.c0


def pair_count(n: int) -> int:
    """Number of unordered pairs of n nodes, self pairs included."""
    return n * (n + 1) // 2


def plan_tiles(
    n: int, pairs_per_tile: int, boundaries: Sequence[int] | None = None, most_rows: int | None = None
) -> list[Tile]:
    """Cover all unordered pairs of ``n`` nodes by tiles of about ``pairs_per_tile`` pairs, in a fixed order.

    Args:
        n: number of nodes. pairs_per_tile: target; a tile never holds less than one row by one column (block).
        boundaries: starts of the blocks that must not be cut (class starts), ending with ``n``; None cuts anywhere.
        most_rows: rows of a tile at most, as far as the blocks allow; None is a sixteenth of the nodes.

    Returns:
        Tiles by rows, then columns; every unordered pair is in exactly one of them.
    """
    cuts = range(n + 1) if boundaries is None else boundaries
    most = max(1, max(2, n // 16) if most_rows is None else most_rows)
    # Rows up to the end of the batch give the fewest tiles and the smallest squares on the diagonal; where that would
    # leave a few rows only, a tile is about four times as wide as high.
    height = max(1, min(math.isqrt(pairs_per_tile) // 4, most))
    width = max(1, pairs_per_tile // height)
    # Columns are cut on one grid for all rows: nearly all tiles then have the same size, and the allocator hands
    # out the same blocks again instead of splitting them a little further with every row.
    grid = [cuts[bisect.bisect_right(cuts, column) - 1] for column in range(width, n, width)]
    grid = sorted({*grid, n} - {0})
    tiles, row = [], 0
    while row < len(cuts) - 1:
        whole = pairs_per_tile // (n - cuts[row])
        to_the_end = whole >= min(4, most)
        wanted = min(whole, most) if to_the_end else height
        end = max(row + 1, bisect.bisect_right(cuts, cuts[row] + wanted) - 1)
        r0, r1, c0 = cuts[row], cuts[end], cuts[row]
        for c1 in [n] if to_the_end else grid[bisect.bisect_left(grid, r1) :]:
            tiles.append(Tile(r0, r1, c0, c1))
            c0 = c1
        row = end
    return tiles


def row_offset(n: int, row: int) -> int:
    """Packed position of the self pair of ``row``."""
    return row * n - row * (row - 1) // 2


def _row_pieces(n: int, tile: Tile):
    """For each row: its index in the tile, the tile columns on or above the diagonal, their packed positions."""
    for i, row in enumerate(range(tile.r0, tile.r1)):
        first = max(tile.c0, row)
        start = row_offset(n, row) - row
        yield i, slice(first - tile.c0, tile.c1 - tile.c0), slice(start + first, start + tile.c1)


def load_tile(
    packed: Tensor, n: int, tile: Tile, *, symmetric: bool = True, out: Tensor | None = None
) -> Tensor:
    """Read a tile (R, S, D) from packed storage (P, D), into ``out`` (R S, D) where it is given.

    Below the diagonal it holds the mirrored values, or zeros where ``symmetric`` is False (gradients: the whole
    gradient of an unordered pair belongs to one of its two evaluations).
    """
    r, s = tile.shape
    out = packed.new_empty((r, s, packed.shape[-1])) if out is None else out.view(r, s, -1)
    for i, columns, positions in _row_pieces(n, tile):
        out[i, columns] = packed[positions]
        if tile.is_diagonal and i > 0:
            out[i, :i] = out[:i, i] if symmetric else 0
    return out


def store_tile(packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
    """Write the pairs on and above the diagonal of a tile (R, S, D) to packed storage."""
    for i, columns, positions in _row_pieces(n, tile):
        packed[positions] = values[i, columns]


def add_tile(packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
    """Add a tile's gradients to packed storage; both orders of a pair in the square are summed."""
    r = tile.shape[0]
    if tile.is_diagonal and r > 1:
        values = torch.cat([_fold(values[:, :r]), values[:, r:]], 1)
    for i, columns, positions in _row_pieces(n, tile):
        packed[positions] += values[i, columns]


def _fold(square: Tensor) -> Tensor:
    """Add what lies below the diagonal of (R, R, D) to the mirrored place above it."""
    below = torch.ones(square.shape[:2], dtype=torch.bool, device=square.device).tril(-1)[..., None]
    return square + torch.where(below, square, torch.zeros_like(square)).transpose(0, 1)


def pair_weights(n: int, like: Tensor) -> Tensor:
    """How often each packed pair occurs among the ordered pairs, (P, 1): 1 on the diagonal, else 2."""
    weights = like.new_full((pair_count(n), 1), 2.0, dtype=compute_dtype(like.dtype))
    row = torch.arange(n, device=like.device)
    # A number that is assigned to an index tensor would be copied to a GPU first, and waited for.
    return weights.index_fill_(0, row * n - row * (row - 1) // 2, 1.0)


def split_mirror(values: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Sum a tile (R, S, ...) over its pairs as rows see them (R, ...) and as mirrored columns do (S - mirror, ...)."""
    return values.sum(1), values[:, tile.mirror :].sum(0)
