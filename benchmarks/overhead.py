"""What a call costs beside its arithmetic, at N = 80: validation, dispatch and autograd, compiled calls, CUDA graphs.

Ways to call: the public function; the registered op alone; the public function under torch.compile; on a GPU the
replay of a CUDA graph that holds the call. For the whole iteration the same, as far as it goes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

import gcng
from benchmarks.iteration import Batch, Provider, make_batch, make_provider, run_iteration
from benchmarks.memory import one_line
from benchmarks.operations import batch_labels, normal
from benchmarks.results import open_results
from benchmarks.settings import Setting
from gcng import functional

SIZE = Setting(1, 64, 80)
PUBLISHED_SIZE = Setting(1, 512, 80)
CALLS, BATCHES = 50, 7


def ops(setting: Setting, device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """Ways to call each op: name -> way -> call, without gradients."""
    N, D, K = setting.samples, setting.embedding_size, setting.samples_per_class
    x = normal(N, D).float().to(device)
    heads = x.view(N, setting.num_heads, -1)
    labels, gate = batch_labels(setting).to(device), torch.rand(N, N, D, device=device)
    weight, mix = normal(100, D, seed=1).float().to(device), torch.rand(K, K - 1, device=device)
    registered = torch.ops.gcng
    no_index = None
    return {
        "center_normalize": {
            "public function": lambda: functional.center_normalize(x),
            "registered op": lambda: registered.center_normalize(x),
        },
        "negative_attention": {
            "public function": lambda: functional.negative_attention(heads, heads, heads, labels),
            "registered op": lambda: registered.negative_attention(heads, heads, heads, labels),
        },
        "linear_cross_entropy": {
            "public function": lambda: functional.linear_cross_entropy(x, weight, labels),
            "registered op": lambda: registered.linear_cross_entropy(x, weight, labels, None, -100),
        },
        "knn": {
            "public function": lambda: functional.knn(x, k=5),
            "registered op": lambda: registered.knn(x, x, 5, no_index),
        },
        "synthesize_negatives": {
            "public function": lambda: functional.synthesize_negatives(x, labels, gate, kappa=0.5, mix=mix),
        },
    }


def seconds_of(call: Callable[[], object], device: torch.device, calls: int, batches: int) -> dict:
    """Median over batches of the mean time of a call; warmed up."""
    for _ in range(3):
        call()
    means = []
    for _ in range(batches):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        means.append((time.perf_counter() - start) / calls)
    return {"median": statistics.median(means), "min": min(means), "max": max(means), "count": batches}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled(call: Callable[[], object]) -> Callable[[], object]:
    """The call under torch.compile."""
    return torch.compile(call, dynamic=False)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replay of a CUDA graph that holds one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_ops(
    device: torch.device, setting: Setting = SIZE, calls: int = CALLS, batches: int = BATCHES
) -> list[dict]:
    """One row per op and way; a way that does not work is a row that says why."""
    rows = []
    for name, ways in ops(setting, device).items():
        public = ways["public function"]
        makers = {way: (lambda call=call: call) for way, call in ways.items()}
        makers["torch.compile"] = lambda public=public: compiled(public)
        if device.type == "cuda":
            makers["CUDA graph"] = lambda public=public: captured(public)
        for way, make in makers.items():
            row = {"operation": name, "setting": setting.name, "way": way}
            try:
                with torch.no_grad():
                    row |= seconds_of(make(), device, calls, batches)
            except Exception as error:
                row |= {"reason": one_line(error)}
            rows.append(row)
    return rows


def capturable(provider: Provider, batch: Batch) -> Callable[[], object]:
    """An iteration without a copy from the host: labels on the device, classes known."""
    layout = gcng.BatchLayout(batch.labels)
    moved = replace(batch, labels=batch.labels.to(batch.z.device))
    return lambda: run_iteration(provider, moved, layout=layout)


def measure_iteration(device: torch.device, setting: Setting = PUBLISHED_SIZE, calls: int = 3) -> list[dict]:
    """The published setting: one iteration as it is, and on a GPU from a CUDA graph."""
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    provider, batch = make_provider("gcng", setting, precision, device), make_batch(setting, precision, device)
    makers = {"public function": lambda: lambda: run_iteration(provider, batch)}
    if device.type == "cuda":
        makers["CUDA graph"] = lambda: captured(capturable(provider, batch))
    rows = []
    for way, make in makers.items():
        row = {"operation": "iteration", "setting": setting.name, "way": way}
        try:
            row |= seconds_of(make(), device, calls, 3)
        except Exception as error:
            row |= {"reason": one_line(error)}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures the overheads into a results file."""
    options, results = open_results(arguments, __doc__, "overhead")
    device = torch.device(options.device)
    if options.smoke:
        rows = measure_ops(device, Setting(1, 8, 8), 1, 1)[:4] + measure_iteration(device, Setting(1, 16, 8), 1)
    else:
        rows = measure_ops(device)
        results.replace("overhead", rows)
        rows += measure_iteration(device)
    results.replace("overhead", rows)
    results.finish("overhead")
    return 0


if __name__ == "__main__":
    sys.exit(main())
