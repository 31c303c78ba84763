"""How time and memory grow: least squares in logarithms over the rows of a results file that differ in one size.

An exponent comes with its spread: the standard error of the slope, or, for two points, what the spread of the two
times allows. Beside it stand two models: the same fit to the useful operations of the same settings, which is what the
arithmetic alone would give at these sizes, and EXPECTED, the power that leads when the size is large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.results import measured_time, setting_of
from benchmarks.settings import Setting

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
    error: float  # standard error of the exponent
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
    error = math.sqrt(left / (n - 2) / spread) if n > 2 else 0.0
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
                found.append(_scaling(operation, precision, provider, size, others, by_size))
    return found


def _others(setting: Setting, attribute: str) -> tuple[tuple[str, int], ...]:
    """The sizes that stay fixed, C as it is given and not as N makes it."""
    values = {letter: getattr(setting, name) for letter, name in SIZES.items() if name != attribute}
    if attribute != "training_classes":
        values["C"] = setting.classes or 0
    return tuple(values.items())


def _scaling(
    operation: str, precision: str, provider: str, size: str, others: tuple, by_size: dict[int, dict]
) -> Scaling:
    sizes = sorted(by_size)
    times = {s: t["median"] for s in sizes if (t := measured_time(by_size[s], provider))}
    peaks = {s: m for s in sizes if (m := by_size[s]["providers"][provider].get("memory", {}).get("peak_bytes", 0)) > 0}
    work = {s: by_size[s]["work"].get("both", by_size[s]["work"]["forward"])["flops"] for s in sizes}
    fits = [fit(x, x.values()) if len(x) >= MIN_POINTS else None for x in (times, peaks, work)]
    fixed = ", ".join(f"{letter} = {value}" for letter, value in others if value)
    return Scaling(operation, precision, provider, size, fixed, tuple(sizes), *fits)
