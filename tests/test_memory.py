"""The memory budget: sizes, plans, the estimate, and the proof that no tensor over all pairs and channels exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gcng
from gcng.memory import MemoryPlan, default_budget, format_bytes, parse_bytes, plan_memory

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

# One phase after the other at a size whose N x N x D tensor alone is larger than the limit.
LIMITED = """
import json, resource, torch, gcng
torch.set_num_threads(2)
n, width, limit = {n}, {width}, {limit}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
torch.manual_seed(0)
criterion = gcng.losses.GCAHNGLoss(width, 100)
z = torch.randn(n, width, requires_grad=True)
labels = torch.arange(n) // 2 % 100
metric = criterion.metric_terms(z, labels)
metric.total.backward()
generator = criterion.generator_terms(z, labels)
generator.total.backward()
refused = False
try:
    torch.empty(n, n, width)
except RuntimeError:
    refused = True
print(json.dumps(dict(
    losses=[metric.total.item(), generator.total.item()], refused=refused,
    finite=all(p.grad is None or bool(p.grad.isfinite().all()) for p in criterion.parameters()),
    missing=sorted(name for name, p in criterion.named_parameters() if p.grad is None),
)))
"""


def test_no_tensor_over_all_pairs_and_channels() -> None:
    # 2,048 samples, 128 channels: one N x N x D tensor is 2.1 GB; the whole data segment gets 900 MB.
    script = LIMITED.format(n=2048, width=128, limit=900 * 10**6)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["refused"], "the limit holds: the dense tensor cannot be allocated"
    assert result["finite"] and all(loss > 0 for loss in result["losses"])
    assert result["missing"] == []


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the most elements that any op returned, those inside the gcng ops included."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_every_allocation_fits_the_plan() -> None:
    n, width = 128, 16
    criterion = gcng.losses.GCAHNGLoss(width, 10, 2, memory_budget="1700KiB")
    z, labels = torch.randn(n, width, requires_grad=True), torch.arange(n) % 10
    plan = criterion.graph.memory_plan(z)
    assert not plan.stash_edges
    with LargestAllocation() as seen:
        criterion.metric_terms(z, labels).total.backward()
        criterion.generator_terms(z, labels).total.backward()
    # At least the rows of one class times all columns make a tile, its hidden tensor is four times as wide.
    assert seen.largest < n * n * width // 4


@pytest.mark.parametrize(
    ("text", "size"), (("2GiB", 2 * 2**30), ("500 MB", 500_000_000), ("1.5k", 1536), (4096, 4096), ("1e6", 10**6))
)
def test_parse_bytes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ("", "GiB", "-1", 0, "1 parsec", "nan", float("nan"), float("inf")))
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        parse_bytes(text)


def test_parse_bytes_refuses_types() -> None:
    with pytest.raises(TypeError, match="memory_budget must be a number of bytes or a string, got bool"):
        parse_bytes(True)


def test_plans_keep_more_with_more_budget() -> None:
    kept = []
    for budget in (40 * MIB, 200 * MIB, 400 * MIB, 4096 * MIB):
        estimate = plan_memory(320, 256, 1, budget=budget)
        assert estimate.peak_bytes <= budget
        assert estimate.peak_bytes == sum(estimate.terms.values())
        plan = estimate.plan
        kept.append(plan.stash_edges + plan.stash_hidden + plan.stash_small)
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 3


def test_default_budget() -> None:
    assert default_budget(64 * 2**30) == 640 * MIB
    assert default_budget(1024 * MIB) == 256 * MIB


def test_estimate_names_its_terms() -> None:
    estimate = gcng.estimate_memory(256, 64, 2, 1000, memory_budget="1GiB")
    assert {"nodes", "tile workspace", "edges", "hidden", "classifier"} <= set(estimate.terms)
    assert estimate.peak_bytes == sum(estimate.terms.values())
    assert estimate.terms["classifier"] == 4 * 1000 * 65 * 4
    assert format_bytes(estimate.peak_bytes) in str(estimate)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    (
        ((0, 64), {}, "num_samples must be a positive integer, got 0"),
        ((8, 64, 1.5), {}, "num_layers must be a positive integer, got 1.5"),
        ((8, 64), {"dtype": "int8"}, "dtype 'int8' is unknown; use one of float16"),
        ((8, 64), {"memory_budget": "much"}, "memory_budget is 'much'"),
    ),
)
def test_estimate_refuses(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gcng.estimate_memory(*arguments, **options)


def test_estimate_refuses_what_cannot_fit() -> None:
    with pytest.raises(MemoryError, match=r"N = 16384, D = 512, L = 1 needs .* GiB \(nodes .*raise memory_budget"):
        gcng.estimate_memory(16384, 512, memory_budget="64MiB")


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("sizes", ((16384, 512), (1000, 64), (40, 16)), ids=str)
def test_the_budget_that_a_refusal_names_is_enough(sizes: tuple[int, int], device: str) -> None:
    options = {"dtype": "bfloat16", "device": device}
    for budget in ("64KiB", "1MiB", "4MiB", "20MiB", "64MiB", "1GiB"):
        try:
            gcng.estimate_memory(*sizes, memory_budget=budget, **options)
        except MemoryError as refusal:
            enough = re.search(r"raise memory_budget to at least (\d+ MiB),", str(refusal))[1]
            assert gcng.estimate_memory(*sizes, memory_budget=enough, **options).peak_bytes <= parse_bytes(enough)


@pytest.mark.parametrize(("n", "limit"), ((4096, 6e9), (16384, 24e9)))
def test_recomputing_on_a_gpu_takes_gigabytes(n: int, limit: float) -> None:
    estimate = gcng.estimate_memory(n, 512, 1, 100, dtype="bfloat16", device="cuda", memory_budget=int(limit))
    assert estimate.peak_bytes <= limit
    assert not estimate.plan.stash_edges, "what 16-bit edges of all pairs take: 8.6 GB and 137 GB"
    # Each tile is hundreds of launches: as few tiles as half of the budget allows, up to the largest one.
    workspace = estimate.terms["tile workspace"]
    assert workspace <= limit / 2 and (workspace > 0.4 * limit or estimate.plan.pairs_per_tile == 131_072)


def test_a_gpu_prefers_few_large_tiles_and_keeps_what_is_worth_more_than_their_launches() -> None:
    def plan(budget: str, **options: object) -> MemoryPlan:
        sizes = {"dtype": "bfloat16", "device": "cuda", "memory_budget": budget} | options
        return gcng.estimate_memory(1024, 512, **sizes).plan

    everything = MemoryPlan(131_072, True, True, True)
    assert plan("40GiB") == everything
    # Tiles of 15,258 pairs with everything kept start more kernels than the products saved are worth.
    assert plan("6GB") == MemoryPlan(61_035, True, False, True)
    # In float32 products take longer, launches do not: the hidden layers are kept rather than large tiles.
    assert plan("24GB", dtype="float32").stash_hidden


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_more_budget_never_refuses_what_less_could_do(device: str) -> None:
    """Half of it goes to the tile only where the rest still fits."""
    fitted = False
    for step in range(160):
        try:
            estimate = gcng.estimate_memory(
                4096, 512, dtype="bfloat16", device=device, memory_budget=int(1e8 * 1.05**step)
            )
        except MemoryError:
            assert not fitted, step
            continue
        fitted = True
        assert estimate.peak_bytes <= estimate.budget_bytes
    assert fitted and estimate.plan.stash_hidden


def test_operands_are_16_bit_on_a_gpu_only() -> None:
    sizes = {
        (dtype, device): gcng.estimate_memory(256, 64, dtype=dtype, device=device, memory_budget="1GiB").terms["edges"]
        for dtype in ("float32", "bfloat16")
        for device in ("cpu", "cuda")
    }
    assert sizes["bfloat16", "cuda"] * 2 == sizes["bfloat16", "cpu"] == sizes["float32", "cpu"]
    assert sizes["float32", "cuda"] == sizes["float32", "cpu"]


def test_estimate_for_a_gpu_wants_a_budget() -> None:
    with pytest.raises(ValueError, match="needs a memory_budget"):
        gcng.estimate_memory(256, 64, device="cuda")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        gcng.estimate_memory(256, 64, device="tpu")
