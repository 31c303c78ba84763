"""A timing session: for each entry memory first, then the gate, then turns; every step is in the results file at once.

Owns the order of steps within an entry, and what becomes of a provider that cannot go on: a row that says why.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine, memory, operations, rates
from benchmarks.gate import assert_gcng_close, assert_same_formula, formula_error, gradient_limit
from benchmarks.memory import one_line
from benchmarks.operations import Operation, Ready, Unavailable
from benchmarks.plan import COMPILING, Case, Entry, providers_of
from benchmarks.providers import extension
from benchmarks.results import TRUTH, Results, setting_of, spread
from tests.closeness import ClosenessError

MIN_ROUNDS = 2
GPU_LOST = 70  # exit code of a process whose GPU refuses all work after an error
OURS = ("gcng", "gcng-no-extension", "gcng-recompute")
# Useful operations beyond which the truth on a GPU is gcng in tf32: blocked torch in float32 would take
# minutes. Kernels are held to an independent form up to N = 2048 then, and at larger N to themselves in wider numbers.
TF32_TRUTH_FLOPS = 1e14


def check_and_time(benchmark: BenchmarkFixture, preparation: Preparation, case: Case) -> None:
    """The body of every benchmark: a provider that has passed the gate, called once, its passes recorded."""
    ready = preparation.ready(case)
    benchmark.extra_info.update(provider=case.provider, setting=case.entry.setting.as_dict(), round=case.round)
    # An untimed call first: a training loop repeats itself, while the call after another provider's has all of its
    # memory to fetch from the system again.
    with preparation.watched():
        passes = benchmark.pedantic(ready.run, rounds=1, warmup_rounds=1)
    assert passes and all(seconds > 0 for seconds in passes.values()), passes
    preparation.record(case, passes)


@dataclass
class _Current:
    """The entry being measured: its row, what is ready to be called, and when turns must end."""

    entry: Entry
    row: dict
    ready: dict[str, Ready] = field(default_factory=dict)
    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ends: float = float("inf")


class Preparation:
    """Holds the entry being timed; another entry finishes it and takes its place.

    Args:
        results: where rows go. device, threads: of the measurement. deadline: time after which no entry starts.
        truth_flops: above this many useful operations a float64 truth takes too long; float32 stands in.
    """

    def __init__(
        self, results: Results, device: str, threads: int, deadline: float, truth_flops: float, memory_too: bool = True
    ) -> None:
        self.results, self.device, self.threads, self.deadline = results, device, threads, deadline
        self.truth_flops, self.memory_too = truth_flops, memory_too
        self.current: _Current | None = None
        self.broken: dict[str, str] = {}  # entries that ended in an error: once is enough

    def ready(self, case: Case) -> Ready:
        """The provider to call; skips the test where the row says why there is none, or has enough rounds."""
        if self.current is None or self.current.entry != case.entry:
            self.finish()
            if time.time() > self.deadline:
                pytest.skip("the time given is used up; the next run goes on here")
            self._start_or_remember(case.entry)
        current = self.current
        if case.provider not in current.ready:
            pytest.skip(current.row["providers"][case.provider].get("reason", "not run"))
        if case.round >= MIN_ROUNDS and time.time() > current.ends:
            pytest.skip("enough rounds")
        if case.provider == next(iter(current.ready)):
            self._yardstick()
        self._mark(case.provider)
        return current.ready[case.provider]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """End the process where an error has left the GPU unusable: nothing after it would be measured.

        The row then says what was running and is not complete; the next process blames that, and goes on.
        """
        try:
            yield
        except Exception as error:
            self._leave_if_lost(one_line(error))
            raise

    def _leave_if_lost(self, reason: str) -> None:
        if broken := machine.gpu_error():
            if self.current is not None:
                self.current.row["complete"] = False
                self.results.save()
            print(f"{reason}; the GPU is lost: {broken}", file=sys.stderr, flush=True)
            os._exit(GPU_LOST)

    def record(self, case: Case, passes: dict[str, float]) -> None:
        """Keep one timed call."""
        current = self.current
        kept = current.rounds.setdefault(case.provider, {})
        for name, seconds in passes.items():
            kept.setdefault(name, []).append(seconds)
        current.row["providers"][case.provider]["time"] = {name: spread(values) for name, values in kept.items()}

    def finish(self) -> None:
        """The entry is complete; writes it."""
        if self.current is not None:
            self.current.row["complete"] = True
            self.current.row.pop("running", None)
            self.results.save()
        self.current = None
        gc.collect()

    def _start_or_remember(self, entry: Entry) -> None:
        if entry.name in self.broken:
            raise AssertionError(f"{entry.name} is not measured: {self.broken[entry.name]}")
        try:
            with self.watched():
                self._start(entry)
        except Exception as error:
            self.broken[entry.name] = one_line(error)
            self.current = None  # the row stays incomplete, and the next run tries again
            raise

    def _start(self, entry: Entry) -> None:
        operation = operations.load(entry.operation)
        row = self.results.row(operation, entry.setting, entry.precision)
        row |= machine.revision() | {"complete": False, "load_average": machine.load_average()}
        row["extension"] = extension(self.device)
        self.current = _Current(entry, row)
        for name in providers_of(entry):
            known = row["providers"].setdefault(name, {})
            if known.get("status") in ("killed", "out of memory"):
                continue  # of an earlier try of this row, which it ended
            row["providers"][name] = {"status": "measured"}
            self._mark(name)
            self._measure_memory(operation, name)
        self._pass_gate(operation)
        self.current.ends = time.time() + entry.seconds
        self.results.save()

    def _mark(self, provider: str) -> None:
        """Say in memory what runs, and in the file too where the process could be killed for it."""
        if self.current.row.get("running") != provider:
            self.current.row["running"] = provider
            if not self.current.ready:
                self.results.save()

    def _measure_memory(self, operation: Operation, name: str) -> None:
        entry, row = self.current.entry, self.current.row["providers"][name]
        predicted = None
        if name in operation.dense_providers:
            predicted = memory.predicted_bytes(operation, entry.setting, self._peaks(operation, name))
        available = memory.available_bytes(self.device)
        found = {"predicted_bytes": predicted} if predicted else {}
        if predicted is not None and predicted > memory.USABLE_SHARE * available:
            found |= {"available_bytes": available}
            row |= {"status": "out of memory", "reason": "predicted not to fit"}
        elif self.memory_too and not name.endswith("-compiled") and name not in COMPILING:
            measured = memory.measure(operation.name, name, entry.setting, entry.precision, self.device, self.threads)
            status = measured.pop("status")
            if status == "failed":
                self._leave_if_lost(measured["reason"])
            if status == "failed" and not self._may_fail(name):
                raise RuntimeError(f"{entry.name} by {name}: {measured['reason']}")
            row["status"] = "unavailable" if status == "failed" else status
            row |= {"reason": measured.pop("reason")} if "reason" in measured else {}
            found |= measured
        row["memory"] = found

    def _peaks(self, operation: Operation, name: str) -> dict:
        """Measured peaks of a provider by setting."""
        peaks = {}
        for row in self.results.data["rows"]:
            if (row["operation"], row["precision"]) == (operation.name, self.current.entry.precision):
                peak = row["providers"].get(name, {}).get("memory", {}).get("peak_bytes")
                if peak:
                    peaks[setting_of(row)] = peak
        return peaks

    def _pass_gate(self, operation: Operation) -> None:
        """Make every provider that fits ready, and keep those that are close to the truth."""
        current = self.current
        usable = [name for name, row in current.row["providers"].items() if row["status"] == "measured"]
        names = [name for name in providers_of(current.entry) if name in usable]
        made = {name: ready for name in names if (ready := self._make(operation, name)) is not None}
        truth, current.row["truth"] = self._truth(operation, [*made])
        # The dense definition sets the standard; it comes first, so that gcng is held to it.
        order = sorted(made, key=lambda name: (name != "reference", name != "published"))
        baseline, judge = None, ""
        for name in order:
            ready, row = made[name], current.row["providers"][name]
            self._mark(name)
            try:
                with self.watched():
                    arrays = ready.arrays()
                if baseline is None and ready.form.compared:
                    baseline, judge = arrays, name
                if ready.form.compared:
                    row["relative_error"] = self._error(
                        ready, arrays, truth, baseline if judge == "reference" else None
                    )
            except ClosenessError as error:
                row |= {"status": "refused", "reason": f"not close to the truth: {error}"}
                continue
            except torch.OutOfMemoryError as error:
                row |= {"status": "out of memory", "reason": one_line(error)}
                continue
            except Exception as error:
                if not self._may_fail(name):
                    raise
                row |= {"status": "unavailable", "reason": one_line(error)}
                continue
            row["compared"] = ready.form.compared
        usable = [name for name in made if current.row["providers"][name]["status"] == "measured"]
        current.ready = {name: made[name] for name in usable}

    def _error(self, ready: Ready, arrays: dict, truth: dict, baseline: dict | None) -> float:
        """The worst relative error of a provider that passes its gate; without a baseline the caps of a peer hold."""
        name, entry = ready.provider, self.current.entry
        precision = entry.precision
        if ready.inputs.leaves and not ready.differentiates:  # a peer without a backward
            truth = {key: x for key, x in truth.items() if not key.startswith("grad ")}
        if name in OURS and baseline is not None and self.current.row["truth"].endswith("float64"):
            return assert_gcng_close(ready.operation, name, arrays, truth, baseline, precision)
        formula_error(ready.operation.name, name, entry.setting)
        limit = gradient_limit(ready.operation, name, entry.setting, precision)
        return assert_same_formula(name, arrays, truth, precision, limit)

    def _make(self, operation: Operation, name: str) -> Ready | None:
        row, entry = self.current.row["providers"][name], self.current.entry
        self._mark(name)
        try:
            return operation.prepare(name, entry.setting, entry.precision, self.device)
        except Unavailable as reason:
            row |= {"status": "unavailable", "reason": str(reason)}
        except torch.OutOfMemoryError:
            row |= {"status": "out of memory"}
        return None

    @staticmethod
    def _may_fail(name: str) -> bool:
        """A peer or a compiler may refuse a size, a dtype or a device; gcng and what it is measured by may not."""
        return name not in ("published", "reference", *OURS)

    def _truth(self, operation: Operation, made: list[str]) -> tuple[dict[str, torch.Tensor], str]:
        """Arrays to compare with, and what they come from: float64 if it fits and takes no minutes, else float32."""
        entry = self.current.entry
        room = memory.USABLE_SHARE * memory.available_bytes(self.device) / (16 // _item(entry.precision))
        peaks = {
            name: row.get("memory", {}).get("peak_bytes", 0) for name, row in self.current.row["providers"].items()
        }
        heavy = operation.work(entry.setting, 4)["forward"].flops > self.truth_flops
        wide = "float32" if heavy else "float64"
        candidates = [*operation.truth, "gcng"] if not heavy else ["gcng-no-extension", "gcng"]
        if self.device != "cpu" and operation.work(entry.setting, 4)["forward"].flops > TF32_TRUTH_FLOPS:
            wide, candidates = "tf32", ["gcng"]
        for name in candidates:
            if peaks.get(name, 0) > room or (name in operation.dense_providers and name not in made):
                continue
            self._mark(TRUTH)
            try:
                ready = operation.prepare(name, entry.setting, wide, self.device, rounded_to=entry.precision)
                return {key: x.double() for key, x in ready.arrays().items()}, f"{name} in {wide}"
            except Unavailable:
                continue
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
        raise RuntimeError(f"{entry.name}: none of {candidates} fits as truth")

    def _yardstick(self) -> None:
        """The matrix product of a panel of pairs with the first map of the edge MLP, measured in every round."""
        row, entry = self.current.row, self.current.entry
        found = rates.product_rate(entry.setting.embedding_size, entry.precision, self.device)
        row.setdefault("gemm", {"shape": found["shape"], "rounds": []})["rounds"].append(found["flops"])
        row["gemm"]["flops"] = spread(row["gemm"]["rounds"])["median"]


def _item(precision: str) -> int:
    return {"float64": 8, "bfloat16": 2, "float16": 2}.get(precision, 4)
