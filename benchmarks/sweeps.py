"""What could be tuned on a GPU: launch tables around their shipped rows, kernels against products of the library, panel
sizes, and where kernels spend time.

Nothing here changes a table: it prints what each change of one field would give, and writes it to `sweeps` of the
results file, which a table's line may then cite. A launch table is any function of `gcng.kernels` whose result is a
frozen schedule.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, operations, rates
from benchmarks.memory import one_line
from benchmarks.operations import Ready
from benchmarks.results import open_results
from benchmarks.settings import Setting
from tests.closeness import relative_error

ROUNDS = 5
SECONDS = 45.0  # for all tables together
CHOICE_SECONDS = 20.0  # for all choices between kernels together
# Op -> what is chosen in it: fields of EdgeProducts, or a constant of the kernels' module.
CHOICES = {
    "edges": ("first_map", "second_map", "hidden_gradient"),
    "iteration": ("mlp",),  # where nothing of the hidden layer is kept
    "messages": ("messages",),
    "class_cross_entropy": ("WITHOUT_PANELS",),
}
WIDTHS = (512, 128, 256)  # most valuable first
OPS = ("class_cross_entropy", "messages", "edges", "attention", "synthesis")
SETTING, ITERATION = Setting(1, 512, 1024), Setting(1, 512, 2048)
PANELS = (16_384, 65_536, 131_072, 262_144)  # up to beyond the largest that is planned
WARPS, STAGES = (4, 8), (2, 3, 4)
TOP_KERNELS = 30
SAME = 1e-2  # relative error up to which two schedules compute the same, in 16 bits too


@contextlib.contextmanager
def kernels_run(device: str) -> Iterator[bool]:
    """Whether Triton kernels run on the device: on a GPU, or anywhere where TRITON_INTERPRET=1 interprets them."""
    if device.startswith("cuda"):
        yield True
    elif os.environ.get("TRITON_INTERPRET") == "1":
        dispatch = importlib.import_module("gcng.ops.dispatch")
        everywhere = importlib.import_module("gcng.ops.triton_path").triton_everywhere()
        with everywhere, dispatch.forced_kernels(*dispatch.TRITON):
            yield True
    else:
        yield False


def kernel_modules() -> list[ModuleType]:
    """All modules of gcng.kernels."""
    package = importlib.import_module("gcng.kernels")
    return [importlib.import_module(f"gcng.kernels.{one.name}") for one in pkgutil.iter_modules(package.__path__)]


def launch_tables(modules: list[ModuleType]) -> dict[str, Callable]:
    """Functions that return a schedule, by "module.function"."""
    schedule = importlib.import_module("gcng.kernels.launch").Schedule
    found = {}
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__:
                continue
            wanted = inspect.signature(function, eval_str=True).return_annotation
            if inspect.isclass(wanted) and issubclass(wanted, schedule):
                found[f"{module.__name__.rpartition('.')[2]}.{name}"] = function
    return found


@contextlib.contextmanager
def value_replaced(module: ModuleType, name: str, by: object) -> Iterator[None]:
    """A constant of a module is another one."""
    before = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def table_replaced(modules: list[ModuleType], table: Callable, by: Callable) -> Iterator[None]:
    """Every module that holds a table under any name holds another function instead."""
    places = [(module, name) for module in modules for name, value in vars(module).items() if value is table]
    for module, name in places:
        setattr(module, name, by)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, table)


def variants(shipped: Any) -> Iterator[tuple[str, Any]]:
    """Schedules that differ from the shipped one in one field: what changed, in words, and the schedule."""
    for one in fields(shipped):
        value = getattr(shipped, one.name)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        choices = {"num_warps": WARPS, "num_stages": STAGES}.get(one.name)
        if choices is None:
            choices = (value // 2, value * 2) if one.name.startswith("block") else ()
        for choice in choices:
            if choice != value and choice >= 1:
                yield f"{one.name} {value} -> {choice}", replace(shipped, **{one.name: choice})


def seconds_of(ready: Ready, rounds: int = ROUNDS) -> float:
    """Median of a whole call, after one to warm up."""
    ready.run()
    passes = [ready.run() for _ in range(rounds)]
    return statistics.median(one.get("both", one["forward"]) for one in passes)


def answering(table: Callable, asked: tuple[tuple, dict], schedule: Any) -> Callable:
    """The table with another answer to one question: a backward that asks it too keeps its own."""
    return lambda *arguments, **named: schedule if (arguments, named) == asked else table(*arguments, **named)


def timed_if_right(ready: Ready, wanted: dict[str, Tensor], rounds: int) -> dict:
    """Seconds of a call, or the reason why there are none: a block of fewer channels than a row has leaves some out."""
    found = ready.arrays()
    same = {name: torch.equal(found[name], x) for name, x in wanted.items()}
    wrong = [name for name, x in wanted.items() if not (same[name] or relative_error(found[name], x.double()) < SAME)]
    if wrong:
        return {"reason": f"gives other numbers: {', '.join(wrong[:3])}"}
    return {"seconds": seconds_of(ready, rounds)}


def sweep(
    operation: str, setting: Setting, precision: str, device: str, until: float, rounds: int = ROUNDS
) -> list[dict]:
    """One row per table that the op asks: time as shipped, and with each change that gives the same numbers."""
    modules = kernel_modules()
    ready = operations.load(operation).prepare("gcng", setting, precision, device)
    rows, wanted = [], ready.arrays()
    for name, table in launch_tables(modules).items():
        asked: list[Any] = []

        def noted(*arguments: Any, table: Callable = table, asked: list[Any] = asked, **named: Any) -> Any:
            asked.append((arguments, named, table(*arguments, **named)))
            return asked[-1][2]

        with table_replaced(modules, table, noted):
            shipped_seconds = seconds_of(ready, rounds)
        if not asked:
            continue
        first, shipped = asked[0][:2], asked[0][2]
        ways = {
            words: table_replaced(modules, table, answering(table, first, schedule))
            for words, schedule in variants(shipped)
        }
        row = {"operation": operation, "setting": setting.name, "precision": precision, "table": name}
        row |= {"shipped": asdict(shipped), "seconds": shipped_seconds}
        rows.append(row | {"changes": timed_changes(ready, wanted, ways, until, rounds)})
    return rows


def timed_changes(
    ready: Ready,
    wanted: dict[str, Tensor],
    ways: dict[str, contextlib.AbstractContextManager],
    until: float,
    rounds: int = ROUNDS,
) -> list[dict]:
    """One entry per change, by its words: seconds inside its context, or the reason why there are none."""
    changes = []
    for words, changed in ways.items():
        change = {"change": words}
        if time.time() > until:
            change |= {"reason": "no time left"}
        else:
            try:
                with changed:
                    change |= timed_if_right(ready, wanted, rounds)
            except Exception as error:  # too much shared memory, too few registers, a tile that does not divide
                change |= {"reason": one_line(error)}
        changes.append(change)
    return changes


def choices(operation: str, setting: Setting, precision: str, device: str, until: float, rounds: int = ROUNDS) -> dict:
    """A row like those of `sweep`, for what an op chooses between kernels: the other choices, one at a time."""
    modules = kernel_modules()
    if operation == "class_cross_entropy":
        table, shipped, ways = _choice_of_panels(modules)
    else:
        width, dtype = setting.embedding_size, operations.PRECISIONS[precision]
        table, shipped, ways = _choice_of_products(modules, CHOICES[operation], width, dtype, torch.device(device))
    row = {"operation": operation, "setting": setting.name, "precision": precision, "table": table, "shipped": shipped}
    if not ways or time.time() > until:
        return row | {"changes": [], "reason": "no time left" if ways else "no other choice"}
    provider = "gcng-recompute" if operation == "iteration" and device.startswith("cuda") else "gcng"
    ready = operations.load(operation).prepare(provider, setting, precision, device)
    row["seconds"] = seconds_of(ready, rounds)
    return row | {"changes": timed_changes(ready, ready.arrays(), ways, until, rounds)}


def _choice_of_panels(modules: list[ModuleType]) -> tuple[str, bool, dict[str, contextlib.AbstractContextManager]]:
    (module,) = (one for one in modules if one.__name__.endswith(".class_cross_entropy"))
    (name,) = CHOICES["class_cross_entropy"]
    shipped = getattr(module, name)
    words = "with panels" if shipped else "without panels"
    return f"class_cross_entropy.{name}", shipped, {words: value_replaced(module, name, not shipped)}


def _choice_of_products(
    modules: list[ModuleType], chosen: tuple[str, ...], width: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, dict, dict[str, contextlib.AbstractContextManager]]:
    (module,) = (one for one in modules if one.__name__.endswith(".product_tiles"))
    architecture = importlib.import_module("gcng.kernels.launch").architecture(device)
    table, known = module.edge_products, module.available_products(width, dtype, architecture)
    shipped, library = table(width, dtype, architecture), module.EdgeProducts()
    alone = {name: replace(library, **{name: getattr(known, name)}) for name in chosen}
    ways = {
        words: table_replaced(modules, table, lambda *_, products=products: products)
        for words, products in {"products of the library": library, **alone}.items()
        if any(getattr(products, name) != getattr(shipped, name) for name in chosen)
    }
    return "product_tiles.edge_products", asdict(shipped), ways


def panels(setting: Setting, precision: str, device: str, sizes: tuple[int, ...]) -> list[dict]:
    """An iteration with other panel sizes, and a product of as many rows beside it."""
    ready = operations.load("iteration").prepare("gcng", setting, precision, device)
    from gcng.nn.graph import CorrelationGraph

    planned, rows = CorrelationGraph.memory_plan, []
    for size in sizes:
        row = {"operation": "iteration", "setting": setting.name, "precision": precision, "pairs_per_tile": size}
        row["gemm_flops"] = rates.product_rate(setting.embedding_size, precision, device, rows=size)["flops"]
        try:
            CorrelationGraph.memory_plan = lambda self, z, size=size: replace(planned(self, z), pairs_per_tile=size)
            row["seconds"] = seconds_of(ready, 3)
        except (MemoryError, RuntimeError) as error:
            row["reason"] = one_line(error)
        finally:
            CorrelationGraph.memory_plan = planned
        rows.append(row)
    return rows


def kernels_of(setting: Setting, precision: str, device: str) -> dict:
    """Device time of one iteration by kernel (on a CPU by op), the largest first."""
    from torch.profiler import ProfilerActivity, profile

    ready = operations.load("iteration").prepare("gcng", setting, precision, device)
    ready.run()
    on_gpu = torch.device(device).type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        ready.run()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, kind))
    kernels = [{"kernel": e.key[:120], "seconds": getattr(e, kind) / 1e6, "calls": e.count} for e in events]
    total = sum(one["seconds"] for one in kernels)
    return {"setting": setting.name, "precision": precision, "seconds": total, "kernels": kernels[:TOP_KERNELS]}


def main(arguments: list[str] | None = None) -> int:
    """Measures all of it into a results file."""
    options, results = open_results(arguments, __doc__, "sweeps")
    device, on_gpu = options.device, options.device.startswith("cuda")
    precision = "bfloat16" if on_gpu else "float32"
    tiny = operations.load("iteration").tiny
    small, large = (tiny, tiny) if options.smoke else (SETTING, ITERATION)
    results.data["sweeps"] = {"kernels": [kernels_of(small, precision, device)], **machine.revision()}
    results.save()
    sizes = (16, 64) if options.smoke else PANELS
    results.data["sweeps"]["panels"] = panels(large, precision, device, sizes)
    results.save()
    results.data["sweeps"]["tables"] = rows = []
    with kernels_run(device) as running:
        until = min(time.time() + SECONDS, options.deadline)
        for name in OPS[: 1 if options.smoke else None] if running else ():
            setting = operations.load(name).tiny if options.smoke else SETTING
            rows += sweep(name, setting, precision, device, until, 1 if options.smoke else ROUNDS)
            results.save()
        until = min(time.time() + CHOICE_SECONDS, options.deadline)
        # Kernels with epilogues take 16 bits only, and the interpreter computes wrongly in bfloat16.
        precision = "bfloat16" if on_gpu else "float16"
        # Interpreted, a pass over the edges takes seconds.
        asked = [("messages", 0), ("class_cross_entropy", 0)] if options.smoke else itertools.product(CHOICES, WIDTHS)
        for name, width in asked if running else ():
            setting = replace(SETTING, embedding_size=width) if width else operations.load(name).tiny
            rows.append(choices(name, setting, precision, device, until, 1 if options.smoke else ROUNDS))
            results.save()
    results.finish("sweeps")
    for row in rows:
        best = min((c for c in row["changes"] if "seconds" in c), key=lambda c: c["seconds"], default=None)
        if best and best["seconds"] < 0.97 * row["seconds"]:
            print(f"{row['operation']} {row['table']}: {best['change']}: x {best['seconds'] / row['seconds']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
