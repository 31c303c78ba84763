"""The whole criterion on a GPU: losses and every gradient of both phases against float64, at real sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory
from benchmarks.bench_iteration import OPERATION
from benchmarks.gate import assert_gcng_close
from benchmarks.iteration import make_batch, make_provider
from benchmarks.overhead import capturable, captured
from benchmarks.settings import Setting
from tests.run_case import equal_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


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


def test_nothing_kept_gives_the_same_numbers():
    setting = Setting(2, 128, 96)
    truth, baseline = arrays_of("reference", setting, "float64", "float32"), arrays_of("reference", setting, "float32")
    ready = OPERATION.prepare("gcng-recompute", setting, "float32", DEVICE)
    assert_gcng_close(OPERATION, "gcng-recompute", ready.arrays(), truth, baseline, "float32")


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
