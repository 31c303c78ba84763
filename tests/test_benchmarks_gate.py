"""The gate before any timing: it refuses what is wrong, and knows how rounding grows."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import bench_iteration, operations, plan, preparation, published
from benchmarks.gate import assert_gcng_close, assert_same_formula, formula_error, gradient_limit, iteration_arrays
from benchmarks.iteration import make_batch, make_provider, run_iteration
from benchmarks.results import Results
from benchmarks.settings import Setting
from tests.closeness import ClosenessError

SMALL = Setting(1, 16, 8)
ITERATION = bench_iteration.OPERATION


def arrays_of(provider, precision="float32", rounded_to=None):
    return ITERATION.prepare(provider, SMALL, precision, rounded_to=rounded_to).arrays()


@pytest.fixture(scope="module")
def truth():
    return arrays_of("published", "float64", "float32")


@pytest.mark.parametrize("key", ["metric/z", "generator/edge0.ff2.w", "classifier/scls.b", "generator/bn_edge.w"])
def test_the_gate_refuses_a_wrong_gradient(key, truth):
    baseline, ours = arrays_of("reference"), arrays_of("gcng")
    check = (truth, baseline, "float32")
    assert assert_gcng_close(ITERATION, "gcng", ours, *check) < 1e-4
    ours[f"gradient {key}"] *= 1.002
    with pytest.raises(ClosenessError, match=f"gcng gradient {key}"):
        assert_gcng_close(ITERATION, "gcng", ours, *check)


def test_the_gate_refuses_a_wrong_loss_and_a_missing_gradient(truth):
    baseline, ours = arrays_of("reference"), arrays_of("gcng")
    ours["loss spread"] += 1e-2
    with pytest.raises(ClosenessError, match="gcng loss spread"):
        assert_gcng_close(ITERATION, "gcng", ours, truth, baseline, "float32")
    del ours["gradient generator/gate.w"]
    with pytest.raises(ClosenessError, match=r"gcng has no \['gradient generator/gate.w'\]"):
        assert_gcng_close(ITERATION, "gcng", ours, truth, baseline, "float32")


def test_a_peer_must_compute_the_same_formula_as_accurately_as_it_likes(truth):
    theirs = arrays_of("published")
    assert assert_same_formula("published", theirs, truth, "float32") < 1e-2
    theirs["gradient metric/z"] *= 1.02
    with pytest.raises(ClosenessError, match="published gradient metric/z: relative L2 error 2.0e-02"):
        assert_same_formula("published", theirs, truth, "float32")


@pytest.mark.parametrize("provider", ["published", "published-compiled", "reference"])
def test_gradients_of_a_proven_form_have_no_limit_where_rounding_explains_more(provider, truth):
    limits = {N: gradient_limit(ITERATION, provider, Setting(1, 128, N), "float32") for N in (8, 40, 160, 320, 640)}
    assert limits == {8: 1e-2, 40: 1e-2, 160: 1e-2, 320: math.inf, 640: math.inf}
    wide = Setting(1, 128, 640)
    assert gradient_limit(ITERATION, provider, wide, "float64") == 1e-9
    assert gradient_limit(ITERATION, provider, wide, "bfloat16") == 0.3
    for name, operation in (("gcng", ITERATION), ("liger", ITERATION), (provider, operations.load("edges"))):
        assert gradient_limit(operation, name, wide, "float32") == 1e-2
    theirs = arrays_of("published")
    theirs["gradient generator/edge0.ln.b"] *= -4
    assert assert_same_formula(provider, theirs, truth, "float32", limits[640]) == pytest.approx(5, rel=1e-3)
    with pytest.raises(ClosenessError, match="gradient generator/edge0.ln.b: relative L2 error 5"):
        assert_same_formula(provider, theirs, truth, "float32", limits[160])
    theirs["gradient metric/z"][0, 0] = math.inf
    with pytest.raises(ClosenessError, match="gradient metric/z: relative L2 error inf"):
        assert_same_formula(provider, theirs, truth, "float32", limits[640])
    theirs = arrays_of("published")
    theirs["loss class_ce"] *= 1.02
    with pytest.raises(ClosenessError, match="loss class_ce: relative L2 error 2.0e-02, over 1e-02"):
        assert_same_formula(provider, theirs, truth, "float32", limits[640])


class _Changed:
    """A module, some of whose names mean something else."""

    def __init__(self, module, **changes):
        self._module, self._changes = module, changes

    def __getattr__(self, name):
        return self._changes.get(name) or getattr(self._module, name)


class _Unbiased(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * (1 - 1 / x.shape[0]) ** 0.5


_constants = published.LossConstants
# What a formulation could get wrong and stay close to right: one name of the module, what it is then.
CHANGED_FORMULAS = {
    "gelu": ("nnf", {"gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}),
    "attention scale": ("math", {"sqrt": lambda width: math.sqrt(width + 1)}),
    "no extra logit": ("torch", {"cat": lambda x, dim: torch.cat((x[0], x[1] - math.inf), dim)}),
    "unbiased variance": ("nn", {"BatchNorm1d": _Unbiased}),
    "eps of a norm": ("nn", {"LayerNorm": lambda width: torch.nn.LayerNorm(width, eps=1.1e-5)}),
    "distance eps": ("_DISTANCE_EPS", 1.1e-6),
    "weight of a loss": ("LossConstants", lambda: _constants(l2_reg=3.003e-3)),
    "mask of (25)": ("LossConstants", lambda: _constants(official_sim_mask=True)),
    "alpha of (16)": ("LossConstants", lambda: _constants(alpha=5.01)),
}


@pytest.mark.parametrize("name", CHANGED_FORMULAS)
def test_a_changed_formula_is_caught_however_little_it_changes(name, monkeypatch):
    attribute, change = CHANGED_FORMULAS[name]
    if isinstance(change, dict):
        change = _Changed(getattr(published, attribute), **change)
    formula_error.cache_clear()
    monkeypatch.setattr(published, attribute, change)
    try:
        with pytest.raises(ClosenessError, match="published beside reference at N8-D16-L1: .* over 1e-09 for float64"):
            formula_error("iteration", "published", Setting(1, 128, 640))
        with pytest.raises(ClosenessError, match="reference beside published"):
            formula_error("iteration", "reference", Setting(1, 128, 640))
    finally:
        formula_error.cache_clear()


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_the_forms_written_here_have_the_same_formulas(name):
    for setting in (Setting(1, 128, 640), Setting(2, 64, 160, samples_per_class=4)):
        for provider in operations.load(name).providers:
            proven = formula_error(name, provider, setting)
            assert proven < 1e-11
            assert (proven > 0) <= (provider.removesuffix("-compiled") in ("published", "reference"))


def test_a_peer_with_a_changed_formula_is_not_timed(tmp_path, monkeypatch):
    """Its error here is far below what rounding may do."""
    formula_error.cache_clear()
    monkeypatch.setattr(published, "_DISTANCE_EPS", 1.1e-6)
    session = preparation.Preparation(Results.open(tmp_path / "r.json"), "cpu", 1, float("inf"), 1e12, memory_too=False)
    entry = plan.Entry("iteration", SMALL, ("published", "reference", "gcng"), rounds=1)
    try:
        with pytest.raises(pytest.skip.Exception, match="published beside reference"):
            session.ready(plan.cases_of([entry])[0])
    finally:
        formula_error.cache_clear()
    assert session.current.row["providers"]["published"]["status"] == "refused"


def test_what_is_zero_or_cancels_is_left_out_of_the_gate():
    outcome = run_iteration(make_provider("gcng", SMALL), make_batch(SMALL), keep_gradients=True)
    names = iteration_arrays(outcome)
    assert "loss diversity" not in names and "loss spread" in names
    assert "generator/edge0.k.b" in outcome.gradients and "gradient generator/edge0.k.b" not in names
