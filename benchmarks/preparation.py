"""Providers ready to be timed: made, warmed up and through the closeness gate, one setting at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from benchmarks.gate import assert_providers_close, float64_truth
from benchmarks.iteration import Outcome, make_batch, make_provider, run_iteration
from benchmarks.plan import Case
from benchmarks.settings import GEMM_ROWS, Setting


class Preparation:
    """Holds the providers of the setting being timed; another setting replaces them."""

    def __init__(self) -> None:
        self.setting: Setting | None = None
        self.errors: dict[str, float] = {}
        self.refused: dict[Setting, str] = {}

    def ready(self, case: Case) -> Callable[[], Outcome]:
        """The call to time. The first case of a setting runs every provider once: warm-up and gate in one."""
        if case.setting in self.refused:
            raise AssertionError(f"{case.setting.name} did not pass the gate:\n{self.refused[case.setting]}")
        if case.setting != self.setting:
            self._prepare(case)
        provider = self.providers[case.provider]
        return lambda: run_iteration(provider, self.batch)

    def gemm(self, case: Case) -> Callable[[], torch.Tensor]:
        """The yardstick: a float32 product shaped as a panel's first MLP map, into memory that exists."""
        D = case.setting.embedding_size
        generator = torch.Generator().manual_seed(0)
        rows, weight = (torch.randn(*shape, generator=generator) for shape in ((GEMM_ROWS, D), (D, 4 * D)))
        product = torch.empty(GEMM_ROWS, 4 * D)
        torch.mm(rows, weight, out=product)
        return lambda: torch.mm(rows, weight, out=product)

    def _prepare(self, case: Case) -> None:
        self.providers, self.outcomes = {}, {}
        self.setting = None
        gc.collect()
        truth = float64_truth(case.setting, case.truth)
        self.batch = make_batch(case.setting)
        for name in case.providers:
            self.providers[name] = make_provider(name, case.setting)
            self.outcomes[name] = run_iteration(self.providers[name], self.batch, keep_gradients=True)
        try:
            self.errors = assert_providers_close(self.outcomes, truth)
        except AssertionError as error:  # no case of this setting is timed, and the others still are
            self.refused[case.setting] = str(error)
            raise
        for outcome in self.outcomes.values():
            outcome.gradients.clear()
        self.setting = case.setting
