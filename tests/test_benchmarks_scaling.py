"""Exponents of memory beside those of gcng's own estimate."""

from __future__ import annotations

import math

import pytest

import gcng
from benchmarks import operations, scaling
from benchmarks.results import row_name, work_of
from benchmarks.settings import Setting

MACHINE = {"memory_bytes": 16 * 2**30}
SIZES = (160, 320, 640)


def row(setting, provider, peak, name="iteration"):
    operation = operations.load(name)
    return {
        "name": row_name(name, setting, "float32"), "operation": name, "precision": "float32",
        "setting": setting.as_dict(), "work": work_of(operation, setting, "float32"),
        "providers": {provider: {"status": "measured", "memory": {"peak_bytes": peak}}},
    }  # fmt: skip


def results_of(peaks, provider="gcng", name="iteration", machine=MACHINE):
    return {"machine": machine, "rows": [row(Setting(1, 128, n), provider, peak, name) for n, peak in peaks.items()]}


def estimate(n):
    """By hand: the loss's estimate at its default budget, and two of everything that has a gradient."""
    held = 2 * 4 * (n * 128 + 28 * 128**2 + 2 * max(100, n // 2) * 128)
    return gcng.estimate_memory(n, 128, memory_budget="640MiB").peak_bytes + held


def test_memory_stands_beside_the_estimate_of_the_same_sizes():
    peaks = {n: 0.9 * estimate(n) for n in SIZES}
    (found,) = scaling.scalings(results_of(peaks))
    assert found.estimate.points == 3 and found.memory.exponent == pytest.approx(found.estimate.exponent)
    assert found.estimate == scaling.fit(SIZES, [estimate(n) for n in SIZES])
    assert found.of_estimate == pytest.approx(0.9)
    more = peaks | {640: 2 * estimate(640)}
    (worse,) = scaling.scalings(results_of(more))
    assert worse.of_estimate == pytest.approx(2) and worse.memory.exponent > worse.estimate.exponent + 0.3


@pytest.mark.parametrize(
    ("provider", "name", "machine"),
    [("published", "iteration", MACHINE), ("gcng", "edges", MACHINE), ("gcng", "iteration", {**MACHINE, "gpu": "x"})],
)
def test_where_the_estimate_says_nothing_there_is_none(provider, name, machine):
    (found,) = scaling.scalings(results_of(dict.fromkeys(SIZES, 10**8), provider, name, machine), provider)
    assert found.memory is not None and found.estimate is None and found.of_estimate is None


def test_a_setting_without_any_plan_has_no_estimate():
    huge = row(Setting(1, 512, 16384), "gcng", 10**9)
    assert scaling.estimated_bytes({"memory_bytes": 2**28}, huge) is None


def test_two_points_do_not_say_how_far_off_a_slope_is():
    assert scaling.fit([1, 2], [3, 6]) == scaling.Fit(pytest.approx(1), math.inf, 2)
