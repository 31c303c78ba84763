"""Exact nearest rows by cosine, tile by tile: the loop behind ``knn`` and ``correlation_topk``.

Owns what makes a ranking reproducible. Unit rows are rounded to fixed point (multiples of 2^-26), so that
every product and every partial sum of an inner product is a multiple of 2^-52 below 2 and float64 adds them
without any rounding. A similarity therefore depends on its two rows alone: not on tiles, threads or the
rows around them, and equal rows tie exactly. The rounding costs about 1e-8, less than a float32 product
would; float64 rows carry a second fixed-point part.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from gcng.ops import native
from gcng.ops.allocation import tried_twice
from gcng.ops.blocks import spans
from gcng.ops.registration import compute_dtype
from gcng.ops.triton_path import runs_triton

# Queries and references of a tile: 4 MiB of float64 similarities, and enough rows for the GEMM to be busy.
TILE_QUERIES = 256
TILE_REFERENCES = 2048

native.define(
    "topk_merge(Tensor scores, int first_column, Tensor? self_index, Tensor? labels, Tensor? column_labels, "
    "Tensor(a!) values, Tensor(b!) indices) -> ()"
)


def unit_rows(x: Tensor, *, centered: bool) -> Tensor:
    """Rows scaled to unit length in float64, (R, D), centered first if asked for; no direction gives 0."""
    eps, wide = torch.finfo(x.dtype).eps, x.double()
    peak = wide.abs().amax(-1, keepdim=True)
    # Scaling by the largest entry first keeps the squares of huge and tiny rows inside the range of float64.
    scaled = torch.where(peak == 0, 0.0, wide / peak)
    floor = 0.0
    if centered:
        scaled = scaled - scaled.mean(-1, keepdim=True)
        floor = 8 * eps * math.sqrt(x.shape[-1])  # docs/maths.md S7, max|x| = 1 after scaling
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(norm <= floor, 0.0, scaled / norm)


def _fixed_point(unit: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Split unit rows (R, D) into multiples of powers of two whose inner products float64 sums exactly."""
    high = (unit * 2.0**26).round_().mul_(2.0**-26)
    if dtype != torch.float64:
        return [high]
    # |low| <= 2^-27 sqrt(D), so 53 bits hold every high . low of multiples of 2^-26 and of this grid.
    grid = 2.0 ** (53 - math.ceil(math.log2(unit.shape[-1]) / 2))
    return [high, ((unit - high) * grid).round_().div_(grid)]


def _similarity(queries: list[Tensor], references: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(Q, R) inner products of rows split by :func:`_fixed_point`, rounded once to ``dtype``."""
    products = [a @ b.T for a in queries for b in references]
    total = products.pop()  # the smallest terms first
    for product in reversed(products):
        total = product.add_(total)
    return total.to(dtype)


def _rank(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of every row by falling value, ties by rising index."""
    by_index = indices.argsort(-1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order)[:, :k]


def _best_of_tile(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of every row of a tile, ties by rising column; k is at most their number."""
    if k == similarity.shape[1]:
        columns = torch.arange(k, device=similarity.device).expand(similarity.shape)
        return _rank(similarity, columns, k)
    values, columns = similarity.topk(k + 1, dim=-1)
    last, next_one = values[:, k - 1], values[:, k]
    # topk picks any of several equal values; where the k-th equals the next, only a full sort keeps the
    # lowest.
    tied = ((last == next_one) & (last > -math.inf)) | (last.isnan() & next_one.isnan())
    values, columns = _rank(values[:, :k], columns[:, :k], k)
    if bool(tied.any()):
        full, order = similarity[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], columns[tied] = full[:, :k], order[:, :k]
    return values, columns


def _merge_tile(
    scores: Tensor,
    first_column: int,
    self_index: Tensor | None,
    labels: Tensor | None,
    column_labels: Tensor | None,
    values: Tensor,
    indices: Tensor,
) -> None:
    """Merge scores (Q, R) of columns from ``first_column`` on into the best so far, (Q, k) each, in place."""
    if self_index is not None:
        position = torch.arange(first_column, first_column + scores.shape[1], device=scores.device)
        scores.masked_fill_(self_index[:, None] == position, -math.inf)
    if labels is not None:
        scores.masked_fill_(labels[:, None] == column_labels, -math.inf)
    k = values.shape[1]
    best, column = _best_of_tile(scores, min(k, scores.shape[1]))
    # Places that nothing has taken yet have index -1 and would win a tie against a score of -inf; both end as -1.
    best, column = torch.cat([values, best], 1), torch.cat([indices, column + first_column], 1)
    best, column = _rank(best, column, k)
    values.copy_(best)
    indices.copy_(column.masked_fill_(best == -math.inf, -1))


def nearest_rows(
    query: Tensor,
    reference: Tensor,
    k: int,
    *,
    centered: bool,
    self_index: Tensor | None = None,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of ``reference`` with the largest cosine to every row of ``query``.

    Args:
        query: (Q, D). reference: (R, D), same dtype; both are read tile by tile and never copied whole.
        centered: whether to take the cosine of centered rows, the correlation.
        self_index: (Q,) row of ``reference`` that is the query itself and is left out, or None.
        labels: (Q,) and reference_labels: (R,): rows of the query's class are left out; both or neither.

    Returns:
        values (Q, k) falling, indices (Q, k) int64, ties by lower index; missing places are -inf and -1.
        A NaN in a row makes all its similarities NaN, which rank first, as in ``torch.sort``.

    Memory: the results, one tile, and the rows of a block of queries and a tile of references in float64; on a GPU
    two panels of rows, tried once more with half of them.
    """
    if runs_triton(query):
        from gcng.kernels import nearest

        if nearest.holds(k, query.dtype):
            exclusions = dict(self_index=self_index, labels=labels, reference_labels=reference_labels)
            exclusions = {name: x if x is None else x.long() for name, x in exclusions.items()}
            search = functools.partial(nearest.nearest_rows, query, reference, k, centered=centered, **exclusions)
            return tried_twice(lambda shrink: search(shrink=shrink), query.device)
    dtype = compute_dtype(query.dtype)
    all_values = query.new_full((query.shape[0], k), -math.inf, dtype=dtype)
    all_indices = torch.full((query.shape[0], k), -1, dtype=torch.int64, device=query.device)
    kernels = native.cpu() if query.device.type == "cpu" else None
    merge = kernels.topk_merge if kernels is not None else _merge_tile
    if labels is not None:
        labels, reference_labels = labels.contiguous(), reference_labels.contiguous()
    # Unit rows of references serve a block of several tiles of queries: for each tile anew they took half the time.
    for block in spans(query.shape[0], max(TILE_QUERIES, TILE_REFERENCES)):
        units = _fixed_point(unit_rows(query[block], centered=centered), query.dtype)
        for columns in spans(reference.shape[0], TILE_REFERENCES):
            others = _fixed_point(unit_rows(reference[columns], centered=centered), query.dtype)
            for part in spans(units[0].shape[0], TILE_QUERIES):
                rows = slice(block.start + part.start, block.start + part.stop)
                merge(
                    _similarity([unit[part] for unit in units], others, dtype),
                    columns.start,
                    None if self_index is None else self_index[rows],
                    None if labels is None else labels[rows],
                    None if labels is None else reference_labels[columns],
                    all_values[rows],
                    all_indices[rows],
                )
    return all_values, all_indices
