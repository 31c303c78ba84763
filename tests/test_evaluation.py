"""Retrieval metrics: by hand, against the definition, against pytorch-metric-learning, and under a budget."""

from __future__ import annotations

import math

import pytest
import torch

from gcng.evaluation import RetrievalMetrics, evaluate_retrieval, retrieval
from gcng.ops import nearest
from gcng.reference.retrieval import retrieval_metrics as definition
from tests.op_checks import LargestTensor

PML_METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


def on_circle(*degrees: float) -> torch.Tensor:
    """Embeddings at these angles, so that the order of neighbors can be read off."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def random_case(n: int = 120, classes: int = 14, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of very different sizes, loosely clustered; no ties."""
    labels = (torch.rand(n).square() * classes).long() * 11 - 5
    centers = torch.randn(400, width, dtype=torch.float64)
    return centers[labels % 400] + 1.3 * torch.randn(n, width, dtype=torch.float64), labels


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_by_hand() -> None:
    """Query 0 of class 0 sees, from near to far: 1, 0, 0, 1 (R = 2); query 5 is alone in its class."""
    embeddings = on_circle(0, 10, 21, 33, 50, 180)
    labels = torch.tensor([0, 1, 0, 0, 1, 9])
    scores = evaluate_retrieval(embeddings, labels, k=(1, 2, 3))
    # Neighbors by label: 0: [1 0 0 1 9], 1 (at 10): [0 0 0 1 9], 2 (at 21): [1 0 0 1 9],
    # 3 (at 33): [0 1 1 0 9], 4 (at 50): [0 0 1 0 9]. R = 2, 1, 2, 2, 1.
    assert scores["num_queries"] == 6
    assert scores["num_lone_queries"] == 1
    assert scores["recall_at_1"] == scores["precision_at_1"] == pytest.approx(1 / 5)
    assert scores["recall_at_2"] == pytest.approx(3 / 5)
    assert scores["recall_at_3"] == pytest.approx(4 / 5)
    found = [(0 + 1 / 2) / 2, 0, (0 + 1 / 2) / 2, (1 + 0) / 2, 0]
    assert scores["mean_average_precision_at_r"] == pytest.approx(sum(found) / 5)
    assert scores["r_precision"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 1 / 2 + 0) / 5)


@pytest.mark.parametrize("tiles", [(3, 5), (256, 2048)])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_equals_the_definition(tiles, with_gallery: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "TILE_QUERIES", tiles[0])
    monkeypatch.setattr(nearest, "TILE_REFERENCES", tiles[1])
    query, labels = random_case()
    gallery = random_case(90) if with_gallery else ()
    assert_same(
        evaluate_retrieval(query, labels, *gallery, k=(1, 3, 40)), definition(query, labels, *gallery, k=(1, 3, 40))
    )


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_pytorch_metric_learning(with_gallery: bool, seed: int) -> None:
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    torch.manual_seed(seed)
    query, labels = random_case()
    labels[3] = 7777  # a lone query
    gallery = random_case(90) if with_gallery else ()
    calculator = calculators.AccuracyCalculator(
        include=PML_METRICS,
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
    )
    theirs = calculator.get_accuracy(query, labels, *gallery)
    ours = evaluate_retrieval(query, labels, *gallery)
    assert ours["num_lone_queries"] >= 1
    for name in PML_METRICS:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name


def test_self_is_excluded_by_identity_not_by_position() -> None:
    """Two equal embeddings of one class find each other; of two classes, they are each other's mistake."""
    twins = on_circle(0, 0, 90, 90)
    assert evaluate_retrieval(twins, torch.tensor([0, 0, 1, 1]), k=(1,))["recall_at_1"] == 1.0
    assert evaluate_retrieval(twins, torch.tensor([0, 1, 0, 1]), k=(1,))["recall_at_1"] == 0.0


