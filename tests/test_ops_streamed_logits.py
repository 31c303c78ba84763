"""The streamed logits behind linear_cross_entropy: agreement with dense, sums in float32, memory, bad targets."""

from __future__ import annotations

import pytest
import torch

from gcng.ops import class_cross_entropy, streamed_logits
from gcng.ops.class_cross_entropy import linear_cross_entropy
from gcng.ops.streamed_logits import streamed_logit_gradient, streamed_logsumexp
from gcng.reference.class_cross_entropy import linear_cross_entropy as definition
from tests import cases
from tests.closeness import assert_error_does_not_grow, relative_error
from tests.op_checks import LargestTensor, outputs_and_gradients
from tests.run_case import equal_bits

CASES = {case.name: case for case in cases.CLASSIFICATIONS}


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


def test_streamed_target_out_of_range_is_never_plausible() -> None:
    """Without the check of the CPU (on a GPU it would wait), the row's loss and gradient are NaN."""
    inputs = random_inputs(4, ignored=0)
    target = inputs["target"].clone()
    target[2] = 11
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    lse, chosen = streamed_logsumexp(x, weight, bias, target)
    assert (lse - chosen).isnan().tolist() == [False, False, True, False]
    grads = streamed_logit_gradient(x, weight, bias, target, lse, torch.ones(4), need_weight=True)
    assert grads[0].isnan().any(1).tolist() == [False, False, True, False]
    assert grads[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_streamed_parts_agree_with_dense(dtype, small_tiles) -> None:
    """The building blocks of the fused losses, per-row scales included."""
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in random_inputs(53, 90).items()}
    x, weight, bias, target = inputs["x"], inputs["weight"], inputs["bias"], inputs["target"].clamp(min=0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    lse, chosen = streamed_logsumexp(x, weight, bias, target)
    assert (lse.dtype, chosen.dtype) == (torch.float64, wide)
    logits = torch.addmm(bias.double(), x.double(), weight.double().T)
    torch.testing.assert_close(lse, logits.logsumexp(1), **tolerance)
    torch.testing.assert_close(chosen.double(), logits.gather(1, target[:, None]).squeeze(1), **tolerance)
    scale = torch.randn(53, dtype=wide)
    rest = logits.softmax(1)
    rest[torch.arange(53), target] -= 1
    rest *= scale[:, None]
    rows, to_weight, to_bias = streamed_logit_gradient(x, weight, bias, target, lse, scale, need_weight=True)
    assert (rows.dtype, to_weight.dtype, to_bias.dtype) == (wide, dtype, wide)
    torch.testing.assert_close(rows.double(), rest @ weight.double(), **tolerance)
    torch.testing.assert_close(to_bias.double(), rest.sum(0), **tolerance)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(to_weight.double(), rest.T @ x.double(), **tolerance)
    alone = streamed_logit_gradient(x, weight, bias, target, lse, scale, need_weight=False)
    assert equal_bits(alone[0], rows)
    assert alone[1:] == (None, None)
    without_rows = streamed_logit_gradient(
        x, weight, bias, target, lse, scale, need_weight=False, need_rows=False, need_bias=True
    )
    assert without_rows[:2] == (None, None)
    assert equal_bits(without_rows[2], to_bias)


def test_weight_gradient_is_summed_in_float32() -> None:
    """bfloat16, 8 against 512 blocks of rows: the error must not grow with their number."""
    case = CASES["many_chunks"]
    inputs = {
        name: x.bfloat16() if x.is_floating_point() else x
        for name, x in cases.classification_inputs(case, seed=1).items()
    }
    exact = outputs_and_gradients(
        definition, {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_logits, "TILE_CLASSES", 70)
        patch.setattr(streamed_logits, "TILE_LOGITS", 70 * 130)
        few = outputs_and_gradients(linear_cross_entropy, inputs)
        patch.setattr(streamed_logits, "TILE_LOGITS", 70 * 2)
        many = outputs_and_gradients(linear_cross_entropy, inputs)
    for name, a, b, truth in zip(("x", "weight", "bias"), few[1:], many[1:], exact[1:], strict=True):
        assert_error_does_not_grow(f"grad {name}", relative_error(a, truth), relative_error(b, truth))
        assert relative_error(b, truth) < 4e-3


@pytest.mark.raw_memory
def test_nothing_of_size_rows_by_classes_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(400, 1000, 4, dtype=torch.float32)
    monkeypatch.setattr(streamed_logits, "TILE_LOGITS", 2**14)
    monkeypatch.setattr(streamed_logits, "TILE_CLASSES", 256)
    arguments = (*inputs.values(), -100)
    with LargestTensor() as largest:
        losses, lse = class_cross_entropy._linear_cross_entropy(*arguments)
        class_cross_entropy._linear_cross_entropy_backward(
            torch.ones_like(losses), *arguments[:4], lse, -100, [True, True, True]
        )
    # A whole tile was seen, and nothing larger (rows x classes is 24 times as much).
    assert largest.elements == 2**14
