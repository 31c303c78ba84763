"""Where an iteration's time goes: seconds, products and bytes of every gcng op in it, against this machine's rates.

A dispatch mode sees each op of gcng once, whatever runs inside, and times it; what is left is torch's own: the maps of
nodes, norms, and the losses' arithmetic. Products are the useful ones, by formula; bytes are those of the op's tensors,
each read or written once, the least that it can move.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import operations
from benchmarks.bench_iteration import OPERATION
from benchmarks.iteration import make_batch, make_provider
from benchmarks.plan import OURS
from benchmarks.rates import copy_rate, product_rate
from benchmarks.results import open_results
from benchmarks.settings import Setting, executed_generator_units

REST = "torch outside of gcng's ops"
ROUNDS = 5
SETTINGS = (Setting(1, 512, 160), Setting(1, 128, 160))
GPU_SETTINGS = (Setting(1, 512, 1024), Setting(1, 512, 4096))
MOST_WITHOUT = 1024  # samples of which an iteration without the extension is measured: a larger one takes minutes
# Products over pairs in units of D² for an unordered pair: the op itself, and every layer of a lazy field below it.
OWN_UNITS = {
    "messages": 2, "messages_backward": 2, "edges": 0, "edges_backward": 0,
    "n_pair_synthesis": 2, "generator_synthesis": 2, "generator_synthesis_backward": 4,
}  # fmt: skip
LAYER_UNITS = {"forward": 16, "backward": 32}
# As the profiler of torch names them. Not aten::bmm: of two matrices with one row or column it is a sum, no product.
PRODUCT_CALLS = {"aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"}


class OpTimer(TorchDispatchMode):
    """Times the ops of gcng; on a GPU it waits for each, so that the sum can exceed the time without it."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__()
        self.setting, self.device = setting, device
        self.stages: dict[str, dict[str, float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace != "gcng":
            return func(*args, **(kwargs or {}))
        self._wait()
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._wait()
        seconds = time.perf_counter() - start
        name = func._schema.name.split("::")[1]
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        stage = self.stages.setdefault(name, {"seconds": 0.0, "calls": 0, "flops": 0.0, "bytes": 0.0})
        stage["seconds"] += seconds
        stage["calls"] += 1
        stage["flops"] += useful_products(name, named, self.setting)
        stage["bytes"] += sum(x.numel() * x.element_size() for x in (*_tensors(args), *_tensors(out)))
        return out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def useful_products(name: str, arguments: dict[str, Any], setting: Setting) -> float:
    """Operations of an op's products that no formulation over unordered pairs leaves out."""
    D, C = setting.embedding_size, setting.training_classes
    if name.startswith("negative_attention"):
        return (8.0 if "backward" in name else 4.0) * setting.samples**2 * D
    if name.startswith("linear_cross_entropy"):
        rows, classes = arguments["x"].shape[0], arguments["weight"].shape[0]
        return (4.0 if "backward" in name else 2.0) * rows * classes * arguments["x"].shape[1]
    if name not in OWN_UNITS:
        return 0.0
    layers = len(arguments.get("chain", ())) // _chain_width()
    units = OWN_UNITS[name] + layers * LAYER_UNITS["backward" if name.endswith("backward") else "forward"]
    if name == "messages_backward" and arguments["need_base"]:
        units += 2
    classifier = 0.0
    if name.startswith("generator_synthesis"):
        rows = setting.samples * setting.batch_classes
        classifier = (4.0 if name.endswith("backward") else 2.0) * rows * C * D
    return units * float(D * D) * setting.unordered_pairs + classifier


def _chain_width() -> int:
    from gcng.ops.pair_field import CHAIN_WIDTH

    return CHAIN_WIDTH


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def measure(
    setting: Setting, provider: str, precision: str, device: str, rounds: int = ROUNDS, copy_bytes: int | None = None
) -> dict:
    """Stages of one iteration and, between its rounds, what the machine can do then: medians, after a warm-up."""
    place = torch.device(device)
    ready = OPERATION.prepare(provider, setting, precision, device)
    ready.run()
    totals, found, products, copies = [], [], [], []
    for _ in range(rounds):
        products.append(product_rate(setting.embedding_size, precision, device)["flops"])
        copies.append(copy_rate(device, copy_bytes)["bytes"])
        timer = OpTimer(setting, place)
        start = time.perf_counter()
        with timer:
            ready.run()
        totals.append(time.perf_counter() - start)
        found.append(timer.stages)
    stages = {
        name: {**found[0][name], "seconds": statistics.median(one[name]["seconds"] for one in found)}
        for name in found[0]
    }
    total = statistics.median(totals)
    stages[REST] = {"seconds": total - sum(stage["seconds"] for stage in stages.values()), "flops": 0.0, "bytes": 0.0}
    generator = generator_phase(setting, provider, precision, device, rounds)
    alone = {} if place.type == "cuda" else {"outside_products": outside_products(ready, rounds)}
    return {
        "generator": generator, **alone,
        "setting": setting.as_dict(), "name": setting.name, "provider": provider, "precision": precision,
        "seconds": total, "stages": stages,
        "rates": {"gemm_flops": statistics.median(products), "copy_bytes": statistics.median(copies)},
    }  # fmt: skip


def outside_products(ready: operations.Ready, rounds: int) -> dict:
    """Seconds of an iteration on the CPU in calls of a matrix product, and in everything else; medians of rounds."""
    inside, outside = [], []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = time.perf_counter()
            ready.run()
            seconds = time.perf_counter() - start
        calls = sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in PRODUCT_CALLS) / 1e6
        inside.append(calls)
        outside.append(seconds - calls)
    return {"products": statistics.median(inside), "rest": statistics.median(outside)}


def generator_phase(setting: Setting, provider: str, precision: str, device: str, rounds: int) -> dict:
    """The generator phase alone: seconds, and its products as shares of the product rate beside it.

    Useful products, and those executed: what the memory plan does not keep is computed again.
    """
    place, dtype = torch.device(device), operations.PRECISIONS[precision]
    made, batch = make_provider(provider, setting, dtype, device), make_batch(setting, dtype, device)

    def once() -> None:
        made.criterion.zero_grad(set_to_none=True)
        made.criterion.generator_terms(batch.z, batch.labels, mix=batch.generator_mix).total.backward()

    with made.mode():
        plan = made.criterion.graph.memory_plan(batch.z)
        once()
        spent, rate = [], []
        for _ in range(rounds):
            clock = operations.Clock(place)
            clock.mark()
            once()
            clock.mark()
            spent.append(clock.passes()["forward"])
            rate.append(product_rate(setting.embedding_size, precision, device)["flops"])
    kept = {name: getattr(plan, name) for name in ("stash_edges", "stash_hidden", "stash_small")}
    per_unit = float(setting.embedding_size**2) * setting.unordered_pairs
    everything = dict.fromkeys(kept, True)
    units = {"useful": everything, "executed": kept}
    flops = {
        which: executed_generator_units(setting.num_layers, **flags) * per_unit + setting.classifier_flops()
        for which, flags in units.items()
    }
    seconds, product = statistics.median(spent), statistics.median(rate)
    shares = {f"{which}_share": count / seconds / product for which, count in flops.items()}
    return {"seconds": seconds, "gemm_flops": product, "plan": kept, **shares}


def main(arguments: list[str] | None = None) -> int:
    """Measures the stages into a results file."""
    options, results = open_results(arguments, __doc__, "stages")
    on_gpu = options.device.startswith("cuda")
    settings, sizes = (GPU_SETTINGS if on_gpu else SETTINGS), {}
    if options.smoke:
        settings, sizes = (OPERATION.tiny,), {"rounds": 1, "copy_bytes": 2**16}
    found = results.of_this_source("stages")
    done = {(one["name"], one["provider"]) for one in found}
    for setting in settings:
        for provider in OURS if setting.samples <= MOST_WITHOUT else OURS[:1]:
            if (setting.name, provider) in done:
                continue
            if time.time() > options.deadline:
                return 0  # not finished: the next run goes on
            try:
                precision = "bfloat16" if on_gpu else "float32"
                found.append(measure(setting, provider, precision, options.device, **sizes))
            except operations.Unavailable:
                continue
            results.replace("stages", found)
    results.finish("stages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
