"""The cases are what their reasons say, and the same numbers every time."""

from __future__ import annotations

import pytest
import torch

from tests import cases


def test_every_case_has_a_name_of_its_own_and_a_reason():
    for table in (cases.BATCHES, cases.CLASSIFICATIONS, cases.MATRICES):
        assert len({case.name for case in table}) == len(table)
        assert all(case.reason for case in table)
    for values in (cases.BATCH_VALUES, cases.CLASSIFICATION_VALUES, cases.MATRIX_VALUES):
        assert all(values.values())


@pytest.mark.parametrize("batch", cases.BATCHES, ids=lambda batch: batch.name)
def test_labels_have_the_counts_and_the_order_of_the_case(batch):
    labels = batch.labels(5)
    values, counts = labels.unique(return_counts=True)
    assert tuple(counts.tolist()) == batch.counts and len(labels) == batch.size
    assert values.tolist() == [3 + 7 * i for i in range(len(batch.counts))]
    if batch.order == "class_major":
        assert bool((labels.diff() >= 0).all())
    if batch.order == "sample_major":
        first = len(batch.counts)
        assert labels[:first].tolist() == values.tolist()
    if batch.order == "shuffled" and len(batch.counts) > 1:
        assert not torch.equal(labels, cases.class_labels(batch.counts, "class_major"))
        assert not torch.equal(labels, batch.labels(6))


def test_the_patterns_that_users_bring_are_there():
    counts = [batch.counts for batch in cases.BATCHES]
    assert any(len(set(c)) > 2 and 1 in c for c in counts), "ragged with singletons"
    assert any(len(c) == 1 for c in counts), "one class only"
    assert any(set(c) == {1} and len(c) > 2 for c in counts), "all distinct"
    assert {batch.order for batch in cases.BATCHES} == set(cases.ORDERS)
    with pytest.raises(ValueError, match="order 'random' is unknown"):
        cases.class_labels((2, 2), "random")


def test_cases_are_functions_of_the_seed():
    for batch in cases.BATCHES:
        for values in cases.BATCH_VALUES:
            x = cases.embeddings(batch, values, seed=4)
            assert x.shape == (batch.size, batch.width) and x.dtype == torch.float64
            assert torch.equal(x, cases.embeddings(batch, values, seed=4))
            assert bool(x.isfinite().all())
    for case in cases.CLASSIFICATIONS:
        for values in cases.CLASSIFICATION_VALUES:
            first, second = (cases.classification_inputs(case, values, seed=4) for _ in range(2))
            assert all(torch.equal(first[key], second[key]) for key in first)
            assert int((first["target"] == -100).sum()) == case.ignored
    drawn = [cases.normal(20, seed=seed, name=name) for seed in (1, 2) for name in ("q", "k")]
    assert len({tuple(x.tolist()) for x in drawn}) == 4


@pytest.mark.parametrize("values", ["confident", "wrong"])
def test_confident_rows_lead_by_the_margin(values):
    for case in cases.CLASSIFICATIONS:
        given = cases.classification_inputs(case, values, seed=3)
        logits = (given["x"] @ given["weight"].T + given["bias"]).sort(dim=1, descending=True)
        if case.classes == 1:
            continue
        assert bool((logits.values[:, 0] - logits.values[:, 1] >= cases.MARGIN).all()), case.name
        valid = given["target"] != -100
        right = logits.indices[valid, 0] == given["target"][valid]
        assert bool((right if values == "confident" else ~right).all())


def test_confident_receivers_lead_by_the_margin_among_their_negatives():
    batch = cases.BATCHES[0]
    given = cases.attention_inputs(batch, "confident", seed=3)
    scores = torch.einsum("bhd,ahd->hba", given["q"], given["k"]) / given["q"].shape[-1] ** 0.5
    scores[:, given["labels"][:, None] == given["labels"]] = -torch.inf
    best = scores.topk(2, dim=-1).values
    assert bool((best[..., 0] - best[..., 1] >= cases.MARGIN - 1e-9).all())
    large = cases.attention_inputs(batch, "large", seed=3)
    assert (
        float(torch.einsum("bhd,ahd->hba", large["q"], large["k"]).max()) > 88 * large["q"].shape[-1] ** 0.5
    )


def test_values_are_what_they_say():
    batch = cases.BATCHES[0]
    twins = cases.embeddings(batch, "duplicates")
    assert torch.equal(twins[0::2], twins[1::2])
    assert bool((batch.labels()[0::2] != batch.labels()[1::2]).all())
    assert set(cases.embeddings(batch, "one_hot").unique().tolist()) == {0.0, 1.0}
    constant, zero = (cases.embeddings(batch, values) for values in ("constant_row", "zero_row"))
    assert int((constant.std(1) < 1e-12).sum()) == 1 and int((zero.abs().sum(1) == 0).sum()) == 1
    matrix = cases.MATRICES[0]
    assert 0 < cases.matrix(matrix, "subnormal").abs().max() < torch.finfo(torch.float32).tiny
    assert float(cases.matrix(matrix, "offset").mean()) == pytest.approx(1e4, rel=1e-3)
    ties = cases.classification_inputs(cases.CLASSIFICATIONS[0], "ties")
    best = (ties["x"] @ ties["weight"].T + ties["bias"]).topk(2, dim=1)
    paired = best.indices[:, 0] != len(ties["weight"]) - 1  # of an odd number of classes the last is alone
    assert torch.allclose(best.values[paired, 0], best.values[paired, 1], atol=1e-12)
    negative = cases.classification_inputs(cases.CLASSIFICATIONS[0], "saturated_negative")
    assert float((negative["x"] @ negative["weight"].T + negative["bias"]).max()) < -150


def test_unknown_patterns_are_refused():
    for make, case in (
        (cases.embeddings, cases.BATCHES[0]),
        (cases.classification_inputs, cases.CLASSIFICATIONS[0]),
        (cases.matrix, cases.MATRICES[0]),
    ):
        with pytest.raises(ValueError, match="'usual' is unknown"):
            make(case, "usual")


def test_sizes_exceed_the_blocks_they_are_meant_for():
    assert any(case.rows > 3 * 16 and case.rows % 16 for case in cases.MATRICES)
    tails = cases.CLASSIFICATIONS[0]
    for extent, block in ((tails.rows, 16), (tails.width, 16), (tails.classes, 32)):
        assert extent > 3 * block and extent % block
    assert max(case.rows for case in cases.CLASSIFICATIONS) > 128 * 8
    assert any(batch.size > 3 * 16 and batch.size % 16 for batch in cases.BATCHES)
