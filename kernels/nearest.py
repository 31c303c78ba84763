"""Exact nearest rows by cosine with the selection inside the kernel: behind ``knn`` and ``correlation_topk``.

Owns the fixed-point similarities of :mod:`gcng.ops.nearest` in GPU form. Unit rows are multiples of 2^-26, so every
partial sum of an inner product is exact in float64: a similarity depends on its two rows alone, whatever the tiles.
Each similarity, rounded to float32, becomes one 64-bit key with the index of its row behind it; keys are all
different and their order is the ranking, ties by lower index included. The k largest keys are one set, so they are
the same however the references are split over programs and panels. Of the matrix of all similarities only a tile in
registers exists.

Lists of up to ``LARGEST_K`` keys stay in registers; a longer list, or float64 rows, whose similarities do not fit a
key, belong to the panels of :mod:`gcng.ops.nearest` (a matrix product and ``torch.topk`` with the same order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import dot
from gcng.kernels.correlation import RowSchedule, load_block
from gcng.kernels.launch import CompilationCase, Schedule, launch

LARGEST_K = 512
PANEL_ELEMENTS = 2**24  # numbers of a panel of fixed-point rows: 64 MiB
PROGRAMS = 512  # enough for every multiprocessor of the largest GPU to hold several
MISSING = -(2**63)  # below every key; its 2^32 successors stand for empty places of a list
_MISSING = tl.constexpr(MISSING)
_LARGEST = tl.constexpr(2**63 - 1)


@dataclass(frozen=True)
class NearestSchedule(Schedule):
    """Tiles of the search: queries, references, channels of a step, places of a list, and shares of the references."""

    block_i: int = 64
    block_j: int = 64
    block_d: int = 32
    block_k: int = 16
    splits: int = 1

    @staticmethod
    def for_shape(num_queries: int, num_references: int, k: int) -> NearestSchedule:
        """By the sizes alone. A list takes 2 registers a place: queries of a program fall as k grows.

        Not timed on a GPU; nothing spills in the product loop (tests/test_triton_compiles.py).
        """
        block_k = max(16, triton.next_power_of_2(k))
        block_i = max(16, min(64, 8192 // block_k))
        wanted = triton.cdiv(PROGRAMS, max(1, triton.cdiv(num_queries, block_i)))
        splits = max(1, min(wanted, num_references // 1024))
        return NearestSchedule(8 if block_k > 128 else 4, 2, block_i, 64, 32, block_k, splits)

    @property
    def tiles(self) -> dict[str, int]:
        """The constexpr parameters of the kernel."""
        return {"BLOCK_I": self.block_i, "BLOCK_J": self.block_j, "BLOCK_D": self.block_d, "BLOCK_K": self.block_k}


@triton.jit
def fixed_point_kernel(
    x_ptr,  # (N, D), any strides
    fixed_ptr,  # (N, D) int32
    spoiled_ptr,  # (N,) int8: rows with a NaN or an infinity
    N, stride_n, stride_d,
    CENTERED: tl.constexpr, FLOOR: tl.constexpr, WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of unit length in multiples of 2^-26, ties to even; 0 where the norm is at most FLOOR (maths.md S7).

    A program owns BLOCK_I rows. Everything is float64, and rows are first divided by their largest entry, so that
    neither huge nor tiny ones leave its range. Bytes: reads x, writes 4 bytes a number.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    peak = tl.zeros((BLOCK_I,), tl.float64)
    total = tl.zeros((BLOCK_I,), tl.float64)
    spoiled = tl.zeros((BLOCK_I,), tl.int32)
    for first in range(0, WIDTH, BLOCK_D):
        x, _, _ = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        magnitude = tl.abs(x.to(tl.float32))
        peak = tl.maximum(peak, tl.max(magnitude, 1).to(tl.float64))
        spoiled = tl.maximum(spoiled, tl.max((~(magnitude < float("inf"))).to(tl.int32), 1))
    tl.store(spoiled_ptr + rows, spoiled.to(tl.int8), mask=rows < N)
    # Nothing that a spoiled row computes is ever read.
    peak = tl.where((peak > 0) & (spoiled == 0), peak, 1.0)
    if CENTERED:
        for first in range(0, WIDTH, BLOCK_D):
            x, _, _ = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
            total += tl.sum(x.to(tl.float32).to(tl.float64) / peak[:, None], 1)
    mean = total / WIDTH
    squares = tl.zeros((BLOCK_I,), tl.float64)
    for first in range(0, WIDTH, BLOCK_D):
        x, inside, _ = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        scaled = tl.where(inside, x.to(tl.float32).to(tl.float64) / peak[:, None] - mean[:, None], 0.0)
        squares += tl.sum(scaled * scaled, 1)
    norm = tl.sqrt(squares)
    directed = (norm > FLOOR) & (spoiled == 0)
    norm = tl.where(directed, norm, 1.0)
    for first in range(0, WIDTH, BLOCK_D):
        x, inside, channels = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        scaled = x.to(tl.float32).to(tl.float64) / peak[:, None] - mean[:, None]
        unit = tl.where(directed[:, None], scaled / norm[:, None], 0.0)
        # The sum with 1.5 2^52 has no room for a fraction: the machine rounds it to the nearest even integer.
        fixed = (unit * 67108864.0 + 6755399441055744.0) - 6755399441055744.0
        tl.store(fixed_ptr + rows[:, None] * WIDTH + channels[None, :], fixed.to(tl.int32), mask=inside)


@triton.jit
def _keys(similarity, indices):
    """One int64 for each similarity (float32, no NaN) and index: larger similarity first, then lower index."""
    # -0 and 0 are one value; without it, negative floats would rise as their bits fall.
    bits = tl.where(similarity == 0, 0.0, similarity).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - indices)


@triton.jit
def nearest_kernel(
    query_ptr,  # (Q, D) int32
    reference_ptr,  # (R, D) int32
    spoiled_query_ptr, spoiled_reference_ptr,  # (Q,), (R,) int8
    self_index_ptr,  # (Q,) int64, or None
    labels_ptr, reference_labels_ptr,  # (Q,), (R,) int64, or None
    best_ptr,  # (Q, S, K) int64
    Q, R, first_reference, K, share,
    HAS_SELF: tl.constexpr, HAS_LABELS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The K largest keys of every query, over one share of the references and the keys found before.

    A program owns the lists of BLOCK_I queries for one share. Of every tile it takes the largest key of each query
    in turn, in place of the smallest of its list, until no query finds one that is large enough. Bytes: reads the
    queries once for each tile of references, the references once for each block of queries, and the lists.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    places = tl.arange(0, BLOCK_K)
    listed = (rows < Q)[:, None] & (places < K)[None, :]
    best_ptrs = best_ptr + (rows * tl.num_programs(1) + tl.program_id(1))[:, None] * K + places[None, :]
    # Places beyond K are never the smallest.
    best = tl.load(best_ptrs, mask=listed, other=_LARGEST)
    start = tl.program_id(1) * share
    for first in range(start, min(start + share, R), BLOCK_J):
        columns = first + tl.arange(0, BLOCK_J).to(tl.int64)
        product = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)
        for channel in range(0, WIDTH, BLOCK_D):
            queries, _, _ = load_block(query_ptr, WIDTH, 1, rows, channel, Q, WIDTH, BLOCK_D)
            channels = channel + tl.arange(0, BLOCK_D).to(tl.int64)
            inside = (channels < WIDTH)[:, None] & (columns < R)[None, :]
            references = tl.load(
                reference_ptr + columns[None, :] * WIDTH + channels[:, None], mask=inside, other=0
            )  # (BLOCK_D, BLOCK_J)
            product = dot(queries.to(tl.float64), references.to(tl.float64), product, "ieee")
        keys = _keys((product * 2.220446049250313e-16).to(tl.float32), (first_reference + columns)[None, :])
        spoiled = (
            tl.load(spoiled_query_ptr + rows, mask=rows < Q, other=0)[:, None]
            | (tl.load(spoiled_reference_ptr + columns, mask=columns < R, other=0)[None, :])
        )
        # The bits of a NaN above all numbers: it ranks first, as in torch.sort.
        keys = tl.where(spoiled != 0, (keys & 0xFFFFFFFF) | 0x7FFFFFFF00000000, keys)
        left_out = (rows >= Q)[:, None] | (columns >= R)[None, :]
        if HAS_SELF:
            own = tl.load(self_index_ptr + rows, mask=rows < Q, other=-1)
            left_out = left_out | (own[:, None] == (first_reference + columns)[None, :])
        if HAS_LABELS:
            row_labels = tl.load(labels_ptr + rows, mask=rows < Q, other=0)
            column_labels = tl.load(reference_labels_ptr + columns, mask=columns < R, other=0)
            left_out = left_out | (row_labels[:, None] == column_labels[None, :])
        keys = tl.where(left_out, _MISSING, keys)
        pending = 1
        while pending > 0:
            largest, smallest = tl.max(keys, 1)[:, None], tl.min(best, 1)[:, None]
            enters = largest > smallest
            best = tl.where(enters & (best == smallest), largest, best)
            keys = tl.where(enters & (keys == largest), _MISSING, keys)
            pending = tl.max(enters.to(tl.int32))
    tl.store(best_ptrs, best, mask=listed)


def _fixed_point(x: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """(N, D) int32 multiples of 2^-26 of the unit rows of x, and (N,) int8 marks of rows that are not finite."""
    num_rows, width = x.shape
    fixed = torch.empty((num_rows, width), dtype=torch.int32, device=x.device)
    spoiled = torch.empty((num_rows,), dtype=torch.int8, device=x.device)
    schedule = RowSchedule.for_width(width)
    floor = 8 * torch.finfo(x.dtype).eps * math.sqrt(width) if centered else 0.0
    launch(
        fixed_point_kernel, (triton.cdiv(num_rows, schedule.block_i),), x, fixed, spoiled, num_rows, *x.stride(),
        schedule=schedule, CENTERED=centered, FLOOR=floor, WIDTH=width, **schedule.tiles,
    )  # fmt: skip
    return fixed, spoiled


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities float32 and indices int64 of keys; -inf and -1 for empty places."""
    ordered, low = keys >> 32, keys & 0xFFFFFFFF
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
    missing = ordered == MISSING >> 32
    values = bits.view(torch.float32).masked_fill(missing, -math.inf)
    return values, (0xFFFFFFFF - low).masked_fill_(missing, -1)


