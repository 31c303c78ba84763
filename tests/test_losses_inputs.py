"""What the criterion takes: numbers drawn as documented, a batch of no samples."""

from __future__ import annotations

import contextlib

import pytest
import torch

import gcng
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
