"""What the criterion takes: numbers drawn as documented, labels of any integer dtype, a batch of no samples."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import gcng
from gcng import functional
from tests.test_losses import BATCHES, D, batch_of, make_criterion

MODES = pytest.mark.parametrize("mode", (contextlib.nullcontext, gcng.reference_mode), ids=("ops", "reference"))


@pytest.mark.parametrize("phase", ("metric_terms", "generator_terms"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_mix_is_drawn_by_the_documented_line(dtype: torch.dtype, phase: str) -> None:
    z, y, _ = batch_of(BATCHES["ragged, shuffled"])
    terms = getattr(make_criterion(dtype=dtype), phase)
    drawn, generator = (torch.Generator().manual_seed(11) for _ in range(2))
    mix = torch.rand(4, 3, generator=generator)
    expected = terms(z.to(dtype), y, mix=mix, generator=generator)  # which draws the dropout seed after it
    assert torch.equal(torch.stack(terms(z.to(dtype), y, generator=drawn)), torch.stack(expected))
    assert torch.equal(drawn.get_state(), generator.get_state())


def test_mix_is_float32_under_another_default_dtype() -> None:
    z, y, _ = batch_of(BATCHES["2 x 2"])
    criterion = make_criterion()
    expected = criterion.metric_terms(z, y, generator=torch.Generator().manual_seed(11))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours = criterion.metric_terms(z, y, generator=torch.Generator().manual_seed(11))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.stack(ours), torch.stack(expected))


def results(z: Tensor, y: Tensor, mix: Tensor) -> list[Tensor]:
    """Everything public that takes labels, on one batch."""
    criterion = make_criterion(dropout=0.0)
    gate = torch.linspace(0, 1, len(y) ** 2 * D, dtype=z.dtype).reshape(len(y), len(y), D)
    layout = gcng.BatchLayout(y)
    metrics = gcng.evaluation.evaluate_retrieval(z, y, k=(1, 2))
    return [
        *criterion.metric_terms(z, y, mix=mix),
        *criterion.metric_terms(z, y, mix=mix, layout=layout),
        *criterion.generator_terms(z, y, mix=mix),
        criterion.classifier_loss(z, y),
        criterion.graph(z, y).nodes,
        functional.synthesize_negatives(z, y, gate, kappa=0.5, mix=mix),
        functional.negative_attention(*[z.view(len(y), 2, -1)] * 3, y),
        functional.linear_cross_entropy(z, gate[0], y),
        functional.correlation_topk(z, 2, labels=y)[1],
        torch.tensor([metrics[name] for name in sorted(metrics)]),
    ]


@MODES
@pytest.mark.parametrize("dtype", (torch.uint16, torch.uint32, torch.uint64, torch.uint8, torch.int8))
def test_labels_of_any_integer_dtype(dtype: torch.dtype, mode) -> None:
    z, y, mix = batch_of(BATCHES["ragged, shuffled"])
    with mode():
        for ours, expected in zip(results(z, y.to(dtype), mix), results(z, y, mix), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", (torch.uint32, torch.uint64))
def test_large_unsigned_labels_are_not_truncated(dtype: torch.dtype) -> None:
    most = 2**32 - 1 if dtype == torch.uint32 else 2**63 - 1
    x = torch.randn(4, D)
    labels = [0, most, 0, most]
    _, expected = functional.correlation_topk(x, 3, labels=torch.tensor(labels))
    _, found = functional.correlation_topk(x, 3, labels=torch.tensor(labels, dtype=dtype))
    assert torch.equal(found, expected) and (found >= 0).sum() == 8
    assert gcng.BatchLayout(torch.tensor(labels, dtype=dtype)).labels.tolist() == labels


def test_labels_beyond_int64_are_refused() -> None:
    labels = torch.tensor([0, 5, 2**64 - 1, 5], dtype=torch.uint64)
    x, message = torch.randn(4, D), r"\[2\] is 18446744073709551615; use labels below 2\*\*63, which int64 holds"
    with pytest.raises(ValueError, match="correlation_topk: labels" + message):
        functional.correlation_topk(x, 2, labels=labels)
    with pytest.raises(ValueError, match="linear_cross_entropy: target" + message):
        functional.linear_cross_entropy(x, torch.randn(9, D), labels)
    with pytest.raises(ValueError, match="synthesize_negatives: labels" + message):
        functional.synthesize_negatives(x, labels, torch.rand(4, 4, D), kappa=0.5, mix=torch.rand(2, 1))


@MODES
@pytest.mark.parametrize("num_layers", (1, 2))
def test_empty_batch(num_layers: int, mode) -> None:
    criterion, y = make_criterion(num_layers), torch.zeros(0, dtype=torch.int64)
    z = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    with mode():
        metric, generator = criterion.metric_terms(z, y), criterion.generator_terms(z, y)
        (metric.total + generator.total).backward()
        criterion(z, y)
    assert [x.item() for x in metric] == [0, 0, 0, 0]
    # Gates without a spread: 0.01 (1 - 0), times 0.5 * 60 in the total.
    assert [x.item() for x in generator] == pytest.approx([0, 0, 0.01, 0.3], rel=1e-14)
    assert z.grad.shape == (0, D)
    assert all(p.grad is None or p.grad.eq(0).all() for p in criterion.parameters())
