"""Transforms of torch.func: refused with a remedy where they cannot be right, and right in reference mode.

Forward mode and torch.func.grad by every public function and by the criterion; vmap by the criterion alone.
"""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

import gcng
import gcng.functional as F

N, D, H, C = 6, 4, 2, 5
LABELS = torch.tensor([0, 1, 0, 2, 1, 2])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def criterion():
    torch.manual_seed(0)
    loss = gcng.losses.GCAHNGLoss(D, C, dropout=0.0).double()
    loss.schedule.j_avg, loss.schedule.j_gen = 2.0, 25.0  # every term counts
    return loss.eval()


def loss_of_embeddings(loss, x):
    torch.manual_seed(1)  # of the mixing numbers
    return loss(x, LABELS)


def loss_of_a_parameter(loss, value):
    torch.manual_seed(1)
    changed = {"graph.gate.weight": value}
    return torch.func.functional_call(loss, changed, (numbers(N, D), LABELS))


def synthesize(z, gate):
    return F.synthesize_negatives(z, LABELS, gate, kappa=0.5, mix=numbers(2, 1, seed=5))


def attend(q, k, v):
    return F.negative_attention(q, k, v, LABELS)


def cross_entropy(x, weight, bias):
    return F.linear_cross_entropy(x, weight, LABELS, bias=bias)


HEADS = (N, H, D // H)
# Name -> function of differentiable arguments, and their shapes. A criterion is made anew for each case.
CASES = {
    "center_normalize": (lambda: F.center_normalize, [(N, D)]),
    "linear_cross_entropy": (lambda: cross_entropy, [(N, D), (C, D), (C,)]),
    "negative_attention": (lambda: attend, [HEADS, HEADS, HEADS]),
    "synthesize_negatives": (lambda: synthesize, [(N, D), (N, N, D)]),
    "criterion": (lambda: partial(loss_of_embeddings, criterion()), [(N, D)]),
    "criterion_parameter": (lambda: partial(loss_of_a_parameter, criterion()), [(D, D)]),
}
EVERY_ARGUMENT = [(name, position) for name, (_, shapes) in CASES.items() for position in range(len(shapes))]
WITHOUT_GRADIENT = {"correlation_topk": lambda x: F.correlation_topk(x, 2), "knn": lambda x: F.knn(x, x, 2)}


def test_every_public_function_is_among_the_cases():
    assert set(F.__all__) == (set(CASES) | set(WITHOUT_GRADIENT)) - {"criterion", "criterion_parameter"}


def of_one_argument(name, position):
    """A function of one argument of a case, its value and a tangent."""
    make, shapes = CASES[name]
    values = [numbers(*shape, seed=index) for index, shape in enumerate(shapes)]
    function = make()

    def call(value):
        return function(*values[:position], value, *values[position + 1 :])

    return call, values[position], numbers(*shapes[position], seed=9) - 0.5


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "position"), EVERY_ARGUMENT)
def test_forward_mode_is_refused(name, position, requires_grad):
    function, value, tangent = of_one_argument(name, position)
    message = r"forward-mode derivatives \(jvp\) are not supported; use gcng.reference_mode\(\)"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (value.requires_grad_(requires_grad),), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(value, tangent))
    # A level that is open somewhere, with no tangent in the arguments, refuses nothing.
    with forward_ad.dual_level():
        assert function(value).isfinite().all()


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_forward_mode_is_refused_where_there_is_no_gradient_at_all(name):
    x = numbers(N, D)
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
        torch.func.jvp(lambda x: WITHOUT_GRADIENT[name](x)[0], (x,), (x,))


@pytest.mark.parametrize(("name", "position"), EVERY_ARGUMENT)
def test_forward_mode_in_reference_mode_agrees_with_the_gradient(name, position):
    function, value, tangent = of_one_argument(name, position)
    with gcng.reference_mode():
        output, derivative = torch.func.jvp(function, (value,), (tangent,))
    upstream = numbers(*output.shape, seed=11) - 0.5
    (gradient,) = torch.autograd.grad(function(value.requires_grad_()), value, upstream)
    expected = (gradient * tangent).sum()
    assert expected.abs() > 1e-4
    assert ((derivative * upstream).sum() - expected).abs() <= 1e-9 * max(1.0, float(expected.abs()))


@pytest.mark.parametrize(("name", "position"), EVERY_ARGUMENT)
def test_function_transforms_of_the_gradient_are_refused(name, position):
    function, value, _ = of_one_argument(name, position)
    message = r"torch.func.grad and vjp are not supported; use torch.autograd.grad, or gcng.reference_mode\(\)"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: function(x).sum())(value)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vjp(function, value)


@pytest.mark.parametrize(("name", "position"), [case for case in EVERY_ARGUMENT if not case[0].startswith("criterion")])
def test_function_transforms_in_reference_mode_agree_with_the_gradient(name, position):
    function, value, _ = of_one_argument(name, position)
    upstream = numbers(*function(value).shape, seed=11) - 0.5
    with gcng.reference_mode():
        found = torch.func.grad(lambda x: (function(x) * upstream).sum())(value)
    (expected,) = torch.autograd.grad(function(value.requires_grad_()), value, upstream)
    assert expected.abs().max() > 1e-4
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_vmap_runs_the_ops_and_not_the_criterion():
    batches, loss = numbers(3, N, D), criterion()
    with pytest.raises(NotImplementedError, match="metric_terms: vmap is not supported; loop over the batches"):
        torch.func.vmap(lambda x: loss.metric_terms(x, LABELS).total)(batches)
    expected = torch.stack([F.center_normalize(x) for x in batches])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a loop is slow
        assert torch.equal(torch.func.vmap(F.center_normalize)(batches), expected)
