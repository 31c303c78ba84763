"""The CUDA kernels of the synthesis on a GPU: float64 torch as the truth, every gate dtype, and the same bits again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gcng
import gcng.functional as F
from gcng.ops import dispatch, native
from gcng.ops.cuda_synthesis_kernels import CudaSynthesisKernels
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from tests.closeness import assert_close_to_truth
from tests.run_case import equal_bits
from tests.synthesis_sides import SideCase, assert_as_accurate, rounded, run_passes, side_case

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TORCH = TorchSynthesisKernels()
GATES = (torch.float32, torch.float16, torch.bfloat16)
# 513 is no multiple of any block; the largest class takes three rounds of four samples.
RAGGED = [3, 1, 2, 9, 4, 5, 2, 1, 8, 2] * 13 + [4, 1, 7, 9, 11]
COUNTS = {"80 pairs": [2] * 40, "80 ragged": [3, 1, 2, 9, 4, 5, 2, 1, 8, 5] * 2, "513 ragged": [*RAGGED]}
SIDES = {"wide": dict(anchors=slice(3, 20)), "tall": dict(classes=slice(1, 9)), "mirrored": dict(mirrored=True)}


@pytest.fixture(scope="module")
def kernels() -> CudaSynthesisKernels:
    device = torch.cuda.current_device()
    if native.cuda(device) is None:
        pytest.skip(f"no CUDA kernels: {native.cuda_status(device).cause}")
    return CudaSynthesisKernels()


def check_passes(kernels: CudaSynthesisKernels, case: SideCase, gates: torch.dtype) -> None:
    """Every pass: about as accurate as torch in float32, and the same bits again."""
    case = rounded(case, torch.float32, gates)
    truth = run_passes(TORCH, case, torch.float64, device=DEVICE)
    baseline = run_passes(TORCH, case, torch.float32, device=DEVICE)
    ours, again = (run_passes(kernels, case, torch.float32, gate_dtype=gates, device=DEVICE) for _ in range(2))
    assert all(equal_bits(again[name], expected) for name, expected in ours.items())
    assert_as_accurate(ours, truth, baseline)


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("width", (64, 100, 384, 512))
@pytest.mark.parametrize("counts", COUNTS)
def test_equals_torch(kernels, counts: str, width: int, side: str, gates: torch.dtype) -> None:
    options = dict(SIDES[side])
    if side == "mirrored":  # a band of anchors at the end, no multiple of a block either
        n = sum(COUNTS[counts])
        options |= dict(anchors=slice(n - 37, n))
    check_passes(kernels, side_case(np.random.default_rng(width), COUNTS[counts], width, margin=1, **options), gates)


def test_equal_vectors_tie_exactly(kernels) -> None:
    for width in (3, 100, 512):
        case = side_case(np.random.default_rng(width), [2] * 9, width, anchors=slice(0, 2))
        case.z[2:] = case.z[torch.tensor([1] * 16)]
        assert bool(run_passes(kernels, case, torch.float32, device=DEVICE)["geometry near"].all())


@pytest.mark.parametrize("n", (80, 513))
@pytest.mark.parametrize("width", (100, 512))
def test_dense_form(kernels, n: int, width: int) -> None:
    """synthesize_negatives forward and backward against the definition in float64."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % (n // 3)
    most = int(torch.bincount(labels).max())
    mix = torch.rand(most, most - 1, generator=generator, dtype=torch.float64)
    z, gate = torch.randn(n, width, generator=generator), torch.rand(n, n, width, generator=generator)
    upstream = torch.randn(n, n // 3, width, generator=generator)
    results = {}
    for name, dtype in (("ours", torch.float32), ("truth", torch.float64), ("baseline", torch.float32)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (z, gate)]
        with dispatch.forced_kernels(TorchPairKernels(), kernels if name == "ours" else TORCH):
            out = F.synthesize_negatives(*leaves[:1], labels, leaves[1], kappa=0.3, mix=mix)
        grads = torch.autograd.grad(out, leaves, upstream.to(out))
        results[name] = [x.detach().cpu() for x in (out, *grads)]
    for part, ours, truth, baseline in zip(("out", "grad z", "grad gate"), *results.values(), strict=True):
        assert_close_to_truth(part, ours, truth, baseline, op_caps={torch.float32: 1e-4})


def test_a_stream_of_ones_own(kernels) -> None:
    """Launches go to the current stream: work queued behind a long wait on another stream sees finished inputs."""
    case = side_case(np.random.default_rng(1), [2] * 20, 128)
    expected = run_passes(kernels, case, torch.float32, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        ours = run_passes(kernels, case, torch.float32, device=DEVICE)
    stream.synchronize()
    assert all(equal_bits(ours[name], value) for name, value in expected.items())


def test_reference_mode_is_not_touched(kernels) -> None:
    z, gate = torch.randn(4, 8, device=DEVICE), torch.rand(4, 4, 8, device=DEVICE)
    arguments = dict(kappa=0.3, mix=torch.rand(2, 1))
    with dispatch.forced_kernels(TorchPairKernels(), kernels):
        ours = F.synthesize_negatives(z, torch.tensor([0, 1, 0, 1]), gate, **arguments)
        with gcng.reference_mode():
            truth = F.synthesize_negatives(z, torch.tensor([0, 1, 0, 1]), gate, **arguments)
    assert torch.allclose(ours, truth, rtol=1e-5, atol=1e-6)
