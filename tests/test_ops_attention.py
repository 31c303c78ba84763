"""negative_attention (4)-(6): closeness, gradients, blocks, masks, the contract of an op, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import gcng
from gcng.ops import attention
from gcng.ops.attention import negative_attention
from gcng.reference.attention import negative_attention as definition
from tests import cases
from tests.mutants import OPERATIONS
from tests.op_checks import (
    LargestTensor,
    check_compiled,
    check_refuses_double_backward,
    outputs_and_gradients,
)
from tests.run_case import equal_bits

OPERATION = replace(OPERATIONS["negative_attention"], function=negative_attention)
# float16 differs from bfloat16 in nothing but range: the regimes that use it are enough.
RUNS = [
    (case, dtype)
    for case, dtype in OPERATION.all_runs()
    if dtype != torch.float16 or case.name in ("mxk, normal", "mxk, large")
]
BATCHES = {batch.name: batch for batch in cases.BATCHES}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 16 columns and a few rows, so that every case has several in both directions."""
    monkeypatch.setattr(attention, "TILE_SCORES", 400)
    monkeypatch.setattr(attention, "TILE_ROWS", 25)


def random_inputs(n: int, heads: int = 2, width: int = 3, *, classes: int = 4, dtype=torch.float64) -> dict:
    q, k, v = torch.randn(3, n, heads, width, dtype=dtype).unbind(0)
    return {"q": q, "k": k, "v": v, "labels": torch.randint(classes, (n,))}


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=[f"{c.name}-{c.layout}-{c.upstream}-{d}" for c, d in RUNS])
def test_close_to_truth(case, dtype, small_tiles) -> None:
    """Values, gradients and the op contract in every dtype, layout and data regime, over many tiles."""
    assert OPERATION.run(case, dtype)


def test_gradients_alone_and_together() -> None:
    """Each of q, k, v alone gets the bits that it gets with the others, on the shipped tile size."""
    by_name = {case.name: case for case in OPERATION.cases}
    readings = OPERATION.run(by_name["mxk, normal"], torch.float32, subsets=True)
    assert {reading.name.split(": ")[1] for reading in readings} == {"output 0", "grad q", "grad k", "grad v"}


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_SCORES", 24)
    monkeypatch.setattr(attention, "TILE_ROWS", 3)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 7, 2, 2, dtype=torch.float64).unbind(0))
    labels = torch.tensor([0, 1, 0, 2, 2, 1, 0])
    assert torch.autograd.gradcheck(negative_attention, (q, k, v, labels), nondet_tol=0.0)


@pytest.mark.parametrize("n", [0, 1, 2, 19])
def test_opcheck(n: int) -> None:
    inputs = random_inputs(n, dtype=torch.float32)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    labels = inputs["labels"]
    torch.library.opcheck(torch.ops.gcng.negative_attention.default, (q, k, v, labels))
    strided = q.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    torch.library.opcheck(torch.ops.gcng.negative_attention.default, (strided, k, v, labels))


def test_compiled_equals_eager() -> None:
    check_compiled(negative_attention, [random_inputs(n, dtype=torch.float32) for n in (9, 40, 23)])


def test_double_backward() -> None:
    inputs = random_inputs(4)
    check_refuses_double_backward(negative_attention, inputs)
    with gcng.reference_mode():
        q, k, v = (inputs[name].requires_grad_() for name in "qkv")
        assert torch.autograd.gradgradcheck(negative_attention, (q, k, v, inputs["labels"]))


