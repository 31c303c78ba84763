"""The compiled passes of the synthesis: the torch form's results, any view, ragged classes, any number of threads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gcng
import gcng.functional as F
from gcng.ops import dispatch, native
from gcng.ops.native_synthesis_kernels import NativeSynthesisKernels
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from tests.mean_errors import MeanErrors
from tests.run_case import equal_bits
from tests.synthesis_sides import (
    SideCase,
    assert_as_accurate,
    assert_same_to_rounding,
    draw_case,
    rounded,
    run_passes,
    side_case,
    ties_by_rounding,
)
from tests.test_losses import BATCHES, assert_same, batch_of, make_criterion, run
from tests.test_losses_golden import PLANS, memory_plan
from tests.test_ops_synthesis import BATCHES as LABELS
from tests.test_ops_synthesis import make

pytestmark = pytest.mark.skipif(native.cpu_status().path is None, reason=f"no C++ kernels: {native.cpu_status().cause}")

TORCH, NATIVE = TorchSynthesisKernels(), NativeSynthesisKernels()
# Blocks of anchors, blocks of classes, one class, singletons only, and the counts of the recipes; more than one block
# of every pass.
COUNTS = {
    "pairs": [2] * 40,
    "triples": [3] * 27,
    "ragged": [1, 5, 2, 8, 1, 1, 3, 4, 7, 2, 6, 1],
    "one class": [6],
    "singletons": [1] * 9,
}
KINDS = {"wide": slice(0, 3), "tall": None, "one anchor": slice(2, 3)}


def big_case(counts: str, width: int, kind: str, *, mirrored: bool = False) -> SideCase:
    """More negatives than anchors, more anchors than negatives, or a single anchor."""
    classes = slice(0, max(1, len(COUNTS[counts]) // 4)) if kind == "tall" else None
    draw = np.random.default_rng(width)
    return side_case(draw, COUNTS[counts], width, anchors=KINDS[kind], classes=classes, mirrored=mirrored, margin=1)


def test_fuzzed_equals_torch() -> None:
    """To rounding in float64; in float32, a sixth of the cases, about as accurate in the mean."""
    errors = MeanErrors()

    @settings(max_examples=3000)
    @given(st.integers(0, 2**32 - 1))
    def one_case(seed: int) -> None:
        case = draw_case(seed)
        if seed % 6:
            ours, truth = (run_passes(kernels, case, torch.float64) for kernels in (NATIVE, TORCH))
            assert_same_to_rounding(ours, truth, case)
            return
        case = rounded(case, torch.float32)
        truth, baseline = (run_passes(TORCH, case, dtype) for dtype in (torch.float64, torch.float32))
        ours = run_passes(NATIVE, case, torch.float32)
        if not ties_by_rounding(case, truth):
            errors.add(ours, truth, baseline)

    one_case()
    errors.check()


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("width", (31, 512))
def test_blocks_equal_torch(width: int, counts: str, kind: str, mirrored: bool) -> None:
    case = big_case(counts, width, kind, mirrored=mirrored)
    assert_same_to_rounding(run_passes(NATIVE, case, torch.float64), run_passes(TORCH, case, torch.float64))


@pytest.mark.parametrize("k", range(1, 9))
def test_chain_lengths(k: int) -> None:
    case = side_case(np.random.default_rng(k), [k] * 5, 40)
    assert_same_to_rounding(run_passes(NATIVE, case, torch.float64), run_passes(TORCH, case, torch.float64))


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("counts", ("pairs", "ragged"))
@pytest.mark.parametrize("width", (64, 100, 512))
def test_float32_is_as_accurate_as_torch(width: int, counts: str, mirrored: bool) -> None:
    case = rounded(side_case(np.random.default_rng(1), COUNTS[counts], width, mirrored=mirrored), torch.float32)
    truth = run_passes(TORCH, case, torch.float64)
    baseline, ours = (run_passes(kernels, case, torch.float32) for kernels in (TORCH, NATIVE))
    assert_as_accurate(ours, truth, baseline)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", ("pairs", "ragged"))
def test_any_number_of_threads_gives_the_same_bits(counts: str, kind: str, dtype: torch.dtype) -> None:
    case, before = big_case(counts, 512, kind), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            results.append(run_passes(NATIVE, case, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(equal_bits(other[name], expected) for name, expected in results[0].items())


def test_equal_vectors_tie_exactly() -> None:
    """A copy of the positive in another class is near in every dtype, in whatever place of a block it stands."""
    for width in (3, 17, 100, 512):
        for dtype in (torch.float32, torch.float64):
            case = side_case(np.random.default_rng(width), [2] * 11, width, anchors=slice(0, 2))
            case.z[2:] = case.z[torch.tensor([1] * 20)]
            out = run_passes(NATIVE, case, dtype)
            assert bool(out["geometry near"].all())
            assert bool((out["geometry slope"] == 0).all())


@pytest.mark.parametrize("where", ("z", "gates", "kappa", "grad_values", "grad_dots", "grad_squares"))
def test_nan_goes_where_torch_puts_it(where: str) -> None:
    for seed in range(20):
        case = side_case(np.random.default_rng(seed), [2, 3, 1, 2, 4], 19, anchors=slice(1, 9))
        values = getattr(case, where).clone()
        values.view(-1)[seed * 37 % values.numel()] = math.nan
        case = replace(case, **{where: values})
        ours, truth = (run_passes(kernels, case, torch.float64) for kernels in (NATIVE, TORCH))
        for name, expected in truth.items():
            assert torch.equal(ours[name].isnan(), expected.isnan()), (seed, name)


def test_no_gradient_that_arrives_is_touched() -> None:
    """Inputs stay as they are, and the rest of the tile of gate gradients too."""
    case = side_case(np.random.default_rng(0), [2, 3], 8, mirrored=True, margin=2)
    copies = {name: getattr(case, name).clone() for name in ("z", "gates", "before", "grad_values", "grad_squares")}
    tile = run_passes(NATIVE, case, torch.float64)["grad gates"]
    assert all(torch.equal(getattr(case, name), copy) for name, copy in copies.items())
    assert torch.equal(tile[:, :2], case.before[:, :2]) and bool((tile[:, 2:] != case.before[:, 2:]).any())


def test_half_precision_gates_are_widened() -> None:
    case = side_case(np.random.default_rng(0), [2, 3, 1], 24)
    ours = run_passes(NATIVE, case, torch.float32, gate_dtype=torch.bfloat16)
    same = run_passes(NATIVE, replace(case, gates=case.gates.bfloat16().double()), torch.float32)
    assert all(equal_bits(ours[name], expected) for name, expected in same.items())


def test_without_the_extension_the_torch_form_runs() -> None:
    case = side_case(np.random.default_rng(0), [2, 3, 1], 24)
    with native.disabled():
        ours = run_passes(NATIVE, case, torch.float32)
    truth = run_passes(TORCH, case, torch.float32)
    assert all(equal_bits(ours[name], expected) for name, expected in truth.items())


def forced():
    return dispatch.forced_kernels(TorchPairKernels(), NATIVE)


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_dense_form_equals_the_definition(labels: list[int]) -> None:
    z, y, gate, mix = make(labels)
    with forced():
        ours = F.synthesize_negatives(z, y, gate, kappa=0.3, mix=mix)
        got = torch.autograd.grad(ours, (z, gate), torch.ones_like(ours).cumsum(-1))
    with gcng.reference_mode():
        truth = F.synthesize_negatives(z, y, gate, kappa=0.3, mix=mix)
    expected = torch.autograd.grad(truth, (z, gate), torch.ones_like(truth).cumsum(-1))
    for a, b in zip((ours, *got), (truth, *expected), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1)


def test_gradcheck() -> None:
    z, y, gate, mix = make([0, 1, 0, 1, 2, 0], width=3)
    with forced():
        assert torch.autograd.gradcheck(
            lambda z, gate: F.synthesize_negatives(z, y, gate, kappa=0.3, mix=mix), (z, gate)
        )


@pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
@pytest.mark.parametrize("name", BATCHES)
def test_criterion_equals_the_reference(name: str, plan, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES[name])
    with memory_plan(monkeypatch, plan), forced():
        ours = run(criterion, z, y, mix)
    with gcng.reference_mode():
        truth = run(criterion, z, y, mix)
    assert_same(ours, truth)
