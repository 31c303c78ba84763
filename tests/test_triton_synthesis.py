"""The Triton passes of the synthesis, interpreted: against their plain torch form, then the whole criterion on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

import gcng
from gcng import functional as F
from gcng.kernels import synthesis, synthesis_geometry, synthesis_gradient
from gcng.memory import MemoryPlan
from gcng.ops import dispatch
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, Synthesis, SyntheticGradients, TorchSynthesisKernels
from gcng.ops.tiles import Tile
from gcng.ops.triton_synthesis_kernels import TritonSynthesisKernels
from tests.closeness import assert_close_to_truth
from tests.run_case import equal_bits
from tests.test_losses import assert_same
from tests.test_losses import run as run_criterion
from tests.test_losses_golden import memory_plan
from tests.triton_interpreter import check_isolated, spread_rows

pytestmark = pytest.mark.interpreter

TRITON, TORCH = TritonSynthesisKernels(), TorchSynthesisKernels()
FLOAT64 = torch.float64
# Several blocks and spans of everything, with remainders: two samples, two anchors, 32 channels at a time. The
# interpreter takes milliseconds a step, so batches are small.
TILE = synthesis.SynthesisTile(4, 2, 2, 2, 32)
# Name -> samples of the classes, channels.
BATCHES = {
    "two": ([2], 1),
    "singletons": ([1, 1], 3),
    "pairs": ([2, 2, 2], 32),
    "ragged": ([3, 1, 2, 1], 37),
    "one class": ([3], 65),
    "one large class": ([1, 5, 1], 40),
}


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: synthesis.SynthesisTile, programs: int = 6) -> None:
    for module in (synthesis, synthesis_gradient):
        monkeypatch.setattr(module, "synthesis_tile", lambda *_: tile)
    monkeypatch.setattr(synthesis, "PROGRAMS", programs)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(monkeypatch, TILE)
    monkeypatch.setattr(synthesis_geometry, "distance_tile", lambda _: synthesis_geometry.DistanceTile(4, 2, 2, 4, 16))


@dataclass
class Case:
    """A class-major batch, the gates and upstream gradients of one tile of its pairs."""

    counts: list[int]
    z: Tensor  # (N, D)
    gate: Tensor  # (R, S, D)
    mix: Tensor
    tile: Tile
    upstream: tuple[Tensor, Tensor, Tensor]  # (N, M, D), (N, M), (N, M): of anchors and classes of the whole batch
    kappa: float = 0.3

    def synthesis(self, kernels: TorchSynthesisKernels, dtype: torch.dtype) -> Synthesis:
        boundaries = [sum(self.counts[:i]) for i in range(len(self.counts) + 1)]
        kappa = torch.tensor(self.kappa, dtype=FLOAT64, device=self.z.device)
        return Synthesis(self.z.to(dtype), boundaries, kappa, self.mix.to(dtype), kernels)

    def to(self, device: torch.device | str) -> Case:
        """The same case on another device."""
        upstream = tuple(x.to(device) for x in self.upstream)
        return replace(
            self, z=self.z.to(device), gate=self.gate.to(device), mix=self.mix.to(device), upstream=upstream
        )


def make_case(
    counts: list[int],
    width: int,
    dtype: torch.dtype = FLOAT64,
    gates: torch.dtype | None = None,
    classes: int | None = None,
) -> Case:
    """The rows of the first ``classes`` classes against all columns; z is random, so that some negatives are near."""
    generator = torch.Generator().manual_seed(width)
    n, m = sum(counts), len(counts)
    rows = sum(counts[: (m + 1) // 2 if classes is None else classes])
    most = max(counts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype)

    gate = torch.rand((rows, n, width), generator=generator, dtype=FLOAT64).to(gates or dtype)
    mix = torch.rand((most, most - 1), generator=generator, dtype=FLOAT64).to(dtype)
    return Case(counts, draw(n, width), gate, mix, Tile(0, rows, 0, n), (draw(n, m, width), draw(n, m), draw(n, m)))


def part_of(case: Case, side: Side, dtype: torch.dtype) -> SyntheticGradients:
    return SyntheticGradients(*(x[side.anchors, side.classes].to(dtype) for x in case.upstream))


def run(case: Case, kernels: TorchSynthesisKernels, dtype: torch.dtype, *, widen: bool = True) -> dict[str, Tensor]:
    """Everything that the passes give for both anchor sides of the tile; torch takes gates in the dtype of z."""
    synth = case.synthesis(kernels, dtype)
    gate = case.gate.to(dtype) if widen else case.gate
    grad_gate = torch.full(case.gate.shape, 0.5, dtype=dtype, device=case.z.device)
    grads, found = EmbeddingGradients(synth), {}
    for side, name in zip(synth.sides(case.tile), ("rows", "columns"), strict=False):
        view, upstream = side.view(gate), part_of(case, side, dtype)
        full = side.synthesize(view)
        found |= {f"{name} {key}": x for key, x in (*side.geometry._asdict().items(), *full._asdict().items())}
        side.add_gate_gradient(full, upstream, side.view(grad_gate))
        side.backward(view, upstream, grads)
    found |= {"grad gate": grad_gate, "grad reach": grads.positive_distance.clone()}
    return found | {"grad z": grads.finish()}


def assert_equal_in_float64(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float = 1e-12) -> None:
    for name, expected in truth.items():
        got = ours[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if expected.dtype == torch.bool:
            assert torch.equal(got, expected), name
        else:
            scale = expected.abs().max().clamp(min=1.0)
            assert bool(((got - expected).abs() <= bound * scale).all()), (name, (got - expected).abs().max())


@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_torch_form(name: str) -> None:
    case = make_case(*BATCHES[name])
    truth = run(case, TORCH, FLOAT64)
    assert_equal_in_float64(run(case, TRITON, FLOAT64), truth)
    if name == "ragged":
        near = truth["rows near"]
        assert bool(near.any()) and not bool(near.all()), "both branches of (17)"


@pytest.mark.parametrize("samples", range(2, 6))
def test_launch_tables_of_the_device(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = make_case([samples, samples - 1], 150)
    assert_equal_in_float64(run(case, TRITON, FLOAT64), run(case, TORCH, FLOAT64))


def test_sums_without_values() -> None:
    case = make_case([2, 3], 37)
    synth = case.synthesis(TRITON, FLOAT64)
    side = synth.sides(case.tile)[0]
    full, sums = (side.synthesize(side.view(case.gate), need_values=need) for need in (True, False))
    assert sums.values is None and equal_bits(sums.dots, full.dots) and equal_bits(sums.squares, full.squares)


@pytest.mark.parametrize("gates", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_close_to_truth(gates: torch.dtype) -> None:
    case = make_case(*BATCHES["ragged"], torch.float32, gates)
    truth, baseline = run(case, TORCH, FLOAT64), run(case, TORCH, torch.float32)
    for key, ours in run(case, TRITON, torch.float32, widen=False).items():
        assert_close_to_truth(key, ours, truth[key], baseline[key], dtype=torch.float32)


def test_long_sums_stay_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(monkeypatch, synthesis.SynthesisTile(4, 2, 8, 8, 16))
    case = make_case([8] * 16, 16, torch.float32, torch.bfloat16, classes=1)
    truth, baseline = run(case, TORCH, FLOAT64), run(case, TORCH, torch.float32)
    ours = run(case, TRITON, torch.float32, widen=False)
    for key in ("grad z", "grad reach"):
        assert_close_to_truth(key, ours[key], truth[key], baseline[key], dtype=torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, FLOAT64), ids=str)
@pytest.mark.parametrize("width", (5, 50))
def test_equal_vectors_tie(width: int, dtype: torch.dtype) -> None:
    case = make_case([2, 2, 2], width, dtype)
    case.z[3] = case.z[0]  # of another class: distance 0, and for 1, whose positive is 0, exactly that of the positive
    case.z[4] = case.z[5]  # a duplicate inside a class: the positive is at distance 0
    ours = run(case, TRITON, dtype)
    assert ours["rows near"][1, 3] and ours["rows near"][0, 3] and ours["rows ratio"][1, 3] == 1
    truth = run(case, TORCH, dtype)
    for name in ("rows near", "columns near"):
        assert torch.equal(ours[name], truth[name])
    if dtype == FLOAT64:
        assert_equal_in_float64(ours, truth)


@pytest.mark.parametrize("used", (1, 2, 4, 6))
def test_some_gradients_only(used: int) -> None:
    case, found = make_case([2, 1], 20), []
    for kernels in (TORCH, TRITON):
        synth = case.synthesis(kernels, FLOAT64)
        grads, grad_gate = EmbeddingGradients(synth), torch.zeros_like(case.gate)
        for side in synth.sides(case.tile):
            full = part_of(case, side, FLOAT64)
            part = SyntheticGradients(*(x if used >> i & 1 else None for i, x in enumerate(full)))
            side.add_gate_gradient(side.synthesize(side.view(case.gate)), part, side.view(grad_gate))
            side.backward(side.view(case.gate), part, grads)
        found.append({"gate": grad_gate, "z": grads.finish()})
    assert_equal_in_float64(found[1], found[0])


def test_strides_of_gates_and_upstream() -> None:
    case = make_case([2, 1, 2], 20)
    truth = run(case, TRITON, FLOAT64)
    case.gate = case.gate.transpose(0, 2).contiguous().transpose(0, 2)  # channels far apart
    case.upstream = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.upstream)
    for name, ours in run(case, TRITON, FLOAT64).items():
        assert equal_bits(ours, truth[name]), name


@pytest.mark.parametrize("where", ("gate", "anchor", "negative"))
def test_a_nan_spoils_what_it_spoils_in_torch(where: str) -> None:
    case = make_case([2, 1, 2], 20)
    if where == "gate":
        case.gate[0, 3, 7] = math.nan
    else:
        case.z[0 if where == "anchor" else 4, 2] = math.nan
    truth = run(case, TORCH, FLOAT64)
    for name, ours in run(case, TRITON, FLOAT64).items():
        assert torch.equal(ours.isnan(), truth[name].isnan()), name
    assert bool(truth["rows values"].isnan().any()) and not bool(truth["rows values"].isnan().all())


def test_repeats_bit_for_bit() -> None:
    case = make_case([3, 2], 37, torch.float32, torch.bfloat16)
    first = run(case, TRITON, torch.float32, widen=False)
    for name, second in run(case, TRITON, torch.float32, widen=False).items():
        assert equal_bits(first[name], second), name


def test_gates_beyond_32_bits() -> None:
    case = make_case([2, 3], 17, torch.float32, torch.float16, classes=1)
    truth = run(case, TRITON, torch.float32, widen=False)
    spread = spread_rows(case.gate.flatten(1), 2**31 + 8)
    case.gate = torch.as_strided(spread, case.gate.shape, (2**31 + 8, 17, 1))
    for name, ours in run(case, TRITON, torch.float32, widen=False).items():
        assert equal_bits(ours, truth[name]), name


def test_stays_inside_its_tensors() -> None:
    check_isolated(
        """
