"""What a call costs beside its arithmetic, at N = 80: the op boundary, autograd, compiled calls, CUDA graphs.

Ways to call: the implementation alone, a Python function on the arguments that the op gives it; the registered op,
which adds dispatch, and autograd where gradients are asked for; the public function, which adds validation; that under
torch.compile; on a GPU the replay of a CUDA graph that holds the call. Each forward without gradients, and forward and
backward; the implementation alone then is that of the op and that of its backward, without autograd between them. The
difference of two ways is what the one adds. For the whole iteration the same, as far as it goes.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gcng
from benchmarks.compiled_iteration import COMPILE_SECONDS, compile_in_process, measured_beside
from benchmarks.fields import class_major_labels, edge_field
from benchmarks.iteration import Batch, Provider, make_batch, make_provider, run_iteration
from benchmarks.memory import one_line
from benchmarks.operations import batch_labels, normal
from benchmarks.results import Results, open_results
from benchmarks.settings import Setting
from gcng import functional
from gcng.nn.layers import EdgeLayer
from gcng.ops.synthesis import dense_pairs

SIZE = Setting(1, 64, 80)
PUBLISHED_SIZE = Setting(1, 512, 80)
CALLS, BATCHES = 50, 7
WAY_SECONDS = 0.7  # of timed calls by one way: fewer calls where they are long
# Ways by the beginning of their names, in the order in which all ops are called by them: a capture that fails may spoil
# what comes after it, and compiling takes the longest.
LATER = ("CUDA graph", "torch.compile")
LATE = "no time left"
BOTH = ", forward and backward"


@dataclass(frozen=True)
class Case:
    """An op as it is called: ``leaves`` are differentiated, none where the op has no backward.

    Args:
        registered: calls the op itself. public: the function that users call, None where a module calls the op.
    """

    leaves: tuple[Tensor, ...]
    registered: Callable[[], Any]
    public: Callable[[], Any] | None = None

    def with_gradients(self, call: Callable[[], Any]) -> Callable[[], tuple[Tensor, ...]]:
        """Forward, and backward of a random gradient of the first output."""
        with torch.enable_grad():
            upstream = torch.randn_like(_first(call()))

        def both() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(_first(call()), self.leaves, upstream)

        return both

    def implementation(self, gradients: bool) -> Callable[[], list]:
        """What the op runs for the registered call, on the same arguments and without PyTorch between them."""
        recorder = _Recorder()
        call = self.with_gradients(self.registered) if gradients else self.registered
        with recorder:
            call()
        calls = [(implementation(name), arguments) for name, arguments in recorder.calls]
        return lambda: [function(*arguments) for function, arguments in calls]


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


class _Recorder(TorchDispatchMode):
    """Keeps the name and the arguments of every call of an op of gcng, whatever runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "gcng":
            self.calls.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


def implementation(name: str) -> Callable[..., Any]:
    """The function under an op: `_<op>` in its module of `gcng.ops`. LookupError where there is none, or several."""
    modules = [module for key, module in sys.modules.items() if key.startswith("gcng.ops.")]
    owned = {vars(m)[f"_{name}"] for m in modules if getattr(vars(m).get(f"_{name}"), "__module__", "") == m.__name__}
    if len(owned) != 1:
        raise LookupError(f"gcng::{name} has {len(owned)} functions named _{name} in gcng.ops, expected 1")
    return owned.pop()


