"""The closeness gate itself: every rule refuses what it is there for, and nothing else."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.closeness import (
    CAPS,
    Closeness,
    ClosenessError,
    assert_close_to_truth,
    assert_error_does_not_grow,
    relative_error,
)

LOW = (torch.float32, torch.float16, torch.bfloat16)


def rounded_case(dtype: torch.dtype, *shape: int, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A truth and a baseline that is off by about ``noise`` roundings of ``dtype``."""
    generator = torch.Generator().manual_seed(7)
    truth = torch.randn(shape, generator=generator, dtype=torch.float64)
    error = noise * torch.finfo(dtype).eps / 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return truth, (truth * (1 + error)).to(dtype)


def failed_rules(
    name: str, ours: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor, **options
) -> set[str]:
    with pytest.raises(ClosenessError) as caught:
        assert_close_to_truth(name, ours, truth, baseline, **options)
    return set(re.findall(r"FAIL (\w+ \w+)", str(caught.value)))


@pytest.mark.parametrize("dtype", LOW)
def test_rounded_truth_and_baseline_pass(dtype):
    truth, baseline = rounded_case(dtype, 40, 30)
    assert not assert_close_to_truth("rounded truth", truth.to(dtype), truth, baseline).failed
    result = assert_close_to_truth("baseline", baseline, truth, baseline)
    assert result.reading("relative L2") == pytest.approx(relative_error(baseline, truth), rel=1e-12)
    assert result.shape == (40, 30) and result.dtype == dtype


@pytest.mark.parametrize("dtype", LOW)
def test_error_all_over_breaks_relative_l2(dtype):
    truth, baseline = rounded_case(dtype, 40, 30)
    ours = (truth + 6 * (baseline.double() - truth)).to(dtype)
    assert "relative L2" in failed_rules("noise", ours, truth, baseline)


def test_single_element_breaks_only_the_rules_for_it():
    truth, baseline = rounded_case(torch.float32, 40, 30)
    ours = truth.float()
    ours[3, 17] += 3 * (baseline.double() - truth).abs().max().item()
    assert failed_rules("element", ours, truth, baseline) == {"largest error"}
    with pytest.raises(ClosenessError, match=r"worst element \(3, 17\): ours .*, truth .*, baseline"):
        assert_close_to_truth("element", ours, truth, baseline)


def test_single_row_breaks_only_the_worst_row():
    # A small row: its error moves neither the norm of the whole nor the largest error.
    truth, baseline = rounded_case(torch.float32, 400, 30)
    truth[11] *= 0.01
    baseline = torch.cat([baseline[:11], truth[11:12].float(), baseline[12:]])
    ours = baseline.clone()
    ours[11] *= 1 + 2e-6
    assert failed_rules("row", ours, truth, baseline) == {"worst row"}


@pytest.mark.parametrize("dtype", LOW)
def test_systematic_factor_breaks_the_scale_rule_below_the_noise(dtype):
    truth, baseline = rounded_case(
        dtype, 300, 200, noise={torch.float32: 600.0, torch.float16: 16.0}.get(dtype, 6.0)
    )
    factor = {torch.float32: 2.5e-5, torch.float16: 3e-3, torch.bfloat16: 6e-3}[dtype]
    caps = {dtype: CAPS[dtype]}
    widened = {dtype: 1.0}
    assert failed_rules("scale", ((1 + factor) * truth).to(dtype), truth, baseline, op_caps=caps) >= {
        "scale bias"
    }
    assert not assert_close_to_truth(
        "widened", ((1 + factor) * truth).to(dtype), truth, baseline, op_caps=widened
    ).failed


@pytest.mark.parametrize("dtype", LOW)
def test_hard_cap_holds_whatever_the_baseline_does(dtype):
    truth, _ = rounded_case(dtype, 40, 30)
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    baseline = (truth + 0.2 * noise).to(dtype)
    ours = (truth + 0.2 * noise.flip(0)).to(dtype)
    assert "hard cap" in failed_rules("cap", ours, truth, baseline)
    generous = {dtype: 0.5}
    assert not assert_close_to_truth("cap", ours, truth, baseline, op_caps=generous).failed