import torch
import tests.test_triton_synthesis as test
from tests.triton_interpreter import guard_allocations, guarded
from gcng.ops import synthesis_tiles
classes, weights = synthesis_tiles.class_tensors, synthesis_tiles.chain_weights
synthesis_tiles.class_tensors = lambda *a: (made := classes(*a))._replace(
    **{name: guarded(x) for name, x in made._asdict().items() if isinstance(x, torch.Tensor)}
)
synthesis_tiles.chain_weights = lambda *a: guarded(weights(*a))
guard_allocations()
for module in (test.synthesis, test.synthesis_gradient):
    module.synthesis_tile = lambda *_: test.TILE
for counts, width, stored in (([2, 3], 35, torch.float16), ([1, 2], 1, torch.float16), ([2, 1], 21, torch.float32)):
    case = test.make_case(counts, width, torch.float32, stored)
    case.z, case.mix, case.gate = guarded(case.z), guarded(case.mix), guarded(case.gate)
    found = test.run(case, test.TRITON, torch.float32, widen=False)
    assert all(x.isfinite().all() for x in found.values())
"""
    )


D, CLASSES = 16, 7
PLANS = {
    "recompute": MemoryPlan(60),
    "everything": MemoryPlan(1000, stash_edges=True, stash_hidden=True, stash_small=True),
}


@pytest.fixture
def on_triton() -> Iterator[None]:
    with dispatch.forced_kernels(TorchPairKernels(), TRITON):
        yield


@pytest.mark.parametrize(
    ("labels", "plan"),
    (([0, 1, 2, 3] * 3, "everything"), ([5, 1, 5, 2, 2, 5, 1, 6], "recompute")),
    ids=("4 x 3", "ragged"),
)
def test_criterion_equals_the_reference(labels: list[int], plan: str, on_triton, monkeypatch) -> None:
    use_tile(monkeypatch, synthesis.SynthesisTile(4, 2, 4, 4, 16), programs=1)
    criterion = gcng.losses.GCAHNGLoss(D, CLASSES, 1, dropout=0.2).double()
    criterion.schedule.j_avg, criterion.schedule.j_gen = 2.0, 25.0
    y, most = torch.tensor(labels), int(torch.bincount(torch.tensor(labels)).max())
    z, mix = torch.randn(len(labels), D, dtype=FLOAT64), torch.rand(most, most - 1, dtype=FLOAT64)
    z[3] = z[1]
    with memory_plan(monkeypatch, PLANS[plan]):
        ours = run_criterion(criterion, z, y, mix)
    with gcng.reference_mode():
        truth = run_criterion(criterion, z, y, mix)
    assert_same(ours, truth, bound=1e-10)


def test_public_function_on_the_passes(on_triton) -> None:
    labels = torch.tensor([4, 1, 4, 0, 1, 1])
    z = torch.randn(6, 19, dtype=FLOAT64, requires_grad=True)
    gate = torch.rand(6, 6, 19, dtype=FLOAT64, requires_grad=True)
    mix, upstream = torch.rand(3, 2, dtype=FLOAT64), torch.randn(6, 3, 19, dtype=FLOAT64)
    ours = F.synthesize_negatives(z, labels, gate, kappa=0.4, mix=mix)
    with gcng.reference_mode():
        truth = F.synthesize_negatives(z, labels, gate, kappa=0.4, mix=mix)
    found, expected = (torch.autograd.grad(x, (z, gate), upstream) for x in (ours, truth))
    for a, b in zip((ours, *found), (truth, *expected), strict=True):
        assert bool(((a - b).abs() <= 1e-12 * b.abs().max()).all())
