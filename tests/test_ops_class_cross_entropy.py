"""linear_cross_entropy (24) and its streamed logits: closeness, blocks, targets, contract, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as torch_functional

import gcng
from gcng.ops import streamed_logits
from gcng.ops.class_cross_entropy import linear_cross_entropy
from gcng.reference.class_cross_entropy import linear_cross_entropy as definition
from tests.mutants import OPERATIONS
from tests.op_checks import (
    check_compiled,
    check_refuses_double_backward,
    outputs_and_gradients,
)
from tests.run_case import equal_bits

OPERATION = replace(OPERATIONS["linear_cross_entropy"], function=linear_cross_entropy)
# float16 differs from bfloat16 in nothing but range: one case of many sums is enough.
RUNS = [
    (case, dtype)
    for case, dtype in OPERATION.all_runs()
    if dtype != torch.float16 or case.name.startswith("many_chunks") or "saturated" in case.name
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 16 rows x 32 classes, so that the cases have several in both directions."""
    monkeypatch.setattr(streamed_logits, "TILE_LOGITS", 512)
    monkeypatch.setattr(streamed_logits, "TILE_CLASSES", 32)


def random_inputs(rows: int, classes: int = 11, width: int = 5, *, dtype=torch.float64, ignored: int = 1) -> dict:
    target = torch.randint(classes, (rows,))
    target[:ignored] = -100
    return {
        "x": torch.randn(rows, width, dtype=dtype),
        "weight": torch.randn(classes, width, dtype=dtype),
        "target": target,
        "bias": torch.randn(classes, dtype=dtype),
    }


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=[f"{c.name}-{c.layout}-{c.upstream}-{d}" for c, d in RUNS])
def test_close_to_truth(case, dtype, small_tiles) -> None:
    """Loss, gradients and op contract in every dtype, layout, reduction and data regime, over many tiles."""
    assert OPERATION.run(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_alone_and_together(dtype, small_tiles) -> None:
    """Each of x, weight, bias alone gets the bits that it gets with the others."""
    by_name = {case.name: case for case in OPERATION.cases}
    readings = OPERATION.run(by_name["tails, diffuse, mean"], dtype, subsets=True)
    found = {reading.name.split(": ")[1] for reading in readings}
    assert found == {"output 0", "grad x", "grad weight", "grad bias"}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torch(reduction: str, with_bias: bool, small_tiles) -> None:
    """torch's own cross_entropy in float64, ignored rows included."""
    inputs = random_inputs(41, 70, 6)
    if not with_bias:
        del inputs["bias"]

    def torch_own(x, weight, target, bias=None):
        logits = torch_functional.linear(x, weight, bias)
        return torch_functional.cross_entropy(logits, target, reduction=reduction)

    expected = outputs_and_gradients(torch_own, inputs)
    got = outputs_and_gradients(lambda **kw: linear_cross_entropy(**kw, reduction=reduction), inputs)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_logits, "TILE_LOGITS", 12)
    monkeypatch.setattr(streamed_logits, "TILE_CLASSES", 3)
    inputs = random_inputs(6, 7, 3)
    x, weight, bias = (inputs[name].requires_grad_() for name in ("x", "weight", "bias"))

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, inputs["target"], bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (x, weight, bias), nondet_tol=0.0)


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(rows: int, with_bias: bool) -> None:
    inputs = random_inputs(rows, dtype=torch.float32)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    bias = inputs["bias"].requires_grad_() if with_bias else None
    op = torch.ops.gcng.linear_cross_entropy.default
    torch.library.opcheck(op, (x, weight, inputs["target"], bias, -100))


def test_opcheck_transposed_weight() -> None:
    inputs = random_inputs(9, dtype=torch.float32)
    weight = inputs["weight"].T.contiguous().T.requires_grad_()
    x, bias = inputs["x"][::2].requires_grad_(), inputs["bias"].requires_grad_()
    op = torch.ops.gcng.linear_cross_entropy.default
    torch.library.opcheck(op, (x, weight, inputs["target"][::2], bias, -100))


def test_compiled_equals_eager() -> None:
    check_compiled(linear_cross_entropy, [random_inputs(n, dtype=torch.float32) for n in (9, 40, 23)])


def test_double_backward() -> None:
    inputs = random_inputs(5, 4, 3)
    check_refuses_double_backward(linear_cross_entropy, inputs)
    with gcng.reference_mode():
        x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
        assert torch.autograd.gradgradcheck(
            lambda x, weight: linear_cross_entropy(x, weight, inputs["target"]), (x, weight)
        )


