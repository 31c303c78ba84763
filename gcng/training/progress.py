"""Where a run stands: counters, running sums of the epoch, best metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch import Tensor

from gcng.training.step import StepTerms


@dataclasses.dataclass
class Progress:
    """Numbers that a checkpoint holds beside tensors.

    Attributes:
        epoch: The epoch that runs or comes next. step: Iterations done, skipped ones included.
        best, last: Metrics of the best and of the last evaluation.
        skipped: Reason to count. skipped_in_a_row: Without GradScaler overflows, which are no fault.
        sums, counted: Sums of every term over the steps of the epoch that counted, and their number.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, float] | None = None
    last: dict[str, float] | None = None
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    skipped_in_a_row: int = 0
    sums: dict[str, Tensor | float] = dataclasses.field(default_factory=dict)
    counted: int = 0

    @property
    def applied(self) -> int:
        """Steps that changed something: all but the skipped ones."""
        return self.step - sum(self.skipped.values())

    def count(self, terms: StepTerms) -> None:
        """Count one iteration. The sums stay on the device; nothing waits for it."""
        self.step += 1
        if terms.skipped:
            self.skipped[terms.skipped] += 1
            self.skipped_in_a_row += terms.skipped != "scale"
            return
        self.skipped_in_a_row = 0
        self.counted += 1
        for name, value in terms.named().items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()

    def end_epoch(self) -> dict[str, float]:
        """Begin the next epoch; returns the means of the one that ended (empty where no step counted)."""
        means = {name: float(value) / self.counted for name, value in self.sums.items()}
        self.sums, self.counted = {}, 0
        self.epoch += 1
        return means

    def evaluated(self, metrics: dict[str, float], name: str) -> bool:
        """Keep the metrics of an evaluation; returns whether ``name`` is the best so far."""
        is_best = self.best is None or name not in self.best or metrics[name] > self.best[name]
        self.last, self.best = metrics, metrics if is_best else self.best
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """All attributes as plain values."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state["skipped"] = dict(self.skipped)
        state["sums"] = {name: float(value) for name, value in self.sums.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned; KeyError where an entry is missing."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, state[field.name])
        self.skipped, self.sums = Counter(self.skipped), dict(self.sums)
