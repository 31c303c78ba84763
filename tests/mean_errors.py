"""Accuracy over many random draws, of which a single one may be lucky in either form."""

from __future__ import annotations

import math

from torch import Tensor


class MeanErrors:
    """Mean squares over draws of each array's relative error: of the form under test, and of torch's float32 form."""

    def __init__(self, floor: float = 1.0) -> None:
        self._floor = floor  # norms below count as this one
        self._errors: dict[str, list[tuple[float, float]]] = {}

    def add(self, ours: dict[str, Tensor], truth: dict[str, Tensor], baseline: dict[str, Tensor]) -> None:
        """Add a draw; ``truth`` is in float64."""
        assert ours.keys() == truth.keys() == baseline.keys()
        for key, exact in truth.items():
            exact, scale = exact.double(), exact.double().norm().clamp(min=self._floor)
            pair = tuple((((x[key].double() - exact).norm() / scale) ** 2).item() for x in (ours, baseline))
            self._errors.setdefault(key, []).append(pair)

    def roots(self) -> dict[str, tuple[float, float]]:
        """Root mean squares of each array, ours and torch's."""
        return {
            key: tuple(math.sqrt(sum(side) / len(side)) for side in zip(*pairs, strict=True))
            for key, pairs in self._errors.items()
        }

    def check(self) -> None:
        """At most twice the root mean square of torch."""
        assert self._errors
        for key, (ours, baseline) in self.roots().items():
            assert ours <= 2 * baseline + 1e-7, (key, ours, baseline)
