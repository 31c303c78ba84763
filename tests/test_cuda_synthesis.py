"""The CUDA kernels of the synthesis, compiled for the host and run thread by thread: arithmetic, indices and arguments.

The .cu files are C++ in front of tests/cuda_on_host, which runs every lane of a warp as a fiber. What this cannot show
is how a GPU schedules them (tests/test_gpu_synthesis.py) and what nvcc makes of them (tests/test_cuda_sources.py).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gcng
from gcng.ops import cuda_synthesis_kernels, dispatch
from gcng.ops.cuda_synthesis_kernels import CudaSynthesisKernels
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from tests.far_memory import FarChannels, little_memory
from tests.mean_errors import MeanErrors
from tests.run_case import equal_bits
from tests.synthesis_sides import (
    SideCase,
    assert_as_accurate,
    draw_case,
    rounded,
    run_passes,
    side_case,
    ties_by_rounding,
)
from tests.test_losses import BATCHES, batch_of, make_criterion, run

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the CUDA kernels for the host with")

TORCH = TorchSynthesisKernels()
RAGGED = [1, 5, 2, 8, 1, 3, 4, 9]
GATES = (torch.float32, torch.float16, torch.bfloat16)
# An address that is no multiple of 16 bytes, or a row that has odd channels left over, is an error, not a slow access.
CHECKS = ["-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CudaSynthesisKernels:
    """The launchers, for tensors on the CPU."""
    target = tmp_path_factory.mktemp("cuda") / "synthesis.so"
    sources = sorted((ROOT / "csrc" / "cuda").glob("synthesis*.cu"))
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas", *CHECKS]
    flags.append("-U_FORTIFY_SOURCE")  # which some compilers define, and which takes a jump between fibers for an error
    folders = ["-I", str(ROOT / "tests" / "cuda_on_host"), "-I", str(ROOT / "csrc")]
    command = [COMPILER, *flags, *folders, "-x", "c++", *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return CudaSynthesisKernels(library=ctypes.CDLL(str(target)))


def check_passes(kernels: CudaSynthesisKernels, case: SideCase, gates: torch.dtype) -> dict[str, torch.Tensor]:
    """Every pass on float32 embeddings: about as accurate as the torch form, and the same bits again."""
    case = rounded(case, torch.float32, gates)
    truth = run_passes(TORCH, case, torch.float64)
    baseline = run_passes(TORCH, case, torch.float32)
    ours, again = (run_passes(kernels, case, torch.float32, gate_dtype=gates) for _ in range(2))
    assert_as_accurate(ours, truth, baseline)
    assert all(equal_bits(again[name], expected) for name, expected in ours.items())
    return ours


def test_fuzzed_is_as_accurate_as_torch(kernels: CudaSynthesisKernels) -> None:
    """3,000 cases in all three storages of gates, judged in the mean: a single row may be lucky in either form."""
    errors = MeanErrors()

    @settings(max_examples=3000)
    @given(st.integers(0, 2**32 - 1))
    def one_case(seed: int) -> None:
        gates = GATES[seed % 3]
        case = rounded(draw_case(seed), torch.float32, gates)
        truth, baseline = (run_passes(TORCH, case, dtype) for dtype in (torch.float64, torch.float32))
        ours = run_passes(kernels, case, torch.float32, gate_dtype=gates)
        assert all(ours[name].shape == expected.shape for name, expected in truth.items())
        if not ties_by_rounding(case, truth):
            errors.add(ours, truth, baseline)

    one_case()
    errors.check()


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("width", (7, 33, 64, 100, 264))
def test_equals_torch(kernels: CudaSynthesisKernels, width: int, gates: torch.dtype, mirrored: bool) -> None:
    draw = np.random.default_rng(width)
    check_passes(kernels, side_case(draw, RAGGED, width, anchors=slice(2, 19), mirrored=mirrored, margin=1), gates)


@pytest.mark.parametrize("width", (1, 2))
def test_one_and_two_channels(kernels: CudaSynthesisKernels, width: int) -> None:
    case = side_case(np.random.default_rng(9), RAGGED, width)
    ours, truth = run_passes(kernels, case, torch.float32), run_passes(TORCH, case, torch.float32)
    for name, expected in truth.items():
        assert torch.allclose(ours[name], expected, rtol=1e-5, atol=1e-4), name


@pytest.mark.parametrize("counts", ([2] * 9, [6], [1] * 7, [4, 4, 4]), ids=str)
def test_class_sizes(kernels: CudaSynthesisKernels, counts: list[int]) -> None:
    check_passes(kernels, side_case(np.random.default_rng(1), counts, 40), torch.float32)


@pytest.mark.parametrize("which", ((True, False, False), (False, True, True), (False, True, False)))
def test_gradients_that_do_not_arrive(kernels: CudaSynthesisKernels, which: tuple[bool, bool, bool]) -> None:
    case = side_case(np.random.default_rng(2), [3, 2, 4], 48, classes=slice(1, 3))
    check_passes(kernels, replace(case, which=which), torch.float32)


@pytest.mark.parametrize("threads", (1, 1 << 10, 1 << 30))
def test_parts_of_a_sum(kernels: CudaSynthesisKernels, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part, several of several terms with a rest, as many as there are terms."""
    monkeypatch.setattr(cuda_synthesis_kernels, "GRADIENT_THREADS", threads)
    check_passes(kernels, side_case(np.random.default_rng(3), [2] * 11, 64, anchors=slice(0, 13)), torch.bfloat16)


