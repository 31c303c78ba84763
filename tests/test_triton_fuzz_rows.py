"""Random sizes, strides, blocks, dtypes and data through the kernels of (1), (4)-(6), (24) and exact search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import attention, class_cross_entropy, correlation, nearest
from gcng.kernels.attention_tiles import AttentionSchedule
from gcng.ops import attention as blocked_attention
from gcng.ops import correlation as blocked_correlation
from gcng.ops import nearest as blocked_nearest
from gcng.ops import streamed_logits
from tests.fuzz_draws import DTYPES, REGIMES, SEEDS, Arrays, Choices, check_arrays, jitter, spoil
from tests.run_case import LAYOUTS, lay_out

pytestmark = pytest.mark.interpreter

FLOAT64 = torch.float64


def draw(choices: Choices, regime: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor in one of the regimes and in any layout."""
    return lay_out(spoil(choices.normal(*shape), regime).to(dtype), choices.of(LAYOUTS))


def check_against_blocked(
    name: str, dtype: torch.dtype, inputs: Arrays, ours, blocked, *, floor: float | None = None, moved: bool = True
) -> None:
    """The launchers on the inputs; the blocked path on them in float64, in their dtype, and moved by a rounding."""

    def move(seed: int) -> Arrays:
        wide = {key: jitter(x.double(), x.dtype, seed) for key, x in inputs.items() if x.is_floating_point()}
        return inputs | wide

    truth = blocked(**{key: x.double() if x.is_floating_point() else x for key, x in inputs.items()})
    baselines = [blocked(**inputs), *(blocked(**move(seed)) for seed in (1, 2) if moved)]
    shapes = {key: (tuple(x.shape), x.stride()) for key, x in inputs.items()}
    floor = (1e-3 if dtype == FLOAT64 else 0.0) if floor is None else floor
    check_arrays(f"{name}, {shapes}", ours(**inputs), truth, baselines, dtype, floor)