@pytest.mark.parametrize("who", ["ours", "truth", "baseline"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_fail(who, value):
    truth, baseline = rounded_case(torch.float32, 8, 5)
    arrays = {"ours": baseline.clone(), "truth": truth, "baseline": baseline}
    arrays[who][2, 3] = value
    with pytest.raises(ClosenessError, match=rf"1 values of {who} are not finite, the first at \(2, 3\)"):
        assert_close_to_truth("x", arrays["ours"], arrays["truth"], arrays["baseline"])


def test_declared_values_must_sit_where_the_truth_has_them():
    truth, baseline = rounded_case(torch.float32, 40, 5)
    truth[2, 3], truth[4, 0], truth[5, 0] = math.nan, math.inf, -math.inf
    baseline[truth.isnan()] = math.nan
    same = baseline.clone()
    same[4, 0], same[5, 0] = math.inf, -math.inf
    assert not assert_close_to_truth("x", same, truth, same, declared_nonfinite=True).failed
    for place, value in (((2, 3), 0.0), ((4, 0), -math.inf), ((5, 0), math.nan), ((7, 1), math.nan)):
        other = same.clone()
        other[place] = value
        with pytest.raises(ClosenessError, match="not finite in other places"):
            assert_close_to_truth("x", other, truth, same, declared_nonfinite=True)
    wrong = same.clone()
    wrong[8] *= 1.01
    assert "relative L2" in failed_rules("finite part", wrong, truth, same, declared_nonfinite=True)


def test_baseline_that_overflows_hides_nothing():
    truth, baseline = rounded_case(torch.float16, 40, 30)
    truth[0] = 7e4
    baseline[0] = math.inf
    ours = truth.float()
    with pytest.raises(ClosenessError, match="30 values of baseline are not finite"):
        assert_close_to_truth("x", ours, truth, baseline, output_dtype=torch.float32)
    options = {"dtype": torch.float16, "output_dtype": torch.float32, "declared_nonfinite": True}
    assert not assert_close_to_truth("x", ours, truth, baseline, **options).failed
    ours[0] *= 1.02
    assert {"largest error", "scale bias"} <= failed_rules("x", ours, truth, baseline, **options)


def test_kind_is_checked_before_numbers():
    truth, baseline = rounded_case(torch.float32, 8, 5)
    for ours, message in (
        ([1.0], "expected a tensor, got list"),
        (baseline.double(), "dtype is torch.float64, expected torch.float32"),
        (baseline[:, :4], r"shape is \(8, 4\), truth has \(8, 5\)"),
        (baseline.to("meta"), "device is meta, expected cpu"),
    ):
        with pytest.raises(ClosenessError, match=message):
            assert_close_to_truth("x", ours, truth, baseline)
    with pytest.raises(ClosenessError, match="the truth must be float64"):
        assert_close_to_truth("x", baseline, truth.float(), baseline)
    with pytest.raises(ClosenessError, match="expected torch.float32"):
        assert_close_to_truth("x", baseline.half(), truth, baseline.half(), output_dtype=torch.float32)


def test_float64_has_floor_cap_and_documented_bound():
    truth, _ = rounded_case(torch.float64, 40, 30)
    near, far = (
        truth * (1 + 1.5e-13 * torch.sign(truth.flip(0))),
        truth * (1 + 5e-12 * torch.sign(truth.flip(0))),
    )
    assert not assert_close_to_truth("near", near, truth, truth).failed
    assert {"relative L2", "hard cap"} <= failed_rules("far", far, truth, truth)
    assert not assert_close_to_truth("pipeline", far, truth, truth, float64_bound=1e-11).failed
    assert "hard cap" in failed_rules(
        "pipeline", 1 + 1e-10 + truth * 0, 1 + truth * 0, truth * 0 + 1, float64_bound=1e-11
    )


@pytest.mark.parametrize("dtype", LOW)
def test_lucky_baseline_counts_as_one_rounding(dtype):
    truth = torch.tensor(1 / 3, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    lucky = truth.to(dtype)
    assert not assert_close_to_truth("loss", lucky, truth, lucky).failed
    if dtype == torch.float32:
        assert not assert_close_to_truth("loss", lucky * (1 + 4e-7), truth, lucky).failed
    assert "relative L2" in failed_rules(
        "loss", (lucky.double() * (1 + 4 * eps + 2e-6)).to(dtype), truth, lucky
    )


def test_zero_truth_demands_zero_unless_a_scale_is_given():
    truth, zero = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, 4)
    noise = torch.full((6, 4), 1e-9)
    assert not assert_close_to_truth("zero", zero, truth, zero).failed
    assert "hard cap" in failed_rules("zero", noise, truth, zero)
    assert "hard cap" in failed_rules("zero", noise, truth, noise)
    assert not assert_close_to_truth("zero", noise, truth, zero, scale_floor=1.0).failed
    assert "relative L2" in failed_rules("zero", 1e3 * noise, truth, zero, scale_floor=1.0)


def test_gate_is_relative():
    # The same result in other units gets the same verdict; an absolute tolerance would change its mind.
    truth, baseline = rounded_case(torch.float32, 40, 30)
    wrong = baseline * 1.001
    for scale in (2.0**-30, 1.0, 2.0**30):
        assert not assert_close_to_truth("x", scale * baseline, scale * truth, scale * baseline).failed
        rules = failed_rules("x", scale * wrong, scale * truth, scale * baseline)
        assert rules == {"relative L2", "largest error", "worst row", "scale bias", "hard cap"}


def test_integers_must_be_equal_and_empty_arrays_pass():
    index = torch.arange(6)
    assert_close_to_truth("index", index, index, index)
    with pytest.raises(ClosenessError, match="1 of 6 integers differ"):
        assert_close_to_truth("index", index.clone().index_fill_(0, torch.tensor([2]), 9), index, index)
    empty = torch.zeros(0, 5)
    assert assert_close_to_truth("empty", empty, empty.double(), empty).rules == ()


def test_message_lists_every_rule_with_its_numbers():
    truth, baseline = rounded_case(torch.float32, 8, 5)
    with pytest.raises(ClosenessError) as caught:
        assert_close_to_truth("grad weight", baseline * 1.01, truth, baseline)
    message = str(caught.value)
    assert "grad weight: torch.float32, shape (8, 5)" in message
    for rule in ("relative L2", "largest error", "worst row", "scale bias", "hard cap"):
        assert re.search(rf"{rule} +\d\.\d+e[+-]\d+ >  \d\.\d+e[+-]\d+  \(", message), message
    assert "x baseline" in message and "worst element" in message


def test_error_must_not_grow_with_accumulation():
    assert_error_does_not_grow("dW", 2e-3, 2.9e-3)
    with pytest.raises(ClosenessError, match="dW: error grows .* 2.000e-03 with few and 3.100e-03 with many"):
        assert_error_does_not_grow("dW", 2e-3, 3.1e-3)
    with pytest.raises(ClosenessError):
        assert_error_does_not_grow("dW", 2e-3, math.nan)


def test_nan_reading_never_holds():
    from tests.closeness import Rule

    broken = Closeness("x", torch.float32, (1,), (Rule("relative L2", math.nan, 1.0, "test"),), "none")
    assert broken.failed