def test_unaligned_tensors(kernels: CudaSynthesisKernels) -> None:
    """Rows that lie 4 or 2 bytes beside a multiple of 16, with a width that would allow wide accesses."""
    case = side_case(np.random.default_rng(4), [2, 3, 2], 64)
    aligned = check_passes(kernels, case, torch.bfloat16)

    def beside(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
        return out.copy_(x)

    class Beside(CudaSynthesisKernels):
        def synthesize(self, side, gate, *, need_values):
            return super().synthesize(side, beside(gate), need_values=need_values)

        def add_gate_gradient(self, side, synthetic, grads, out):
            values, moved = beside(synthetic.values), beside(out)
            super().add_gate_gradient(side, synthetic._replace(values=values), grads, moved)
            out.copy_(moved)

        def embedding_gradient(self, side, gate, grads, out):
            super().embedding_gradient(side, beside(gate), grads._replace(values=beside(grads.values)), out)

    moved = Beside(library=kernels._library)
    ours = run_passes(moved, rounded(case, torch.float32, torch.bfloat16), torch.float32, gate_dtype=torch.bfloat16)
    for name, expected in aligned.items():
        assert torch.allclose(ours[name], expected, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("gates", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("far_anchors", (False, True))
def test_strides_beyond_32_bits(
    kernels: CudaSynthesisKernels, far_anchors: bool, mirrored: bool, gates: torch.dtype
) -> None:
    with little_memory():
        for width in (19, 64):
            case = side_case(np.random.default_rng(1), [3, 1, 2], width, anchors=slice(1, 4), mirrored=mirrored)
            near = run_passes(kernels, case, torch.float32, gate_dtype=gates)
            far = FarChannels(kernels, far_anchors=far_anchors)
            results = run_passes(far, case, torch.float32, gate_dtype=gates)
            assert all(equal_bits(results[name], expected) for name, expected in near.items())


def test_equal_vectors_tie_exactly(kernels: CudaSynthesisKernels) -> None:
    for width in (3, 17, 100, 512):
        case = side_case(np.random.default_rng(width), [2] * 6, width, anchors=slice(0, 2))
        case.z[2:] = case.z[torch.tensor([1] * 10)]
        assert bool(run_passes(kernels, case, torch.float32)["geometry near"].all())


def test_nan_goes_where_torch_puts_it(kernels: CudaSynthesisKernels) -> None:
    for where in ("z", "gates", "kappa", "grad_values", "grad_dots", "grad_squares"):
        case = side_case(np.random.default_rng(5), [2, 3, 1], 20)
        values = getattr(case, where).clone()
        values.view(-1)[7 % values.numel()] = torch.nan
        case = replace(case, **{where: values})
        ours, truth = run_passes(kernels, case, torch.float32), run_passes(TORCH, case, torch.float32)
        for name, expected in truth.items():
            assert torch.equal(ours[name].isnan(), expected.isnan()), (where, name)


def test_other_dtypes_take_the_other_form(kernels: CudaSynthesisKernels) -> None:
    case = side_case(np.random.default_rng(6), [2, 3, 1], 20)
    ours, truth = (run_passes(form, case, torch.float64) for form in (kernels, TORCH))
    assert all(equal_bits(ours[name], expected) for name, expected in truth.items())


def test_a_refused_launch_is_an_error(kernels: CudaSynthesisKernels) -> None:
    with pytest.raises(RuntimeError, match="synthesis kernel positive_distance was not launched on cpu: CUDA error 9"):
        kernels._launch("positive_distance", torch.ones(1), None, 2**40, 1, None)


@pytest.mark.parametrize("name", ("sample-major 3 x 3", "ragged, shuffled", "one anchor class"))
def test_criterion_in_float32(kernels: CudaSynthesisKernels, name: str) -> None:
    """The whole criterion with these passes, against the torch form of the same passes."""
    criterion, (z, y, mix) = make_criterion(dtype=torch.float32), batch_of(BATCHES[name])
    results = []
    for form in (kernels, TORCH):
        with dispatch.forced_kernels(TorchPairKernels(), form):
            results.append(run(criterion, z.float(), y, mix))
    ours, others = results
    assert torch.allclose(ours[0], others[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours[1], others[1], rtol=1e-4, atol=1e-5)
    for parameter, expected in others[2].items():
        if expected is not None:
            assert torch.allclose(ours[2][parameter], expected, rtol=1e-3, atol=1e-5), parameter
    with gcng.reference_mode():
        truth = run(criterion.double(), z.float().double(), y, mix)
    assert torch.allclose(ours[0].double(), truth[0], rtol=1e-4, atol=1e-5)