def both_of_correlation(module):
    forward, backward = module

    def run(x: Tensor, grad: Tensor) -> Arrays:
        unit, inverse_norm = forward(x)
        return {"unit": unit, "inverse norm": inverse_norm, "grad x": backward(grad, unit, inverse_norm)}

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_center_normalize(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(seed, "correlation")
    dtype, regime = choices.of(DTYPES), choices.of(REGIMES)
    rows, width = choices.between(0, 21), choices.of((1, 2, 3, 5, 16, 17, 33, 50, 70))
    schedule = correlation.RowSchedule(4, 1, choices.of((1, 4, 16)), choices.of((16, 32, 64)))
    monkeypatch.setattr(correlation.RowSchedule, "for_width", lambda _: schedule)
    inputs = {name: draw(choices, regime, dtype, rows, width) for name in ("x", "grad")}
    ours, blocked = (
        both_of_correlation(x)
        for x in (
            (correlation.center_normalize_forward, correlation.center_normalize_backward),
            (blocked_correlation._center_normalize, blocked_correlation._center_normalize_backward),
        )
    )
    # Two channels have two directions: their gradient is 0 but for roundings. Constant rows, which have none, are
    # compared as they are: moved by a rounding, they would have one.
    floor = 1.0 if width <= 2 else None
    check_against_blocked(f"{regime}, {schedule}", dtype, inputs, ours, blocked, floor=floor, moved=False)


def both_of_attention(forward, backward):
    def run(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, grad: Tensor) -> Arrays:
        out, shares = forward(q, k, v, labels)
        grads = backward(grad, q, k, v, labels, shares, [True] * 3)
        return {"out": out} | dict(zip(("grad q", "grad k", "grad v"), grads, strict=True))

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_negative_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels from one class to all different; shares are left out, their meaning at no negatives is the path's own."""
    choices = Choices(seed, "attention")
    dtype, regime = choices.of(DTYPES), choices.of(REGIMES)
    n, heads, width = choices.between(0, 37), choices.between(1, 2), choices.of((1, 2, 3, 7, 16, 17, 33))
    step = choices.of((16, 32))
    tiles = [AttentionSchedule(4, 1, choices.of((16, 32)), choices.of((16, 32)), step, 16) for _ in range(2)]
    monkeypatch.setattr(attention, "attention_schedules", lambda *_: tuple(tiles))
    inputs = {name: draw(choices, regime, dtype, n, heads, width) for name in ("q", "k", "v", "grad")}
    inputs["labels"] = torch.from_numpy(choices.numbers.integers(0, choices.of((1, 2, 4, 100)), n))
    ours = both_of_attention(attention.negative_attention_forward, attention.negative_attention_backward)
    blocked = both_of_attention(blocked_attention._negative_attention, blocked_attention._negative_attention_backward)
    check_against_blocked(f"{regime}, {tiles}", dtype, inputs, ours, blocked)


def both_of_logits(forward, backward, bias_given: bool):
    def run(rows: Tensor, weight: Tensor, bias: Tensor, target: Tensor, scale: Tensor) -> Arrays:
        bias = bias if bias_given else None
        lse, logit = forward(rows, weight, bias, target)
        grads = backward(rows, weight, bias, target, lse, scale, need_weight=True)
        named = dict(zip(("grad rows", "grad weight", "grad bias"), grads, strict=True))
        return {"loss": lse - logit.double()} | {key: x for key, x in named.items() if x is not None}

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_streamed_logits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(seed, "logits")
    dtype, regime = choices.of(DTYPES), choices.of(REGIMES)
    rows, classes, width = choices.between(1, 33), choices.between(1, 120), choices.of((1, 2, 3, 15, 16, 17, 33, 40))
    tile = class_cross_entropy.LogitTile(4, 2, choices.of((16, 32)), choices.of((16, 32)), choices.of((16, 32)))
    panel = tile.block_rows * choices.between(1, 2), tile.block_classes * choices.between(1, 2)
    monkeypatch.setattr(class_cross_entropy, "logit_tile", lambda *_: tile)
    monkeypatch.setattr(class_cross_entropy, "PROGRAMS", choices.between(1, 12))
    if choices.between(0, 1) and dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(class_cross_entropy, "WITHOUT_PANELS", True)
        monkeypatch.setattr(class_cross_entropy, "takes_no_panel", lambda *_: True)
    monkeypatch.setattr(class_cross_entropy, "panel_shape", lambda r, c, *_: (min(r, panel[0]), min(c, panel[1])))
    inputs = {"rows": draw(choices, regime, dtype, rows, width), "weight": draw(choices, regime, dtype, classes, width)}
    inputs["bias"] = draw(choices, "normal", dtype, classes)
    inputs["target"] = torch.from_numpy(choices.numbers.integers(0, classes, rows))
    inputs["scale"] = (choices.normal(rows) / rows).to(FLOAT64 if dtype == FLOAT64 else torch.float32)
    given = bool(choices.between(0, 1))
    ours = both_of_logits(
        class_cross_entropy.streamed_logsumexp_forward, class_cross_entropy.streamed_logit_gradient, given
    )
    blocked = both_of_logits(streamed_logits.streamed_logsumexp, streamed_logits.streamed_logit_gradient, given)
    # With one class everything is 0 but for roundings.
    check_against_blocked(
        f"{regime}, {tile}, {panel}", dtype, inputs, ours, blocked, floor=1.0 if classes == 1 else None
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_nearest_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the order of ties and the similarities do not depend on tiles."""
    choices = Choices(seed, "nearest")
    dtype, regime = choices.of((torch.float32, torch.float16, torch.bfloat16)), choices.of(REGIMES)
    queries, references, width = choices.between(0, 33), choices.between(0, 70), choices.of((1, 2, 3, 16, 17, 33))
    shipped = nearest.NearestSchedule.for_shape
    sizes = {"block_i": choices.of((16, 32)), "block_j": choices.of((16, 32)), "splits": choices.between(1, 3)}
    monkeypatch.setattr(
        nearest.NearestSchedule, "for_shape", lambda *shape: replace(shipped(*shape), block_d=16, **sizes)
    )
    monkeypatch.setattr(nearest, "PANEL_ELEMENTS", choices.of((20, 40, 100)) * width)
    inputs = {"query": draw(choices, regime, dtype, queries, width)}
    inputs["reference"] = draw(choices, regime, dtype, references, width)
    if choices.between(0, 1):
        inputs["self_index"] = torch.from_numpy(choices.numbers.integers(0, max(references, 1), queries))
    if choices.between(0, 1):
        inputs["labels"] = torch.from_numpy(choices.numbers.integers(0, 4, queries))
        inputs["reference_labels"] = torch.from_numpy(choices.numbers.integers(0, 4, references))
    k, centered = choices.of((1, 3, 16, 40)), bool(choices.between(0, 1))
    values, indices = nearest.nearest_rows(**inputs, k=k, centered=centered)
    expected, chosen = blocked_nearest.nearest_rows(**inputs, k=k, centered=centered)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
