"""Compiled top-k: every bit of the torch path, for any tile, any ties, any exclusions and any number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gcng.functional as F
from gcng.ops import native, nearest
from tests.run_case import equal_bits

pytestmark = pytest.mark.skipif(native.cpu_status().path is None, reason=f"no C++ kernels: {native.cpu_status().cause}")

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = (torch.float32, torch.float64)


def merge_all(merge, scores: Tensor, cuts: list[int], k: int, **left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of (Q, R) scores, merged tile by tile at the given cuts."""
    values = torch.full((scores.shape[0], k), -math.inf, dtype=scores.dtype)
    indices = torch.full((scores.shape[0], k), -1)
    labels, column_labels = left_out["labels"], left_out["column_labels"]
    for first, last in zip(cuts, cuts[1:], strict=False):
        tile_labels = None if labels is None else column_labels[first:last]
        tile = scores[:, first:last].clone()
        merge(tile, first, left_out["self_index"], labels, tile_labels, values, indices)
    return values, indices


def draw_scores(draw: np.random.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Scores with many ties, and sometimes NaN, infinities and both zeros."""
    scores = draw.integers(-draw.integers(1, 40), 40, (rows, columns)) / 16.0
    if draw.random() < 0.2:
        scores = draw.standard_normal((rows, columns))
    for value in (math.nan, -math.inf, math.inf, -0.0):
        if draw.random() < 0.25:
            scores[draw.random((rows, columns)) < draw.choice([0.02, 0.3, 1.0], p=[0.6, 0.3, 0.1])] = value
    return torch.from_numpy(scores).to(dtype)


def check_tiles(seed: int) -> None:
    """One random matrix in random tiles: compiled equals torch, and one tile equals several."""
    draw = np.random.default_rng(seed)
    rows, columns, k = int(draw.integers(0, 9)), int(draw.integers(0, 90)), int(draw.choice([1, 2, 3, 7, 16, 50]))
    scores = draw_scores(draw, rows, columns, DTYPES[seed % 2])
    with_self, with_labels = draw.random(2) < 0.5
    left_out = {
        "self_index": torch.from_numpy(draw.integers(-1, columns + 1, rows)) if with_self else None,
        "labels": torch.from_numpy(draw.integers(0, 4, rows)) if with_labels else None,
        "column_labels": torch.from_numpy(draw.integers(0, 4, columns)) if with_labels else None,
    }
    inner = np.sort(draw.integers(0, columns + 1, int(draw.integers(0, 4))))
    cuts = sorted({0, *inner.tolist(), columns})
    compiled = merge_all(native.cpu().topk_merge, scores, cuts, k, **left_out)
    blocked = merge_all(nearest._merge_tile, scores, cuts, k, **left_out)
    whole = merge_all(native.cpu().topk_merge, scores, [0, columns], k, **left_out)
    for ours, theirs, again in zip(compiled, blocked, whole, strict=True):
        assert equal_bits(ours, theirs)
        assert equal_bits(ours, again)


@settings(max_examples=3000)
@given(seed=SEEDS)
def test_every_tile_has_the_bits_of_torch(seed):
    check_tiles(seed)


@settings(max_examples=150)
@given(seed=SEEDS)
def test_the_public_functions_have_the_bits_of_the_torch_path(seed):
    draw = np.random.default_rng(seed)
    n, r, d = draw.integers(1, 40, 3).tolist()
    k, dtype = int(draw.integers(1, 30)), [torch.float32, torch.float64, torch.float16, torch.bfloat16][seed % 4]
    x = torch.from_numpy(draw.integers(-2, 3, (n, d)) / 4.0).to(dtype)
    ref = torch.from_numpy(draw.standard_normal((r, d))).to(dtype)
    labels, ref_labels = torch.from_numpy(draw.integers(0, 5, n)), torch.from_numpy(draw.integers(0, 5, r))
    calls = [
        lambda: F.knn(x, k=k),
        lambda: F.knn(x, ref, k),
        lambda: F.correlation_topk(x, k),
        lambda: F.correlation_topk(x, k, labels=labels),
        lambda: F.correlation_topk(x, k, labels=labels, ref=ref, ref_labels=ref_labels),
    ]
    for call in calls:
        ours = call()
        with native.disabled():
            theirs = call()
        assert all(equal_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 10, 300, 5000])
def test_sizes_above_every_block_on_any_number_of_threads(k, dtype):
    """More rows and columns than a block of rows and a tile; k above a tile and above all columns."""
    generator = torch.Generator().manual_seed(k)
    rows, columns = 137, 2500
    assert rows * columns > 16 * 2**14
    scores = torch.randint(-3000, 3000, (rows, columns), generator=generator).to(dtype) / 64
    left_out = {
        "self_index": torch.arange(rows),
        "labels": torch.randint(0, 9, (rows,), generator=generator),
        "column_labels": torch.randint(0, 9, (columns,), generator=generator),
    }
    expected = merge_all(nearest._merge_tile, scores, [0, 2048, columns], k, **left_out)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            for _ in range(5):
                got = merge_all(native.cpu().topk_merge, scores, [0, 2048, columns], k, **left_out)
                assert all(equal_bits(a, b) for a, b in zip(expected, got, strict=True)), num_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "all NaN", "all -inf"])
def test_orders_that_are_worst_for_the_buffer(order):
    columns = torch.arange(4000.0)
    row = {
        "rising": columns,
        "falling": -columns,
        "equal": torch.zeros(4000),
        "all NaN": torch.full((4000,), math.nan),
        "all -inf": torch.full((4000,), -math.inf),
    }[order]
    scores = row.expand(3, -1).contiguous()
    none = {"self_index": None, "labels": None, "column_labels": None}
    for k in (1, 17, 100):
        ours = merge_all(native.cpu().topk_merge, scores, [0, 1000, 4000], k, **none)
        theirs = merge_all(nearest._merge_tile, scores, [0, 1000, 4000], k, **none)
        assert all(equal_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_labels_that_are_not_contiguous():
    x = torch.randn(12, 5)
    labels = (torch.arange(24) % 6)[::2]
    assert not labels.is_contiguous()
    ours = F.correlation_topk(x, 3, labels=labels)
    assert all(equal_bits(a, b) for a, b in zip(ours, F.correlation_topk(x, 3, labels=labels.clone()), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 3, dtype=torch.float64)}, "values has the wrong dtype"),
        ({"values": torch.zeros(3, 2).T}, "values is not contiguous"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int64)}, "indices has size 4 in dimension 1; expected 3"),
        ({"scores": torch.zeros(2, 5, dtype=torch.float16)}, "scores must be float32 or float64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels and column_labels come together"),
        ({"self_index": torch.zeros(2, 1, dtype=torch.int64)}, "self_index has 2 dimensions; expected 1"),
    ],
)
def test_a_wrong_tensor_is_an_error_and_not_a_wild_pointer(change, message):
    arguments = {
        "scores": torch.zeros(2, 5),
        "first_column": 0,
        "self_index": None,
        "labels": None,
        "column_labels": None,
        "values": torch.zeros(2, 3),
        "indices": torch.zeros(2, 3, dtype=torch.int64),
    }
    with pytest.raises(RuntimeError, match=message):
        native.cpu().topk_merge(**{**arguments, **change})
