"""The dense form of the synthesis, compiled: gates and their gradients stay where the caller has them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gcng.functional as F
from gcng.ops import native, synthesis
from gcng.ops.native_synthesis_kernels import NativeSynthesisKernels
from gcng.ops.synthesis_tiles import DISTANCE_OFFSET
from tests.mean_errors import MeanErrors
from tests.run_case import equal_bits
from tests.synthesis_sides import ODD_WIDTHS

pytestmark = pytest.mark.skipif(native.cpu_status().path is None, reason=f"no C++ kernels: {native.cpu_status().cause}")


def draw(seed: int, most: int = 14, widths: tuple[int, ...] = ODD_WIDTHS) -> tuple[Tensor, ...]:
    """z, labels in any order, gate, mix and upstream gradient, float64; some embeddings are copies of others."""
    generator = torch.Generator().manual_seed(seed)
    n, classes, which = (int(torch.randint(1, limit, (), generator=generator)) for limit in (most, 6, 1 << 20))
    labels = torch.randint(0, classes, (n,), generator=generator)
    if which % 4 == 0:
        labels = labels.sort().values
    width, k = widths[which % len(widths)], int(torch.bincount(labels).max())
    z = 3 * width**-0.5 * torch.randn(n, width, generator=generator, dtype=torch.float64)
    if which % 3 == 0:
        z[n // 2 :] = z[: n - n // 2].clone()  # copies: near negatives, ties with the positive
    gate = torch.rand(n, n, width, generator=generator, dtype=torch.float64)
    mix = torch.rand(k, k - 1, generator=generator, dtype=torch.float64)
    grad = torch.randn(n, len(labels.unique()), width, generator=generator, dtype=torch.float64)
    return z, labels, gate, mix, grad


def results(z: Tensor, labels: Tensor, gate: Tensor, mix: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and both gradients."""
    z, gate = z.detach().requires_grad_(), gate.detach().requires_grad_()
    out = F.synthesize_negatives(z, labels, gate, kappa=0.3, mix=mix)
    grad_z, grad_gate = torch.autograd.grad(out, (z, gate), grad)
    return {"out": out.detach(), "grad z": grad_z, "grad gate": grad_gate}


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float = 1e-12) -> None:
    for name, expected in truth.items():
        error = (ours[name] - expected).abs().max()
        assert error <= bound * expected.abs().max().clamp(min=1), (name, error, expected.abs().max())


def ties_by_rounding(z: Tensor) -> bool:
    """Whether two nodes are as far from a third up to roundings: see :func:`tests.synthesis_sides.ties_by_rounding`."""
    distance = (z[None] - z[:, None] - DISTANCE_OFFSET).norm(dim=2).sort(1).values
    gap = distance.diff(dim=1)
    return bool(((gap > 0) & (gap <= 1e-5 * distance[:, 1:])).any())


