"""Callers that do what most do not: edits in place, many threads, deterministic mode, subclasses, export, meta."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import gcng
import gcng.functional as F
from tests.run_case import equal_bits

N, D, C = 12, 8, 5
LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 3, 3, 4, 4, 4, 0])
ROWS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def criterion():
    torch.manual_seed(0)
    return gcng.losses.GCAHNGLoss(D, C, dropout=0.0)


def loss_and_gradients(loss, rows=ROWS):
    leaf = rows.clone().requires_grad_()
    terms = loss.metric_terms(leaf, LABELS, mix=torch.full((3, 2), 0.25))
    return [terms.total.detach(), *torch.autograd.grad(terms.total, [leaf, *loss.graph.input.parameters()])]


WRITTEN = {
    "center_normalize": lambda rows: F.center_normalize(rows).cumsum(0),
    "attention": lambda rows: F.negative_attention(*[rows.view(N, 2, D // 2)] * 3, LABELS),
    "cross_entropy": lambda rows: F.linear_cross_entropy(rows, rows[:C].detach().clone(), LABELS),
    "metric phase": lambda rows: criterion().metric_terms(rows, LABELS, mix=torch.full((3, 2), 0.25)).total,
}
READ = ("attention", "cross_entropy")  # by the backward; the others keep what they have made of it


@pytest.mark.parametrize("name", WRITTEN)
def test_an_input_that_is_written_to_gives_the_same_gradient_or_is_noticed(name):
    gradients = []
    for change in (None, 1.0):
        leaf = ROWS.clone().requires_grad_()
        rows = leaf * 2
        output = WRITTEN[name](rows)
        if change is not None:
            rows.add_(change)
        if change is not None and name in READ:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(output.sum(), leaf)
            return
        gradients += torch.autograd.grad(output.sum(), leaf)
    assert equal_bits(*gradients)


def test_64_threads_with_backward_equal_one():
    rows = [ROWS + number for number in range(64)]
    loss = criterion()
    expected = [loss_and_gradients(loss, x) for x in rows]
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda x: loss_and_gradients(loss, x), rows))
    for one, other in zip(found, expected, strict=True):
        assert all(equal_bits(a, b) for a, b in zip(one, other, strict=True))


def test_deterministic_mode_changes_no_bit_and_refuses_nothing():
    expected = loss_and_gradients(criterion())
    torch.use_deterministic_algorithms(True)
    try:
        found = loss_and_gradients(criterion())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(equal_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_a_subclass_stays_one():
    class Named(torch.Tensor):
        pass

    found = F.center_normalize(ROWS.as_subclass(Named))
    assert type(found) is Named and equal_bits(found.as_subclass(torch.Tensor), F.center_normalize(ROWS))


class Unit(nn.Module):
    def forward(self, x):
        return F.center_normalize(x)


def test_export_keeps_the_op():
    program = torch.export.export(Unit(), (ROWS,))
    assert "gcng.center_normalize" in program.graph_module.code
    assert equal_bits(program.module()(ROWS), F.center_normalize(ROWS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused_by_torch():
    with pytest.raises(Exception, match="Compiled functions can't take") as raised:
        torch.jit.script(Unit())
    assert raised.type.__name__ == "NotSupportedError"


def test_shapes_are_inferred_on_meta():
    rows = ROWS.to("meta")
    assert F.center_normalize(rows).shape == (N, D)
    assert [x.shape for x in F.knn(rows, k=3)] == [(N, 3), (N, 3)]
    terms = criterion().to("meta").metric_terms(rows, LABELS)
    assert all(term.shape == () and term.is_meta for term in terms)


def test_more_classes_than_32_bits_count_are_refused():
    with pytest.raises(ValueError, match=r"num_classes must be at most 2\*\*31 - 1, got 2147483648"):
        gcng.losses.GCAHNGLoss(D, 2**31)
