"""The whole criterion on a GPU: losses and every gradient of both phases against float64, at real sizes."""

from __future__ import annotations

import warnings

import pytest
import torch

import gcng
from benchmarks import memory
from benchmarks.bench_iteration import OPERATION
from benchmarks.gate import assert_gcng_close
from benchmarks.iteration import make_batch, make_provider
from benchmarks.overhead import capturable, captured
from benchmarks.settings import Setting
from gcng.losses import GCAHNGLoss
from gcng.memory import MemoryPlan
from tests.run_case import equal_bits
from tests.test_losses_golden import memory_plan

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Tiles that do not divide the batch, and what stays of the pairs.
KEPT = {
    "nothing": MemoryPlan(1100),
    "edges": MemoryPlan(1100, stash_edges=True),
    "edges and small": MemoryPlan(1100, stash_edges=True, stash_small=True),
    "edges and hidden": MemoryPlan(1100, stash_edges=True, stash_hidden=True),
    "everything": MemoryPlan(1100, stash_edges=True, stash_hidden=True, stash_small=True),
}
LABELS = torch.arange(40).repeat(2)
RAGGED = torch.arange(80) ** 2 % 30


def arrays_of(provider: str, setting: Setting, precision: str, rounded_to: str | None = None):
    return OPERATION.prepare(provider, setting, precision, DEVICE, rounded_to=rounded_to).arrays()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "autocast"])
@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("samples", [80, 256])
def test_losses_and_gradients_of_both_phases_are_those_of_the_definition(samples, width, precision):
    setting = Setting(1, width, samples)
    truth = arrays_of("reference", setting, "float64", precision)
    baseline = arrays_of("reference", setting, precision)
    ours = arrays_of("gcng", setting, precision)
    assert_gcng_close(OPERATION, "gcng", ours, truth, baseline, precision)


@pytest.mark.parametrize(
    "setting", [Setting(2, 128, 96), Setting(1, 256, 120, samples_per_class=4)], ids=lambda s: s.name
)
def test_layers_and_classes_of_other_sizes(setting):
    truth, baseline = arrays_of("reference", setting, "float64", "float32"), arrays_of("reference", setting, "float32")
    assert_gcng_close(OPERATION, "gcng", arrays_of("gcng", setting, "float32"), truth, baseline, "float32")


@pytest.mark.parametrize("plan", list(KEPT.values()), ids=list(KEPT))
def test_whatever_is_kept_the_numbers_are_the_same(plan, monkeypatch):
    setting = Setting(2, 128, 80)
    truth, baseline = arrays_of("reference", setting, "float64", "float32"), arrays_of("reference", setting, "float32")
    with memory_plan(monkeypatch, plan):
        ours = arrays_of("gcng", setting, "float32")
    assert_gcng_close(OPERATION, "gcng", ours, truth, baseline, "float32")


def test_a_repeated_iteration_gives_the_same_bits():
    ready = OPERATION.prepare("gcng", Setting(1, 256, 192), "bfloat16", DEVICE)
    first = ready.arrays()
    for _ in range(5):
        again = ready.arrays()
        assert not [name for name, x in first.items() if not equal_bits(x, again[name])]


def test_memory_stays_far_below_the_dense_form():
    setting = Setting(1, 512, 512)
    peaks = {
        name: memory.measure("iteration", name, setting, "float32", DEVICE)["peak_bytes"]
        for name in ("gcng-recompute", "reference")
    }
    assert peaks["gcng-recompute"] < peaks["reference"] / 10, peaks


def test_an_iteration_is_captured_in_a_cuda_graph_and_replays_the_same_bits():
    setting = Setting(1, 128, 80)
    provider, batch = make_provider("gcng", setting, torch.float32, DEVICE), make_batch(setting, torch.float32, DEVICE)
    iterate = capturable(provider, batch)
    wanted = iterate().losses
    kept = {}

    def call() -> None:
        kept.update(iterate().losses)

    replay = captured(call)
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert all(equal_bits(kept[name], loss) for name, loss in wanted.items())


def criterion_and_embeddings(**options):
    criterion = GCAHNGLoss(128, 40, **options).to(DEVICE)
    criterion.schedule.j_avg, criterion.schedule.j_gen = 1.5, 30.0
    return criterion, torch.randn(80, 128, device=DEVICE, requires_grad=True)