@pytest.mark.parametrize(
    ("scores", "rows", "shape"),
    [(1, 1, (1, 1)), (30, 3, (3, 5)), (64, 2, (2, 16)), (400, 4, (4, 50)), (2**19, 64, (50, 50))],
)
def test_tile_size_changes_nothing(scores: int, rows: int, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(50)
    whole = outputs_and_gradients(definition, inputs)
    monkeypatch.setattr(attention, "TILE_SCORES", scores)
    monkeypatch.setattr(attention, "TILE_ROWS", rows)
    assert attention._tile_shape(50, 2) == shape
    for expected, got in zip(whole, outputs_and_gradients(negative_attention, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_zero_logit_by_hand() -> None:
    """Two samples of different classes with score s: weight exp(s) / (1 + exp(s))."""
    q = torch.tensor([[[2.0]], [[3.0]]], dtype=torch.float64)
    k = torch.tensor([[[0.5]], [[-1.0]]], dtype=torch.float64)
    v = torch.tensor([[[10.0]], [[100.0]]], dtype=torch.float64)
    out = negative_attention(q, k, v, torch.tensor([0, 1]))
    assert out[0].item() == pytest.approx(100 * math.exp(-2) / (1 + math.exp(-2)), rel=1e-14)
    assert out[1].item() == pytest.approx(10 * math.exp(1.5) / (1 + math.exp(1.5)), rel=1e-14)


def test_scale_is_one_over_root_width() -> None:
    q = torch.full((2, 1, 4), 1.0, dtype=torch.float64)
    out = negative_attention(q, q, q, torch.tensor([0, 1]))
    assert out[0, 0, 0].item() == pytest.approx(math.exp(2) / (1 + math.exp(2)), rel=1e-14)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_scores_stay_finite(magnitude: float) -> None:
    """Scores of +-1e8: the weights are 1 or 0, and the gradients are numbers."""
    q = torch.ones(4, 1, 1)
    v = torch.arange(4.0).reshape(4, 1, 1)
    inputs = {"q": q * abs(magnitude), "k": q * magnitude, "v": v, "labels": torch.tensor([0, 0, 1, 1])}
    out, *grads = outputs_and_gradients(negative_attention, inputs)
    assert out.flatten().tolist() == ([2.5, 2.5, 0.5, 0.5] if magnitude > 0 else [0.0] * 4)
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("n", [1, 20])
def test_no_negatives_give_zero(n: int, small_tiles) -> None:
    inputs = random_inputs(n, classes=1)
    for result in outputs_and_gradients(negative_attention, inputs):
        assert result.shape == (n, 2, 3)
        assert not result.any()


def test_no_rows() -> None:
    for result in outputs_and_gradients(negative_attention, random_inputs(0)):
        assert result.shape == (0, 2, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_non_finite_at_masked_positions_has_no_effect(name: str, value: float, small_tiles) -> None:
    """A bad sample changes no bit of the samples of its class, forward and backward."""
    inputs = random_inputs(24, classes=3)
    labels = inputs["labels"]
    bad = 5
    same = (labels == labels[bad]) & (torch.arange(24) != bad)
    assert same.any()
    clean = outputs_and_gradients(negative_attention, inputs)
    spoiled = inputs | {name: inputs[name].clone()}
    spoiled[name][bad, :, 1] = value
    out, grad_q, grad_k, grad_v = outputs_and_gradients(negative_attention, spoiled)
    assert equal_bits(out[same], clean[0][same])
    assert equal_bits(grad_q[same], clean[1][same])
    if name == "q":
        # Only the bad row attends with q; its class is masked in both directions.
        assert not out[bad].isfinite().all()
        others = torch.arange(24) != bad
        assert equal_bits(out[others], clean[0][others])
        for got, expected in ((grad_q, clean[1]), (grad_k, clean[2]), (grad_v, clean[3])):
            assert equal_bits(got[same], expected[same])
    elif name == "v" or math.isnan(value):
        # Every receiver of another class depends on the bad sender, and must not look plausible.
        assert not out[labels != labels[bad]].isfinite().all(-1).any()


@pytest.mark.parametrize("bad_class_only", [True, False])
def test_non_finite_upstream_gradient_stays_in_its_row(bad_class_only: bool, small_tiles) -> None:
    inputs = random_inputs(24, classes=3)
    labels = inputs["labels"]
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    upstream = torch.randn(24, 2, 3, dtype=torch.float64)
    clean = torch.autograd.grad(negative_attention(q, k, v, labels), (q, k, v), upstream)
    upstream[5, 0, 1] = math.nan
    grads = torch.autograd.grad(negative_attention(q, k, v, labels), (q, k, v), upstream)
    same = (labels == labels[5]) & (torch.arange(24) != 5)
    for got, expected in zip(grads, clean, strict=True):
        if bad_class_only:
            assert equal_bits(got[same], expected[same])
        else:
            assert equal_bits(got[:, 1], expected[:, 1])  # the other head
    assert grads[2][labels != labels[5]][:, 0].isnan().any(-1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_label_dtypes(dtype: torch.dtype) -> None:
    inputs = random_inputs(12)
    expected = negative_attention(**inputs)
    assert equal_bits(negative_attention(**inputs | {"labels": inputs["labels"].to(dtype)}), expected)


def test_large_labels_are_not_truncated() -> None:
    inputs = random_inputs(6)
    labels = torch.tensor([0, 2**32, 2**40, 0, 2**32, 2**40])
    expected = definition(**inputs | {"labels": labels})
    torch.testing.assert_close(negative_attention(**inputs | {"labels": labels}), expected, rtol=1e-12, atol=1e-13)


def test_permuting_the_batch_permutes_the_result(small_tiles) -> None:
    inputs = random_inputs(33)
    order = torch.randperm(33)
    expected = negative_attention(**inputs)[order]
    permuted = negative_attention(**{name: x[order] for name, x in inputs.items()})
    torch.testing.assert_close(permuted, expected, rtol=1e-12, atol=1e-13)


def test_autocast_gives_float32() -> None:
    inputs = random_inputs(10, dtype=torch.float32)
    mixed = inputs | {"k": inputs["k"].bfloat16().requires_grad_()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = negative_attention(**mixed)
    assert out.dtype == torch.float32
    expected = negative_attention(**inputs | {"k": inputs["k"].bfloat16().float()})
    assert equal_bits(out.detach(), expected)
    assert torch.autograd.grad(out.sum(), mixed["k"])[0].dtype == torch.bfloat16


def test_reference_mode_is_the_definition() -> None:
    inputs = random_inputs(9)
    with gcng.reference_mode():
        assert equal_bits(negative_attention(**inputs), definition(**inputs))


@pytest.mark.raw_memory
def test_nothing_of_size_n_by_n_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(600, heads=1, width=4, dtype=torch.float32)
    monkeypatch.setattr(attention, "TILE_SCORES", 2**14)
    monkeypatch.setattr(attention, "TILE_ROWS", 128)
    with LargestTensor() as largest:
        out, shares = attention._negative_attention(*inputs.values())
        attention._negative_attention_backward(out, *inputs.values(), shares, [True, True, True])
    # A whole tile was seen, and nothing larger.
    assert largest.elements == 2**14


BAD_INPUT = [
    ({"q": "no tensor"}, TypeError, "negative_attention: q must be a torch.Tensor, got str"),
    ({"v": torch.zeros(4, 2, 3, dtype=torch.int64)}, TypeError, "v has dtype torch.int64; use float16"),
    ({"q": torch.zeros(4, 2, 3, dtype=torch.complex64)}, TypeError, "q has dtype torch.complex64"),
    ({"q": torch.zeros(4, 6).to_sparse()}, TypeError, "q must be a dense strided tensor"),
    ({"q": torch.zeros(4, 6)}, ValueError, r"q must be \(N, H, h\), got shape \(4, 6\)"),
    ({"k": torch.zeros(4, 2, 5)}, ValueError, r"k has shape \(4, 2, 5\) but q has shape \(4, 2, 3\)"),
    ({"v": torch.zeros(5, 2, 3)}, ValueError, r"v has shape \(5, 2, 3\) but q has shape \(4, 2, 3\)"),
    ({"labels": torch.zeros(3).long()}, ValueError, r"labels has shape \(3,\); expected \(4,\)"),
    ({"labels": torch.zeros(4, 1).long()}, ValueError, r"use labels.squeeze\(1\)"),
    ({"labels": torch.zeros(4)}, TypeError, "labels has dtype torch.float32; use an integer dtype, e.g. int64 by"),
    ({"labels": torch.zeros(4).bool()}, TypeError, "labels has dtype torch.bool"),
    ({"labels": [0, 1, 0, 1]}, TypeError, "labels must be a torch.Tensor, got list"),
    (
        {"k": torch.zeros(4, 2, 3, dtype=torch.float64)},
        TypeError,
        "q is torch.float32 but k is torch.float64",
    ),
    ({"k": torch.zeros(4, 2, 3, device="meta")}, ValueError, "q is on cpu but k is on meta"),
    (
        {"labels": torch.zeros(4, device="meta").long()},
        ValueError,
        "labels is on meta but its samples are on cpu",
    ),
    ({name: torch.zeros(4, 2, 0) for name in "qkv"}, ValueError, "q has no channels"),
    ({name: torch.zeros(4, 0, 3) for name in "qkv"}, ValueError, "q has no heads"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {name: torch.zeros(4, 2, 3) for name in "qkv"} | {"labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(error, match=message):
        negative_attention(**good | change)