def cases(setting: Setting, device: torch.device) -> dict[str, Case]:
    """Every op that can be called by itself, by name."""
    N, D, K = setting.samples, setting.embedding_size, setting.samples_per_class
    labels = batch_labels(setting).to(device)
    x, weight = (_leaf(normal(rows, D, seed=seed), device) for rows, seed in ((N, 0), (100, 1)))
    q, k, v = (_leaf(normal(N, setting.num_heads, D // setting.num_heads, seed=s), device) for s in (2, 3, 4))
    gate, mix = _leaf(torch.rand(N, N, D), device), torch.rand(K, K - 1, device=device)
    kappa, constant = torch.tensor(0.5, dtype=torch.float64), x.detach()
    classes = labels.cpu()  # as the public function wants them where it shall not wait for a GPU
    op = torch.ops.gcng
    itself = torch.arange(N, device=device)
    return {
        "center_normalize": Case(
            (x,), lambda: op.center_normalize(x), lambda: functional.center_normalize(x)
        ),
        "negative_attention": Case(
            (q, k, v), lambda: op.negative_attention(q, k, v, labels),
            lambda: functional.negative_attention(q, k, v, labels),
        ),
        "linear_cross_entropy": Case(
            (x, weight), lambda: op.linear_cross_entropy(x, weight, labels, None, -100),
            lambda: functional.linear_cross_entropy(x, weight, labels, reduction="none"),
        ),
        "knn": Case(
            (), lambda: op.knn(constant, constant, 5, itself), lambda: functional.knn(constant, k=5)
        ),
        "synthesize_negatives": Case(
            (x, gate), lambda: op.synthesize_negatives(x, classes, gate, kappa, mix, dense_pairs(device)),
            lambda: functional.synthesize_negatives(x, classes, gate, kappa=0.5, mix=mix),
        ),
        **_field_cases(setting, device),
    }  # fmt: skip


def _field_cases(setting: Setting, device: torch.device) -> dict[str, Case]:
    """Messages (7), edges (9)-(13) and the statistics of the gates (14), as `gcng.nn.field` calls their ops."""
    N, D = setting.samples, setting.embedding_size
    labels = class_major_labels(N, setting.samples_per_class)
    u = _leaf(torch.nn.functional.normalize(normal(N, D), dim=1), device)
    weight, bias = _leaf(normal(D, D, seed=1, scale=D**-0.5), device), _leaf(normal(D, seed=2, scale=0.1), device)
    with torch.no_grad():
        made = EdgeLayer(D).to(device).chain(_leaf(normal(N, D, seed=3), device))
    chain = [_leaf(one, device) for one in made]
    packed = _leaf(normal(setting.unordered_pairs, D, seed=4), device)
    nodes, kept = edge_field(u, labels), edge_field(packed, labels, packed=True)
    of_nodes, of_layer, of_edges = nodes._field, nodes.extend(chain)._field, kept._field
    pairs, op, keeps = nodes.plan.pairs_per_tile, torch.ops.gcng, torch.is_grad_enabled
    return {
        "messages": Case((u, weight, bias), lambda: op.messages(*of_nodes, weight, bias, pairs, keeps())),
        "edges": Case((u, *chain), lambda: op.edges(*of_layer, pairs, keeps())),
        "edge_moments": Case((packed,), lambda: op.edge_moments(*of_edges, pairs)),
    }


def _leaf(x: Tensor, device: torch.device) -> Tensor:
    return x.detach().float().to(device, copy=True).requires_grad_()


def seconds_of(call: Callable[[], object], device: torch.device, calls: int, batches: int) -> dict:
    """Median over batches of the mean time of a call, at most ``calls`` a batch; warmed up."""
    for _ in range(3):
        call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    once = time.perf_counter() - start
    calls, means = max(1, min(calls, int(WAY_SECONDS / batches / once))), []
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
    compile_in_process()
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


def ways(case: Case, device: torch.device) -> dict[str, Callable[[], Callable[[], object]]]:
    """Way -> what makes the call that is timed, with gradients off; those that ask for gradients turn them on."""
    named = case.public or case.registered
    forward = {"implementation alone": lambda: case.implementation(False), "registered op": lambda: case.registered}
    forward |= {"public function": lambda: case.public} if case.public else {}
    forward["torch.compile"] = lambda: compiled(named)
    both = {
        "implementation alone": lambda: case.implementation(True),
        "registered op": lambda: case.with_gradients(case.registered),
    }
    both |= {"public function": lambda: case.with_gradients(case.public)} if case.public else {}
    both["torch.compile"] = lambda: case.with_gradients(compiled(named))
    if device.type == "cuda":
        forward["CUDA graph"] = lambda: captured(named)
        both["CUDA graph"] = lambda: captured(case.with_gradients(named))
    return forward | ({way + BOTH: make for way, make in both.items()} if case.leaves else {})


def measure_ops(
    device: torch.device,
    setting: Setting = SIZE,
    calls: int = CALLS,
    batches: int = BATCHES,
    wanted: Callable[[str, str], bool] = lambda operation, way: True,
    deadline: float = float("inf"),
) -> list[dict]:
    """One row per op and way; a way that does not work, or comes too late, is a row that says why."""
    rows = []
    for name, case in cases(setting, device).items():
        for way, make in ways(case, device).items():
            if wanted(name, way):
                row = {"operation": name, "setting": setting.name, "way": way}
                late = time.time() > deadline
                found = {"reason": LATE} if late else _timed(make, device, calls, batches, torch.no_grad())
                rows.append(row | found)
    return rows


def _timed(
    make: Callable[[], Callable[[], object]],
    device: torch.device,
    calls: int,
    batches: int,
    mode: contextlib.AbstractContextManager,
) -> dict:
    try:
        with mode:
            return seconds_of(make(), device, calls, batches)
    except Exception as error:
        return {"reason": one_line(error)}


def capturable(provider: Provider, batch: Batch) -> Callable[[], object]:
    """An iteration without a copy from the host: labels on the device, classes known."""
    layout = gcng.BatchLayout(batch.labels)
    moved = replace(batch, labels=batch.labels.to(batch.z.device))
    return lambda: run_iteration(provider, moved, layout=layout)


def measure_iteration(
    device: torch.device, setting: Setting = PUBLISHED_SIZE, calls: int = 3, limit: int = COMPILE_SECONDS
) -> list[dict]:
    """The published setting: one iteration as it is, on a GPU from a CUDA graph, and with compiled losses.

    Args:
        limit: seconds that compiling may take; 0 leaves it out.
    """
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    provider, batch = make_provider("gcng", setting, precision, device), make_batch(setting, precision, device)
    makers = {"public function": lambda: lambda: run_iteration(provider, batch)}
    if device.type == "cuda":
        makers["CUDA graph"] = lambda: captured(capturable(provider, batch))
    row = {"operation": "iteration", "setting": setting.name}
    rows = [row | {"way": w} | _timed(m, device, calls, 3, contextlib.nullcontext()) for w, m in makers.items()]
    return rows + ([compiled_row(device, setting, calls, limit)] if limit else [])


def compiled_row(
    device: torch.device, setting: Setting = PUBLISHED_SIZE, calls: int = 3, limit: int = COMPILE_SECONDS,
    *, late: bool = False,
) -> dict:  # fmt: skip
    """The iteration with compiled losses, in a process of its own."""
    found = {"reason": LATE} if late else measured_beside(setting, device, calls, limit)
    return {"operation": "iteration", "setting": setting.name, "way": "torch.compile"} | found


def main(arguments: list[str] | None = None) -> int:
    """Measures the overheads into a results file."""
    options, results = open_results(arguments, __doc__, "overhead")
    device = torch.device(options.device)
    if options.smoke:
        tiny = Setting(1, 8, 8), Setting(1, 16, 8)
        rows = measure_ops(device, tiny[0], 1, 1, lambda op, way: op == "center_normalize" and "compile" not in way)
        rows += measure_iteration(device, tiny[1], 1, limit=0)
        results.replace("overhead", rows)
    else:
        rows = _measure_all(device, results, options.deadline)
    if not any(row.get("reason") == LATE for row in rows):
        results.finish("overhead")
    return 0


def _measure_all(device: torch.device, results: Results, deadline: float) -> list[dict]:
    """All rows, those of this source that the file holds kept; written after every group of ways."""
    rows = [row for row in results.of_this_source("overhead") if row.get("reason") != LATE]
    done = {(row["operation"], row["way"]) for row in rows}

    def add(more: list[dict]) -> None:
        rows.extend(more)
        results.replace("overhead", rows)

    def missing(op: str, way: str) -> bool:
        return (op, way) not in done

    add(measure_ops(device, wanted=lambda op, way: missing(op, way) and not way.startswith(LATER), deadline=deadline))
    if missing("iteration", "public function"):
        add(measure_iteration(device, limit=0))
    for later in LATER:
        wanted = functools.partial(lambda op, way, later: missing(op, way) and way.startswith(later), later=later)
        add(measure_ops(device, wanted=wanted, deadline=deadline))
    if missing("iteration", "torch.compile"):
        add([compiled_row(device, late=time.time() > deadline)])
    return rows


if __name__ == "__main__":
    sys.exit(main())