def iterate(criterion, z, labels, **options):
    """All three losses with their backward; the losses by name."""
    z.grad = None
    criterion.zero_grad(set_to_none=True)
    metric = criterion.metric_terms(z, labels, **options)
    metric.total.backward()
    classifier = criterion.classifier_loss(z, labels)
    classifier.backward()
    generator = criterion.generator_terms(z, labels, **options)
    generator.total.backward()
    losses = metric._asdict() | {"classifier": classifier}
    losses |= {f"generator {name}": loss for name, loss in generator._asdict().items()}
    return {name: loss.detach() for name, loss in losses.items()}


# Deterministic algorithms of torch have copies of their own, so that these run without them.
@pytest.mark.raw_memory
@pytest.mark.parametrize("known", [True, False], ids=["layout", "labels only"])
@pytest.mark.parametrize("plan", [KEPT["nothing"], KEPT["everything"]], ids=["recompute", "everything"])
def test_an_iteration_from_labels_on_the_host_waits_for_nothing(known, plan, monkeypatch):
    criterion, z = criterion_and_embeddings(dropout=0.1)

    def once(labels):
        return iterate(criterion, z, labels, layout=gcng.BatchLayout(labels) if known else None)

    with memory_plan(monkeypatch, plan):
        for _ in range(2):
            once(LABELS), once(LABELS.flip(0))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [once(LABELS), once(RAGGED)]  # classes seen before, and classes never seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(loss.isfinite()) for one in losses for loss in one.values())


@pytest.mark.raw_memory
def test_an_iteration_from_labels_on_the_device_waits_once_a_phase():
    criterion, z = criterion_and_embeddings(dropout=0.1)
    for labels in (LABELS, RAGGED):
        iterate(criterion, z, labels.to(DEVICE))
        here = labels.to(DEVICE)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                iterate(criterion, z, here)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in seen if "synchronizing" in str(warning.message)]
        assert len(waits) == 2, waits


@pytest.mark.raw_memory
@pytest.mark.parametrize(
    ("dropout", "mixed", "moves"),
    [
        (0.5, True, ("synthetic", "generator similarity", "generator diversity")),
        (0.0, False, ("synthetic", "generator class_ce")),
    ],
    ids=["dropout", "mix"],
)
def test_replays_of_a_captured_iteration_draw_numbers_of_their_own(dropout, mixed, moves):
    criterion, z = criterion_and_embeddings(dropout=dropout, singletons="error", official_sim_mask=True)
    layout, labels = gcng.BatchLayout(LABELS), LABELS.to(DEVICE)
    mix = torch.rand(2, 1, device=DEVICE) if mixed else None
    kept = {}
    replay = captured(lambda: kept.update(iterate(criterion, z, labels, layout=layout, mix=mix)))
    seen = []
    for _ in range(2):
        replay()
        seen.append({name: loss.clone() for name, loss in kept.items()} | {"gradient": z.grad.clone()})
    assert all(bool(x.isfinite().all()) for one in seen for x in one.values())
    assert all(not equal_bits(seen[0][name], seen[1][name]) for name in (*moves, "gradient"))
    # What is not drawn is the same in every replay.
    assert all(equal_bits(seen[0][name], seen[1][name]) for name in ("n_pair", "classifier"))


@pytest.mark.raw_memory
def test_a_graph_is_replayed_with_its_own_classes_after_many_others_were_seen():
    criterion, z = criterion_and_embeddings(dropout=0.0)
    layout, labels, mix = gcng.BatchLayout(LABELS), LABELS.to(DEVICE), torch.rand(2, 1, device=DEVICE)
    kept = {}
    replay = captured(lambda: kept.update(iterate(criterion, z, labels, layout=layout, mix=mix)))
    replay()
    wanted = {name: loss.clone() for name, loss in kept.items()}
    for count in range(2, 30):
        iterate(criterion, z, torch.arange(80) % count)
    # Whatever was let go among the small tensors is written over.
    garbage = [torch.full((80,), 2**40, device=DEVICE) for _ in range(4096)]
    replay()
    torch.cuda.synchronize()
    assert garbage and all(equal_bits(kept[name], loss) for name, loss in wanted.items())