@pytest.mark.parametrize(("logits", "classes"), [(1, 1), (30, 5), (256, 64), (2**19, 2048)])
def test_tile_size_changes_nothing(logits: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(37, 53)
    whole = outputs_and_gradients(definition, inputs)
    monkeypatch.setattr(streamed_logits, "TILE_LOGITS", logits)
    monkeypatch.setattr(streamed_logits, "TILE_CLASSES", classes)
    for expected, got in zip(whole, outputs_and_gradients(linear_cross_entropy, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_softmax_minus_one_keeps_its_digits() -> None:
    """A lead of 40 leaves p - 1 = -2 exp(-40), of which float32 arithmetic on p keeps nothing."""
    x = torch.eye(3).requires_grad_()
    weight = 40.0 * torch.eye(3)
    loss = linear_cross_entropy(x, weight, torch.arange(3), reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(6 * math.exp(-40), rel=1e-6)
    # d/dx of row 0: W^T (p - onehot) = 40 (-2 e^-40, e^-40, e^-40)
    assert x.grad[0].tolist() == pytest.approx([-80 * math.exp(-40), *[40 * math.exp(-40)] * 2], rel=1e-4)


def test_loss_of_half_precision_is_float32() -> None:
    """A loss of 7e4 is infinite in float16."""
    x = torch.full((1, 4), 180.0, dtype=torch.float16)
    weight = torch.stack([torch.full((4,), -50.0), torch.full((4,), 50.0)]).half()
    loss = linear_cross_entropy(x, weight, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * 4 * 180.0 * 50.0, rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero(reduction: str, small_tiles) -> None:
    inputs = random_inputs(19, ignored=19)
    loss, *grads = outputs_and_gradients(lambda **kw: linear_cross_entropy(**kw, reduction=reduction), inputs)
    assert loss.shape == ((19,) if reduction == "none" else ())
    assert not loss.any()
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(reduction: str) -> None:
    inputs = random_inputs(0, ignored=0)
    loss, *grads = outputs_and_gradients(lambda **kw: linear_cross_entropy(**kw, reduction=reduction), inputs)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert not loss.any()
    assert [g.shape for g in grads] == [(0, 5), (11, 5), (11,)]
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ignored_rows_have_no_effect(value: float, small_tiles) -> None:
    inputs = random_inputs(40, 50, ignored=3)
    inputs["x"][:3] = 0.0
    clean = outputs_and_gradients(linear_cross_entropy, inputs)
    inputs["x"][0, 2], inputs["x"][1] = value, value
    for expected, got in zip(clean, outputs_and_gradients(linear_cross_entropy, inputs), strict=True):
        assert equal_bits(expected, got)


def test_upstream_nan_of_an_ignored_row_has_no_effect() -> None:
    inputs = random_inputs(8)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    upstream = torch.randn(8, dtype=torch.float64)
    losses = linear_cross_entropy(**inputs, reduction="none")
    clean = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    upstream[0] = math.nan
    for expected, got in zip(clean, torch.autograd.grad(losses, leaves, upstream), strict=True):
        assert equal_bits(expected, got)


def test_nan_row_reaches_its_own_loss_only() -> None:
    inputs = random_inputs(8, ignored=0)
    clean = linear_cross_entropy(**inputs, reduction="none")
    inputs["x"][3, 1] = math.nan
    losses = linear_cross_entropy(**inputs, reduction="none")
    others = torch.arange(8) != 3
    assert losses[3].isnan()
    assert equal_bits(losses[others], clean[others])


def test_ignore_index_inside_the_classes() -> None:
    inputs = random_inputs(30, 5, ignored=0)
    inputs["target"][4] = 2
    losses = linear_cross_entropy(**inputs, reduction="none", ignore_index=2)
    kept = inputs["target"] != 2
    assert not losses[~kept].any()
    expected = definition(inputs["x"][kept], inputs["weight"], inputs["target"][kept], bias=inputs["bias"])
    torch.testing.assert_close(linear_cross_entropy(**inputs, ignore_index=2), expected, rtol=1e-12, atol=0)


def test_single_class_has_loss_zero() -> None:
    inputs = random_inputs(9, 1)
    loss, *grads = outputs_and_gradients(linear_cross_entropy, inputs)
    assert loss.item() == 0.0
    assert all(bool((g.abs() < 1e-15).all()) for g in grads)


def test_minus_infinity_in_the_bias_removes_a_class(small_tiles) -> None:
    """A whole tile of classes may be at -inf: the running maximum then starts without a finite value."""
    inputs = random_inputs(20, 80, ignored=0)
    inputs["target"] = inputs["target"] % 8 + 72
    kept = inputs["bias"].clone()
    inputs["bias"][:72] = -math.inf
    expected = definition(inputs["x"], inputs["weight"][72:], inputs["target"] - 72, bias=kept[72:])
    loss, grad_x, grad_weight, _ = outputs_and_gradients(linear_cross_entropy, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert grad_x.isfinite().all()
    assert not grad_weight[:72].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_target_dtypes(dtype: torch.dtype) -> None:
    inputs = random_inputs(12, ignored=0)
    expected = linear_cross_entropy(**inputs)
    assert equal_bits(linear_cross_entropy(**inputs | {"target": inputs["target"].to(dtype)}), expected)


@pytest.mark.parametrize("value", [-1, 11, 2**31, 2**40, -(2**40)])
@pytest.mark.parametrize("reference", [False, True])
def test_target_out_of_range_names_the_first(value: int, reference: bool) -> None:
    inputs = random_inputs(9)
    inputs["target"][6:] = value
    message = rf"target\[6\] is {value}; expected 0 <= target < 11, .* or ignore_index = -100"
    with pytest.raises(ValueError, match=message):
        if reference:
            with gcng.reference_mode():
                linear_cross_entropy(**inputs)
        else:
            linear_cross_entropy(**inputs)


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    inputs = random_inputs(12, dtype=torch.bfloat16)
    loss, *grads = outputs_and_gradients(linear_cross_entropy, inputs)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3


def test_autocast() -> None:
    inputs = random_inputs(12, dtype=torch.float32)
    x = inputs.pop("x").bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, **inputs)
    assert loss.dtype == torch.float32
    assert equal_bits(loss.detach(), linear_cross_entropy(x.detach().float(), **inputs))
    assert torch.autograd.grad(loss, x)[0].dtype == torch.bfloat16


def test_reference_mode_is_the_definition() -> None:
    inputs = random_inputs(9)
    with gcng.reference_mode():
        assert equal_bits(linear_cross_entropy(**inputs), definition(**inputs))


def test_a_million_classes() -> None:
    """C = 1,000,001 on the shipped tiles: the loss of a uniform model is log C, whatever the target."""
    classes = 1_000_001
    weight = torch.zeros(1, 1).expand(classes, 1)
    losses = linear_cross_entropy(torch.ones(4, 1), weight, torch.tensor([0, 7, 2**19, 10**6]), reduction="none")
    assert losses.tolist() == pytest.approx([math.log(classes)] * 4, rel=1e-6)


BAD_INPUT = [
    ({"x": [1.0]}, TypeError, "linear_cross_entropy: x must be a torch.Tensor, got list"),
    ({"x": torch.zeros(3, 4).long()}, TypeError, "x has dtype torch.int64"),
    ({"x": torch.zeros(4)}, ValueError, r"x must be \(N, D\), got shape \(4,\)"),
    ({"x": torch.zeros(3, 0), "weight": torch.zeros(5, 0)}, ValueError, "x has no channels"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight must be \(C, D\), got shape \(5,\)"),
    ({"weight": torch.zeros(5, 6)}, ValueError, r"weight has shape \(5, 6\) but x has shape \(3, 4\)"),
    ({"weight": torch.zeros(0, 4)}, ValueError, "weight has 0 classes"),
    ({"weight": torch.zeros(5, 4).double()}, TypeError, "x is torch.float32 but weight is torch.float64"),
    ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "x is on cpu but weight is on meta"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\) but weight has shape \(5, 4\)"),
    ({"bias": torch.zeros(5, 1)}, ValueError, r"bias must be \(C,\), got shape \(5, 1\)"),
    ({"bias": torch.zeros(5).half()}, TypeError, "x is torch.float32 but bias is torch.float16"),
    ({"target": torch.zeros(2).long()}, ValueError, r"target has shape \(2,\); expected \(3,\)"),
    ({"target": torch.zeros(3, 1).long()}, ValueError, r"use target.squeeze\(1\)"),
    ({"target": torch.zeros(3)}, TypeError, "target has dtype torch.float32; use an integer dtype, e.g. int64 by"),
    ({"target": torch.zeros(3).bool()}, TypeError, "target has dtype torch.bool"),
    (
        {"target": torch.zeros(3, device="meta").long()},
        ValueError,
        "target is on meta but its samples are on cpu",
    ),
    ({"reduction": "avg"}, ValueError, "unknown reduction 'avg'; use one of 'none', 'mean', 'sum'"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 1, 4])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**good | change)


def test_too_many_classes() -> None:
    """2^31 classes are refused before anything is computed; the weight is one number, expanded."""
    with pytest.raises(ValueError, match="weight has 2147483648 classes; C must be between 1 and"):
        linear_cross_entropy(torch.zeros(1, 1), torch.zeros(1, 1).expand(2**31, 1), torch.tensor([0]))