def blocked(seed: int, case: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Results of the compiled passes in blocks, and on a number of threads, that the seed chooses."""
    before = synthesis.DENSE_PAIRS, torch.get_num_threads()
    try:
        synthesis.DENSE_PAIRS = (1, 9, 4096, 4096)[seed % 4]
        torch.set_num_threads(1 + seed % 3)
        return results(*case)
    finally:
        synthesis.DENSE_PAIRS = before[0]
        torch.set_num_threads(before[1])


def test_fuzzed_equals_torch() -> None:
    """To rounding in float64; in float32, a fifth of the cases, about as accurate in the mean."""
    errors = MeanErrors()

    @settings(max_examples=3000)
    @given(st.integers(0, 2**32 - 1))
    def one_case(seed: int) -> None:
        case = draw(seed)
        if seed % 5:
            with native.disabled():
                truth = results(*case)
            assert_same(blocked(seed, case), truth)
            return
        narrow = tuple(x.float() if x.is_floating_point() else x for x in case)
        exact = tuple(x.double() if x.is_floating_point() else x for x in narrow)
        with native.disabled():
            truth, baseline = results(*exact), results(*narrow)
        ours = blocked(seed, narrow)
        if not ties_by_rounding(exact[0]):
            errors.add(ours, truth, baseline)

    one_case()
    errors.check()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    for labels in (torch.arange(40).repeat(2), torch.arange(70) % 9, torch.arange(60) // 7 % 5):
        n, width, before = len(labels), 320, torch.get_num_threads()
        k = int(torch.bincount(labels).max())
        generator = torch.Generator().manual_seed(n)
        shapes = (n, width), (n, n, width), (k, k - 1), (n, len(labels.unique()), width)
        z, gate, mix, grad = (torch.rand(shape, generator=generator, dtype=dtype) for shape in shapes)
        case = z, labels, gate, mix, grad
        found = []
        try:
            for threads in (1, 2, 3, 8, 2):
                torch.set_num_threads(threads)
                found.append(results(*case))
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            assert all(equal_bits(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gates_that_are_gathered_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the passes are as accurate here as tests/test_native_synthesis.py shows for gates of a side."""
    cases = [tuple(x.to(dtype) if x.is_floating_point() else x for x in draw(seed, 40)) for seed in range(60)]
    ours = [results(*case) for case in cases]
    monkeypatch.setattr(NativeSynthesisKernels, "of_all_pairs", lambda *_: None)
    for case, found in zip(cases, ours, strict=True):
        assert all(torch.equal(found[name], value) for name, value in results(*case).items())


def test_views_of_gates_are_read_where_they_are() -> None:
    z, labels, gate, mix, grad = draw(5, 20, (24,))
    truth = results(z, labels, gate, mix, grad)
    swapped = gate.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((*gate.shape[:2], 40), math.nan, dtype=gate.dtype)[..., 3:27].copy_(gate)
    scattered = gate.movedim(2, 0).contiguous().movedim(0, 2)  # channels are far apart: gathered
    for view in (swapped, padded, scattered):
        assert view.stride() != gate.stride()
        assert_same(results(z, labels, view, mix, grad), truth, 1e-14)
    assert_same(results(z, labels, gate, mix, grad.transpose(0, 1).contiguous().transpose(0, 1)), truth, 0.0)


def test_nothing_that_arrives_at_singletons_matters() -> None:
    labels = torch.tensor([3, 1, 1, 0, 3, 7])
    generator = torch.Generator().manual_seed(0)
    z, gate = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((6, 20), (6, 6, 20)))
    mix, grad = torch.rand(2, 1, generator=generator), torch.rand(6, 4, 20, generator=generator).double()
    clean = results(z, labels, gate, mix, grad)
    gate[[3, 5]], grad[[3, 5]] = math.nan, math.nan
    spoiled = results(z, labels, gate, mix, grad)
    assert all(equal_bits(spoiled[name], value) for name, value in clean.items())
    assert bool((clean["out"][[3, 5]] == 0).all()) and bool((clean["grad gate"][[3, 5]] == 0).all())


def test_only_the_gradient_that_is_asked_for() -> None:
    z, labels, gate, mix, grad = draw(11)
    truth = results(z, labels, gate, mix, grad)
    z.requires_grad_()
    (grad_z,) = torch.autograd.grad(F.synthesize_negatives(z, labels, gate, kappa=0.3, mix=mix), z, grad)
    assert equal_bits(grad_z, truth["grad z"])


def test_a_wrong_order_is_refused() -> None:
    z, zeros, out = torch.rand(4, 8), torch.zeros(4, 4), torch.zeros(4, 2, 8)
    starts, anchors, gate = torch.tensor([0, 2, 4]), torch.ones(4, dtype=torch.bool), torch.zeros(4, 4, 8)

    def forward(order: Tensor | None, anchors: Tensor | None, gate: Tensor = gate) -> None:
        native.cpu().synthesis_forward(z, starts, 0, gate, zeros, zeros, order, anchors, out, None, None)

    forward(torch.tensor([2, 0, 3, 1]), anchors)
    with pytest.raises(RuntimeError, match="order has row 2 twice"):
        forward(torch.tensor([2, 0, 2, 1]), anchors)
    with pytest.raises(RuntimeError, match="order of node 1 is no node"):
        forward(torch.tensor([2, 4, 3, 1]), anchors)
    with pytest.raises(RuntimeError, match="order and is_anchor come together"):
        forward(torch.tensor([2, 0, 3, 1]), None)
    with pytest.raises(RuntimeError, match=r"gate is not \(4, 4, D\)"):
        forward(torch.tensor([2, 0, 3, 1]), anchors, gate[:3])


@pytest.mark.raw_memory
def test_huge_pages_change_no_byte() -> None:
    for size in (0, 1, 1 << 10, (1 << 22) + 5):
        x = torch.arange(size, dtype=torch.int32)
        native.cpu().prefer_huge_pages(x)
        assert torch.equal(x, torch.arange(size, dtype=torch.int32))
