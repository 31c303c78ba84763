"""The Triton passes of the synthesis on a GPU: against their torch form, ties, streams, graphs, far offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

import gcng
from gcng.ops import dispatch
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, SyntheticGradients
from tests.closeness import assert_close_to_truth
from tests.run_case import equal_bits
from tests.test_losses import assert_same
from tests.test_losses import run as run_criterion
from tests.test_triton_synthesis import FLOAT64, TORCH, TRITON, assert_equal_in_float64, make_case, part_of, run

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Samples of the classes, channels: the published batches, then odd widths, large and uneven classes.
BATCHES = {
    "40 x 2": ([2] * 40, 512),
    "27 x 3": ([3] * 27, 384),
    "uneven": ([1, 7, 2, 2, 37, 5, 1, 3], 100),
    "one class": ([19], 64),
    "wide": ([4] * 6, 1000),
    "narrow": ([5] * 30, 3),
}


@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_torch_form(name: str) -> None:
    case = make_case(*BATCHES[name]).to(DEVICE)
    assert_equal_in_float64(run(case, TRITON, FLOAT64), run(case, TORCH, FLOAT64))


@pytest.mark.parametrize("gates", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_close_to_truth(name: str, gates: torch.dtype) -> None:
    case = make_case(*BATCHES[name], torch.float32, gates).to(DEVICE)
    truth, baseline = run(case, TORCH, FLOAT64), run(case, TORCH, torch.float32)
    for key, ours in run(case, TRITON, torch.float32, widen=False).items():
        assert_close_to_truth(key, ours, truth[key], baseline[key], dtype=torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, FLOAT64), ids=str)
@pytest.mark.parametrize("width", (5, 384, 512, 1000))
def test_equal_vectors_tie(width: int, dtype: torch.dtype) -> None:
    case = make_case([2] * 20, width, dtype)
    case.z[20:] = case.z[:20]  # every class has a twin: the twin of the positive is exactly as far as the positive
    ours = run(case.to(DEVICE), TRITON, dtype)
    anchors = torch.arange(20)
    assert bool(ours["rows near"][anchors, 20 + (anchors ^ 1)].all())
    assert bool((ours["rows ratio"][anchors, 20 + (anchors ^ 1)] == 1).all())
    assert bool(ours["rows near"][anchors, 20 + anchors].all()), "distance 0 is never farther"


def test_repeats_bit_for_bit_on_any_stream() -> None:
    case = make_case(*BATCHES["uneven"], torch.float32, torch.bfloat16).to(DEVICE)
    first = run(case, TRITON, torch.float32, widen=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for turn in range(4):
        if turn % 2:
            with torch.cuda.stream(stream):
                late = case.to("cpu").to(DEVICE)
                late.gate.fill_(float("nan"))
                torch.cuda._sleep(20_000_000)  # another stream would read the NaN
                late.gate.copy_(case.gate)
                again = run(late, TRITON, torch.float32, widen=False)
            stream.synchronize()
        else:
            again = run(case, TRITON, torch.float32, widen=False)
        assert not [name for name, x in first.items() if not equal_bits(x, again[name])]


def test_passes_are_captured_in_a_cuda_graph() -> None:
    case = make_case(*BATCHES["27 x 3"], torch.float32, torch.bfloat16).to(DEVICE)
    synth = case.synthesis(TRITON, torch.float32)
    found: dict[str, Tensor] = {}

    def passes() -> None:
        side = Side(synth, case.tile.rows, case.tile.columns, slice(None), mirrored=False)
        full, grads = side.synthesize(case.gate), EmbeddingGradients(synth)
        upstream = part_of(case, side, torch.float32)
        grad_gate = torch.zeros(case.gate.shape, device=DEVICE)
        side.add_gate_gradient(full, upstream, grad_gate)
        side.backward(case.gate, SyntheticGradients(None, upstream.dots, upstream.squares), grads)
        found.update(values=full.values, dots=full.dots, grad_gate=grad_gate, grad_z=grads.finish())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    captured = dict(found)
    case.gate.copy_(case.gate.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    passes()
    assert not [name for name, x in captured.items() if not equal_bits(x, found[name])]


@pytest.mark.raw_memory
def test_gates_beyond_32_bits() -> None:
    rows, pairs_of_classes, width = 64, 33_000, 512
    n = 2 * pairs_of_classes
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    case = make_case([2] * 40, width, torch.float32, torch.bfloat16)
    case.counts, case.z = [2] * pairs_of_classes, torch.randn(n, width)
    case.gate = torch.empty(0)
    case = case.to(DEVICE)
    gate = torch.rand((rows, n, width), dtype=torch.bfloat16, device=DEVICE)
    assert gate.numel() > 2**31
    synth, last = case.synthesis(TRITON, torch.float32), slice(n - 64, n)
    far = Side(synth, slice(0, rows), slice(0, n), slice(None), mirrored=False).synthesize(gate)
    near = Side(synth, slice(0, rows), last, slice(None), mirrored=False).synthesize(gate[:, last])
    assert equal_bits(far.values[:, -32:].contiguous(), near.values)
    assert equal_bits(far.dots[:, -32:].contiguous(), near.dots)


def test_criterion_equals_the_reference() -> None:
    torch.manual_seed(1)
    criterion = gcng.losses.GCAHNGLoss(32, 40, 1, dropout=0.2).double().to(DEVICE)
    criterion.schedule.j_avg, criterion.schedule.j_gen = 2.0, 25.0
    labels = torch.arange(32, device=DEVICE).repeat(3)[:-5]
    z = torch.randn(len(labels), 32, dtype=FLOAT64, device=DEVICE)
    mix = torch.rand(3, 2, dtype=FLOAT64, device=DEVICE)
    with dispatch.forced_kernels(TorchPairKernels(), TRITON):
        ours = run_criterion(criterion, z, labels, mix)
    with gcng.reference_mode():
        truth = run_criterion(criterion, z, labels, mix)
    assert_same(on_cpu(ours), on_cpu(truth), bound=1e-10)


def on_cpu(found: tuple) -> tuple:
    terms, grad, grads = found
    return terms.cpu(), grad.cpu(), {name: None if x is None else x.cpu() for name, x in grads.items()}