def holds(k: int, dtype: torch.dtype) -> bool:
    """Whether :func:`nearest_rows` takes lists of k and rows of ``dtype``."""
    return k <= LARGEST_K and dtype in (torch.float16, torch.bfloat16, torch.float32)


def nearest_rows(
    query: Tensor,
    reference: Tensor,
    k: int,
    *,
    centered: bool,
    self_index: Tensor | None = None,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    shrink: int = 1,
) -> tuple[Tensor, Tensor]:
    """The k rows of ``reference`` with the largest cosine to every row of ``query``.

    Args:
        query: (Q, D), reference: (R, D), float16, bfloat16 or float32, one dtype, any strides; R below 2^32.
        k: 1 to ``LARGEST_K``.
        centered: whether to take the cosine of centered rows, the correlation.
        self_index: (Q,) int64 row of ``reference`` that is the query itself and is left out, or None.
        labels: (Q,) and reference_labels: (R,), int64: rows of the query's class are left out; both or neither.
        shrink: by how much smaller the panels are than they should be, where memory is short.

    Returns:
        values (Q, k) float32 falling, indices (Q, k) int64, ties by lower index; missing places are -inf and -1.
        A NaN in a row makes all its similarities NaN, which rank first, as in ``torch.sort``.

    Raises:
        ValueError: what :func:`holds` refuses.

    Memory: the results, the lists of a panel of queries (k keys for each share), two panels of fixed-point rows.
    """
    if not holds(k, query.dtype):
        raise ValueError(f"nearest_rows: k is {k} and dtype {query.dtype}; take the blocked path of gcng.ops.nearest")
    (num_queries, width), num_references = query.shape, reference.shape[0]
    values = torch.empty((num_queries, k), dtype=torch.float32, device=query.device)
    indices = torch.empty((num_queries, k), dtype=torch.int64, device=query.device)
    panel = max(1, PANEL_ELEMENTS // width // shrink)
    empty = MISSING + torch.arange(k, device=query.device)  # all different, so that one is replaced at a time
    for first_query in range(0, num_queries, panel):
        rows = slice(first_query, min(first_query + panel, num_queries))
        count = rows.stop - rows.start
        queries = _fixed_point(query[rows], centered)
        schedule = NearestSchedule.for_shape(count, min(panel, num_references), k)
        best = empty.expand(count, schedule.splits, k).contiguous()
        for first in range(0, num_references, panel):
            columns = slice(first, min(first + panel, num_references))
            references = _fixed_point(reference[columns], centered)
            size = columns.stop - columns.start
            share = triton.cdiv(triton.cdiv(size, schedule.splits), schedule.block_j) * schedule.block_j
            launch(
                nearest_kernel, (triton.cdiv(count, schedule.block_i), schedule.splits),
                queries[0], references[0], queries[1], references[1],
                None if self_index is None else self_index[rows].contiguous(),
                None if labels is None else labels[rows].contiguous(),
                None if reference_labels is None else reference_labels[columns].contiguous(),
                best, count, size, first, k, share,
                schedule=schedule, HAS_SELF=self_index is not None, HAS_LABELS=labels is not None, WIDTH=width,
                **schedule.tiles,
            )  # fmt: skip
        values[rows], indices[rows] = _decode(best.flatten(1).topk(k, dim=1).values)
    return values, indices


def _compilation_call(dtype: torch.dtype, k: int, *, centered: bool) -> None:
    x = torch.empty((4096, 384), dtype=dtype, device="meta")
    labels = torch.empty((4096,), dtype=torch.int64, device="meta")
    marks = {"labels": labels, "reference_labels": labels} if centered else {}
    nearest_rows(x, x, k, centered=centered, self_index=labels, **marks)


def compilation_cases() -> list[CompilationCase]:
    """What is compiled ahead of time: short, long and the longest lists."""
    return [
        CompilationCase("float32, k 8", lambda: _compilation_call(torch.float32, 8, centered=False)),
        CompilationCase("bfloat16, k 64", lambda: _compilation_call(torch.bfloat16, 64, centered=True)),
        CompilationCase("float16, k 512", lambda: _compilation_call(torch.float16, 512, centered=True)),
    ]