def test_collapsed_embeddings_rank_by_index() -> None:
    """All equal: every query sees 0, 1, 2, ... without itself, whatever the block."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    scores = evaluate_retrieval(torch.ones(5, 3), labels, k=(1, 2, 3))
    assert scores["recall_at_1"] == pytest.approx(2 / 5)
    assert scores["recall_at_2"] == pytest.approx(2 / 5)
    assert scores["recall_at_3"] == pytest.approx(1.0)
    assert_same(scores, definition(torch.ones(5, 3), labels, k=(1, 2, 3)))


def test_query_equal_to_gallery_counts_in_gallery_mode() -> None:
    x, labels = random_case(30)
    assert evaluate_retrieval(x, labels, x, labels, k=(1,))["recall_at_1"] == 1.0


def test_lone_queries_stay_as_distractors() -> None:
    embeddings, labels = on_circle(0, 20, 5), torch.tensor([0, 0, 1])
    scores = evaluate_retrieval(embeddings, labels, k=(1,))
    assert (scores["recall_at_1"], scores["num_queries"], scores["num_lone_queries"]) == (0.0, 3, 1)
    assert evaluate_retrieval(embeddings[:2], labels[:2], k=(1,))["recall_at_1"] == 1.0


def test_all_lone_or_empty_gives_nan() -> None:
    for n in (0, 1, 4):
        scores = evaluate_retrieval(torch.randn(n, 3), torch.arange(n))
        assert (scores["num_queries"], scores["num_lone_queries"]) == (n, n)
        assert all(math.isnan(scores[name]) for name in PML_METRICS)
    against_nothing = evaluate_retrieval(
        torch.randn(4, 3), torch.arange(4), torch.randn(0, 3), torch.zeros(0, dtype=torch.int64)
    )
    assert against_nothing["num_lone_queries"] == 4
    assert math.isnan(against_nothing["recall_at_1"])


def test_rank_beyond_the_gallery() -> None:
    query, labels = random_case(20, classes=3)
    scores = evaluate_retrieval(query, labels, k=(1, 500))
    assert scores["recall_at_500"] == 1.0


@pytest.mark.parametrize("budget", [1, 4000, "20KB", "1GiB"])
def test_budget_changes_no_digit(budget) -> None:
    query, labels = random_case(150, classes=5)
    assert evaluate_retrieval(query, labels, memory_budget=budget) == evaluate_retrieval(query, labels)


@pytest.mark.raw_memory
def test_budget_bounds_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class of 300 among 600 samples: all neighbor lists are 180,000 entries, one block a tenth of it."""
    monkeypatch.setattr(nearest, "TILE_QUERIES", 16)
    monkeypatch.setattr(nearest, "TILE_REFERENCES", 64)
    monkeypatch.setattr(
        retrieval,
        "nearest_neighbors",
        lambda q, g, k, own: nearest.nearest_rows(q, g, k, centered=False, self_index=own),
    )
    labels = torch.cat([torch.zeros(300), torch.arange(300) // 2 + 1]).long()
    embeddings = torch.randn(600, 8)
    sizes = []
    for budget in (300 * 80 * 60, "1GiB"):
        with LargestTensor() as largest:
            evaluate_retrieval(embeddings, labels, k=(1,), memory_budget=budget)
        sizes.append(largest.elements)
    assert sizes[0] <= 60 * 300
    assert sizes[1] >= 300 * 299


def test_wide_queries_are_copied_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, original = [], retrieval.nearest_neighbors

    def noted(queries, *others):
        copied.append(queries.numel() * 8)
        return original(queries, *others)

    monkeypatch.setattr(retrieval, "nearest_neighbors", noted)
    evaluate_retrieval(torch.randn(600, 512), torch.arange(600) // 2, k=(1,), memory_budget=2**20)
    assert max(copied) <= 2**20 and sum(copied) == 600 * 512 * 8


def test_one_large_class_does_not_lengthen_all_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of small classes ask for few neighbors, when the budget makes blocks at all."""
    asked = []
    search = retrieval.nearest_neighbors

    def record(query, gallery, neighbors, own):
        asked.append((len(query), neighbors))
        return search(query, gallery, neighbors, own)

    monkeypatch.setattr(retrieval, "nearest_neighbors", record)
    labels = torch.cat([torch.zeros(100), torch.arange(200) // 2 + 1]).long()
    evaluate_retrieval(torch.randn(300, 4), labels, k=(1, 2), memory_budget=100 * 80 * 20)
    assert sum(queries for queries, _ in asked) == 300
    assert sum(queries for queries, neighbors in asked if neighbors == 2) >= 150
    assert max(queries * neighbors for queries, neighbors in asked) <= 100 * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_scale(dtype: torch.dtype) -> None:
    """Embeddings need no unit length, and 16-bit ones are ranked in float32."""
    query, labels = random_case(60)
    rounded = query.to(dtype)
    lengths = 2.0 ** torch.randint(-6, 6, (60, 1))
    assert evaluate_retrieval(rounded * lengths.to(dtype), labels) == evaluate_retrieval(rounded, labels)
    assert_same(evaluate_retrieval(rounded, labels), definition(rounded.double(), labels))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_label_dtypes(dtype: torch.dtype) -> None:
    query, labels = random_case(40)
    labels = labels + 5
    assert evaluate_retrieval(query, labels.to(dtype)) == evaluate_retrieval(query, labels)


def test_order_of_samples_does_not_matter() -> None:
    query, labels = random_case()
    order = torch.randperm(len(labels))
    assert_same(evaluate_retrieval(query[order], labels[order]), evaluate_retrieval(query, labels))


def test_streaming_equals_at_once() -> None:
    query, labels = random_case()
    metrics = RetrievalMetrics(k=(1, 5), memory_budget="1MiB")
    for start in range(0, 120, 32):
        batch = query[start : start + 32].clone().requires_grad_()
        metrics.update(batch, labels[start : start + 32].int())
        batch.data.zero_()  # the caller may reuse its buffer
    expected = evaluate_retrieval(query, labels, k=(1, 5))
    assert metrics.compute() == expected
    assert metrics.compute() == expected
    gallery = random_case(50)
    assert metrics.compute(*gallery) == evaluate_retrieval(query, labels, *gallery, k=(1, 5))
    metrics.reset()
    with pytest.raises(RuntimeError, match=r"nothing to evaluate; call update\(embeddings, labels\)"):
        metrics.compute()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "reference"])
def test_non_finite_embeddings_are_refused(value: float, where: str) -> None:
    rows = {"query": torch.randn(5000, 2), "reference": torch.randn(4500, 2)}
    rows[where][4321, 1] = value
    with pytest.raises(ValueError, match=f"{where} has a NaN or an infinity in row 4321"):
        evaluate_retrieval(rows["query"], torch.zeros(5000).int(), rows["reference"], torch.zeros(4500).int())


BAD_INPUT = [
    ({"query": [[1.0]]}, TypeError, "evaluate_retrieval: query must be a torch.Tensor, got list"),
    ({"query": torch.zeros(4)}, ValueError, r"query must be \(N, D\), got shape \(4,\)"),
    ({"query": torch.zeros(4, 2).long()}, TypeError, "query has dtype torch.int64"),
    ({"query_labels": torch.zeros(3).long()}, ValueError, r"query_labels has shape \(3,\); expected \(4,\)"),
    ({"query_labels": torch.zeros(4)}, TypeError, "query_labels has dtype torch.float32"),
    ({"reference": torch.zeros(5, 2)}, ValueError, "reference is given but reference_labels is missing"),
    ({"reference_labels": torch.zeros(5).long()}, ValueError, "reference_labels is given but reference is missing"),
    (
        {"reference": torch.zeros(5, 3), "reference_labels": torch.zeros(5).long()},
        ValueError,
        r"reference has shape \(5, 3\) but query has shape \(4, 2\)",
    ),
    (
        {"reference": torch.zeros(5, 2), "reference_labels": torch.zeros(4).long()},
        ValueError,
        r"reference_labels has shape \(4,\); expected \(5,\)",
    ),
    (
        {"reference": torch.zeros(5, 2).double(), "reference_labels": torch.zeros(5).long()},
        TypeError,
        "query is torch.float32 but reference is torch.float64",
    ),
    ({"k": ()}, ValueError, "k is empty"),
    ({"k": (1, 0)}, ValueError, "k contains 0; every rank must be at least 1"),
    ({"k": (1, 2.0)}, TypeError, "k must be whole numbers such as"),
    ({"k": "12"}, TypeError, "k must be whole numbers such as"),
    ({"memory_budget": "lots"}, ValueError, "memory_budget is 'lots'"),
    ({"memory_budget": 0}, ValueError, "must be positive"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {"query": torch.randn(4, 2), "query_labels": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(error, match=message):
        evaluate_retrieval(**good | change)


def test_bad_input_of_the_collector() -> None:
    with pytest.raises(ValueError, match="k contains -1"):
        RetrievalMetrics(k=(-1,))
    metrics = RetrievalMetrics()
    with pytest.raises(ValueError, match=r"RetrievalMetrics: labels has shape \(2,\); expected \(3,\)"):
        metrics.update(torch.zeros(3, 2), torch.zeros(2).long())
    metrics.update(torch.zeros(3, 2), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"embeddings has shape \(3, 4\) but the first batch has shape \(3, 2\)"):
        metrics.update(torch.zeros(3, 4), torch.zeros(3).long())
