"""Every op's benchmark: its providers agree, its work is counted right, and the lists that go beside the rows."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import accuracy, operations, rates, stages
from benchmarks.gate import assert_gcng_close, assert_same_formula
from benchmarks.operations import Unavailable
from benchmarks.plan import COMPILING
from benchmarks.providers import extension, without_extension
from benchmarks.settings import Setting
from tests.closeness import ClosenessError

OPS = tuple(name for name in operations.OPERATIONS if name != "iteration")
CASES = [
    (name, provider)
    for name in OPS
    for provider in operations.load(name).providers
    if not provider.endswith("-compiled") and provider not in COMPILING
]


def arrays_of(operation, provider, precision="float32", rounded_to=None):
    return operation.prepare(provider, operation.tiny, precision, rounded_to=rounded_to).arrays()


@pytest.mark.parametrize(("name", "provider"), CASES)
def test_providers_compute_the_same_outputs_and_gradients(name, provider):
    operation = operations.load(name)
    truth, baseline = arrays_of(operation, "reference", "float64", "float32"), arrays_of(operation, "reference")
    assert any(key.startswith("grad ") for key in truth) == bool(operation.make_inputs(operation.tiny).leaves)
    try:
        ready = operation.prepare(provider, operation.tiny, "float32")
    except Unavailable as reason:
        assert provider not in ("gcng", "reference", "published") and str(reason)
        return
    ours = ready.arrays()
    if provider.startswith("gcng"):
        assert assert_gcng_close(operation, provider, ours, truth, baseline, "float32") < 1e-5
    else:
        assert assert_same_formula(provider, ours, truth, "float32") < 1e-5
    passes = ready.run()
    assert set(passes) == ({"forward", "backward", "both"} if ready.differentiates else {"forward"})
    assert set(operation.work(operation.tiny, 4)) >= set(passes) - {"both"}


@pytest.mark.parametrize("name", OPS)
def test_the_gate_of_every_op_refuses_a_changed_result(name):
    operation = operations.load(name)
    truth, baseline = arrays_of(operation, "reference", "float64", "float32"), arrays_of(operation, "reference")
    for key in truth:
        ours = arrays_of(operation, "gcng")
        ours[key] = ours[key] * 1.001
        with pytest.raises(ClosenessError, match=f"gcng {key}"):
            assert_gcng_close(operation, "gcng", ours, truth, baseline, "float32")


@pytest.mark.parametrize("name", ["attention", "messages", "class_cross_entropy", "retrieval"])
def test_useful_products_are_those_that_torch_counts_in_the_definition(name):
    from torch.utils.flop_counter import FlopCounterMode

    operation, setting = operations.load(name), Setting(1, 16, 64)
    ready = operation.prepare("reference", setting, "float32")
    with FlopCounterMode(display=False) as counter:
        outputs = ready.form.forward()
    executed, useful = counter.get_total_flops(), operation.work(setting, 4)["forward"].flops
    # The definition maps both orders of a pair; N and N + 1 differ by the self pairs.
    ordered = 2 * 64 / 65 if name == "messages" else 1
    assert executed == pytest.approx(useful * ordered)
    if ready.differentiates:
        with FlopCounterMode(display=False) as counter:
            ready.gradients(outputs[0])
        assert counter.get_total_flops() == pytest.approx(operation.work(setting, 4)["backward"].flops * ordered)


def test_edges_count_the_two_maps_of_the_published_formulation_less_its_attention():
    from torch.utils.flop_counter import FlopCounterMode

    D, N = 16, 32
    ready = operations.load("edges").prepare("published", Setting(1, D, N), "float32")
    with FlopCounterMode(display=False) as counter:
        ready.form.forward()
    counts = counter.get_flop_counts()["Global"]
    linear = counts[torch.ops.aten.addmm] if torch.ops.aten.addmm in counts else counts[torch.ops.aten.mm]
    # Of 13 units per ordered pair, 8 are the MLP; node maps are 2 N D².
    assert linear == 2 * 13 * D * D * N * N + 2 * N * D * D
    useful = operations.load("edges").work(Setting(1, D, N), 4)["forward"].flops
    assert useful == 2 * 8 * D * D * N * (N + 1) / 2


def test_inputs_are_rounded_before_the_truth_sees_them():
    operation = operations.load("attention")
    ready = operation.prepare("reference", operation.tiny, "float64", rounded_to="bfloat16")
    q = ready.inputs["q"].detach()
    assert q.dtype == torch.float64 and torch.equal(q, q.bfloat16().double())
    with pytest.raises(ValueError, match="provider is 'nobody'"):
        operation.prepare("nobody", operation.tiny)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        operation.prepare("gcng", operation.tiny, "int8")
    with pytest.raises(ValueError, match="operation is 'nothing'"):
        operations.load("nothing")


def test_without_the_extension_gives_the_same_numbers_by_another_path():
    from gcng.ops import native

    before = native.cpu() is not None if extension("cpu") != "none" else False
    with without_extension():
        assert native.cpu() is None
        inside = arrays_of(operations.load("edges"), "gcng")
    assert (native.cpu() is not None) == before if before else True
    outside = arrays_of(operations.load("edges"), "gcng")
    for key, x in outside.items():
        assert torch.allclose(inside[key], x, rtol=1e-4, atol=1e-5), key


def test_tf32_is_a_setting_of_the_call_alone():
    before = torch.get_float32_matmul_precision()
    with operations.precision_mode("tf32", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with operations.precision_mode("autocast", torch.device("cpu")):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


def test_stages_see_every_op_and_count_the_products_of_an_iteration():
    setting = Setting(1, 16, 16)
    found = stages.measure(setting, "gcng", "float32", "cpu", rounds=1, copy_bytes=2**16)
    ops = {name: stage for name, stage in found["stages"].items() if name != stages.REST}
    assert {"messages", "messages_backward", "edges", "edges_backward", "negative_attention"} <= set(ops)
    attention = 2 * 12.0 * setting.samples**2 * 16  # both phases, forward and backward
    entropies = sum(s["flops"] for name, s in ops.items() if name.startswith("linear_cross_entropy"))
    counted = sum(stage["flops"] for stage in ops.values()) - attention - entropies
    # (19), the node predictions and (23) are no maps of pairs; the rest is what `useful_flops` counts.
    assert counted == pytest.approx(setting.useful_flops())
    assert found["rates"]["gemm_flops"] > 0 and found["rates"]["copy_bytes"] > 0
    assert math.isclose(sum(s["seconds"] for s in found["stages"].values()), found["seconds"])
    assert found["generator"]["useful_share"] <= found["generator"]["executed_share"]
    assert all(seconds > 0 for seconds in found["outside_products"].values())


def test_accuracy_stands_beside_that_of_the_definition():
    row = accuracy.entry(operations.load("messages"), Setting(1, 16, 8), "bfloat16", "cpu")
    for found in row["providers"].values():
        assert found["worst"] == max(found["errors"].values()) > 0
        assert found["array"] in found["errors"]
    assert set(row["providers"]) >= {"reference", "gcng"}
    assert set(accuracy.PRECISIONS["cuda"]) == set(operations.PRECISIONS)
    assert set(accuracy.PRECISIONS["cpu"]) == set(operations.PRECISIONS) - {"tf32"}


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_accuracy_in_float64_is_the_distance_to_the_definition(name):
    operation = operations.load(name)
    row = accuracy.entry(operation, operation.tiny, "float64", "cpu")
    assert row["precision"] == "float64" and row["providers"]["reference"]["worst"] == 0
    for provider in ("gcng", "gcng-no-extension") if extension("cpu") != "none" else ("gcng",):
        assert 0 <= row["providers"][provider]["worst"] < 1e-11, provider


def test_rates_are_those_of_a_product_and_a_copy():
    found = rates.measure("cpu", widths=(16,), copy_bytes=2**16)
    assert found["gemm"]["float32"]["16"]["shape"] == [rates.GEMM_ROWS, 16, 64]
    assert found["copy"]["bytes_moved"] == 2**17 and found["copy"]["bytes"] > 0


def test_inputs_are_drawn_once_for_all_providers_of_a_setting_on_a_gpu():
    operations._last_draws.cache_clear()
    calls, gpu = [], torch.device("cuda")

    def draw(key):
        calls.append(key)
        return torch.ones(key, dtype=torch.float64)

    for setting in (3, 3, 4):
        tensor = operations.drawn(draw, setting, gpu)
        grad = operations.drawn(operations.upstream_gradient, (2, setting), gpu)
        again = operations.drawn(draw, setting, gpu), operations.drawn(operations.upstream_gradient, (2, setting), gpu)
        assert again[0] is tensor and again[1] is grad and grad.dtype == torch.bfloat16
    assert calls == [3, 4]
    assert operations.drawn(draw, 4, torch.device("cpu")) is not operations.drawn(draw, 4, torch.device("cpu"))
    operations._last_draws.cache_clear()


def test_what_is_kept_is_copied_before_it_is_used():
    inputs = operations.load("gates").make_inputs(operations.load("gates").tiny)
    moved = inputs.to(torch.float64, torch.device("cpu"))
    assert all(moved[name].data_ptr() != x.data_ptr() for name, x in inputs.tensors.items())
