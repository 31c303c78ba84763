"""How time and memory grow: least squares in logarithms over the rows of a results file that differ in one size.

An exponent comes with its spread, the standard error of the slope over MIN_POINTS sizes or more. Beside it stand models
of the same settings: for the time the same fit to the useful operations, which is what the arithmetic alone would give
at these sizes; for the memory of gcng's iteration the same fit to what `gcng.estimate_memory` says; and EXPECTED, the
power that leads when the size is large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.operations import PRECISIONS
from benchmarks.plan import OURS
from benchmarks.results import measured_time, setting_of
from benchmarks.settings import Setting
from gcng.memory import default_budget, estimate_memory

SIZES = {"N": "samples", "D": "embedding_size", "L": "num_layers", "C": "training_classes", "K": "samples_per_class"}
MIN_POINTS = 3
# Leading powers of time and of memory by operation and size. An iteration computes N²/2 pairs at 82 D² operations in
# the first layer and 108 D² in each further one, keeps some multiple of D numbers of each pair and layer where the
# budget allows, and multiplies N²/K negatives with C classes, whose weights it holds. With nothing kept: towards L².
EXPECTED: dict[str, dict[str, tuple[int, int]]] = {
    "iteration": {"N": (2, 2), "D": (2, 1), "L": (1, 1), "C": (1, 1), "K": (0, 0)},
    "edges": {"N": (2, 2), "D": (2, 1)},
    "messages": {"N": (2, 2), "D": (2, 1)},
    "attention": {"N": (2, 1), "D": (1, 1)},
    "correlation": {"N": (2, 1), "D": (1, 1)},
    "retrieval": {"N": (2, 1), "D": (1, 1)},
    "synthesis": {"N": (2, 2), "D": (1, 1), "K": (0, 0)},
    "class_cross_entropy": {"N": (1, 1), "D": (1, 1), "C": (1, 1)},
}


class Fit(NamedTuple):
    """``value ~ size ** exponent``."""

    exponent: float
    error: float  # standard error of the exponent; two points leave it unknown, infinite
    points: int


class Scaling(NamedTuple):
    """One line of the table of exponents."""

    operation: str
    precision: str
    provider: str
    size: str  # key of SIZES
    fixed: str  # the other sizes, in words
    values: tuple[int, ...]
    time: Fit | None
    memory: Fit | None
    model: Fit | None
    estimate: Fit | None = None  # of memory, by the model
    of_estimate: float | None = None  # measured peak over estimate at the largest size that has both

    @property
    def expected(self) -> tuple[int, int] | None:
        """Leading powers of time and memory, where the model has them."""
        return EXPECTED.get(self.operation, {}).get(self.size)


def fit(sizes: Iterable[float], values: Iterable[float]) -> Fit:
    """Slope of log(value) over log(size). ValueError for fewer than two sizes."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    n = len(x)
    if n < 2 or len(set(x)) < 2:
        raise ValueError(f"fit: needs at least two different sizes, got {n}")
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(left / (n - 2) / spread) if n > 2 else math.inf
    return Fit(slope, error, n)


def scalings(results: dict, provider: str = "gcng") -> list[Scaling]:
    """All sweeps of a results file that have at least MIN_POINTS sizes, by operation and size."""
    rows = [row for row in results["rows"] if row["providers"].get(provider, {}).get("status") == "measured"]
    found = []
    for size, attribute in SIZES.items():
        groups: dict[tuple, dict[int, dict]] = {}
        for row in rows:
            setting = setting_of(row)
            if size == "C" and row["operation"] not in ("iteration", "class_cross_entropy"):
                continue
            others = _others(setting, attribute)
            groups.setdefault((row["operation"], row["precision"], others), {})[getattr(setting, attribute)] = row
        for (operation, precision, others), by_size in groups.items():
            if len(by_size) >= MIN_POINTS:
                estimates = {s: estimated_bytes(results["machine"], row, provider) for s, row in by_size.items()}
                found.append(_scaling(operation, precision, provider, size, others, by_size, estimates))
    return found


def estimated_bytes(machine: dict, row: dict, provider: str = "gcng") -> int | None:
    """What the model of gcng says of a row's peak: `gcng.estimate_memory`, embeddings, weights and their gradients.

    On a CPU, with the budget that the losses have there by default; an iteration by gcng only, else None. It counts the
    workspace of a tile as if all its tensors lived at once, so that the peak of a small batch lies well below.
    """
    if row["operation"] != "iteration" or provider not in OURS or "gpu" in machine:
        return None
    setting, dtype = setting_of(row), str(PRECISIONS[row["precision"]]).removeprefix("torch.")
    try:
        estimate = estimate_memory(
            setting.samples, setting.embedding_size, setting.num_layers, samples_per_class=setting.samples_per_class,
            dtype=dtype, memory_budget=default_budget(machine["memory_bytes"]),
        )  # fmt: skip
    except MemoryError:
        return None
    return estimate.peak_bytes + int(row["work"]["forward"]["bytes"])


def _others(setting: Setting, attribute: str) -> tuple[tuple[str, int], ...]:
    """The sizes that stay fixed, C as it is given and not as N makes it."""
    values = {letter: getattr(setting, name) for letter, name in SIZES.items() if name != attribute}
    if attribute != "training_classes":
        values["C"] = setting.classes or 0
    return tuple(values.items())


def _scaling(
    operation: str,
    precision: str,
    provider: str,
    size: str,
    others: tuple,
    by_size: dict[int, dict],
    estimates: dict[int, int | None],
) -> Scaling:
    sizes = sorted(by_size)
    times = {s: t["median"] for s in sizes if (t := measured_time(by_size[s], provider))}
    peaks = {s: m for s in sizes if (m := by_size[s]["providers"][provider].get("memory", {}).get("peak_bytes", 0)) > 0}
    work = {s: by_size[s]["work"].get("both", by_size[s]["work"]["forward"])["flops"] for s in sizes}
    modeled = {s: estimates[s] for s in peaks if estimates[s]}
    fits = [fit(x, x.values()) if len(x) >= MIN_POINTS else None for x in (times, peaks, work, modeled)]
    fixed = ", ".join(f"{letter} = {value}" for letter, value in others if value)
    share = peaks[max(modeled)] / modeled[max(modeled)] if modeled else None
    return Scaling(operation, precision, provider, size, fixed, tuple(sizes), *fits, share)
