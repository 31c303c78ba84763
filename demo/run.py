"""Runs the trainings side by side and gathers what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import machine, revision, versions
from demo.settings import METHODS, Settings

ROOT = Path(__file__).resolve().parents[1]
# What the committed results file keeps of a training; curves and looks stay in the output folder.
KEPT = ("method", "seed", "scores", "scores_before", "seconds", "cpu_seconds", "peak_bytes")
KEPT += ("high_water_mark_reset", "start_checksum", "batch_checksum")


def run_trainings(settings: Settings, seeds: tuple[int, ...], folder: Path) -> list[dict]:
    """Train every method with every seed in processes of their own; the seeds of a method run side by side.

    Methods follow each other, so that the seconds of both are measured under the same load.

    Returns:
        What the workers wrote, method after method.
    """
    side_by_side = min(len(seeds), available_cores())
    for method in METHODS:
        for start in range(0, len(seeds), side_by_side):
            _run_workers(method, seeds[start : start + side_by_side], settings, folder)
    outcomes = [json.loads((folder / f"{method}-{seed}.json").read_text()) for method in METHODS for seed in seeds]
    check_same_start_and_batches(outcomes)
    return outcomes


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_same_start_and_batches(outcomes: list[dict]) -> None:
    """Refuse to compare trainings that did not start from the same weights or see the same batches."""
    for name in ("start_checksum", "batch_checksum"):
        for seed in {outcome["seed"] for outcome in outcomes}:
            found = {outcome[name] for outcome in outcomes if outcome["seed"] == seed}
            if len(found) != 1:
                raise RuntimeError(f"demo: the methods differ in {name} at seed {seed}; they cannot be compared")


def results(outcomes: list[dict], settings: Settings, seeds: tuple[int, ...], started: float) -> dict:
    """The results file: machine, versions, settings, and the numbers of every training."""
    return {
        "format": 1,
        "machine": machine(),
        "versions": versions(),
        **revision(),
        "settings": settings.as_dict(),
        "seeds": list(seeds),
        "side_by_side": min(len(seeds), available_cores()),
        "total_seconds": time.perf_counter() - started,
        "runs": [{key: outcome[key] for key in KEPT} for outcome in outcomes],
    }


def _run_workers(method: str, seeds: tuple[int, ...], settings: Settings, folder: Path) -> None:
    workers = []
    try:
        for seed in seeds:
            command = [sys.executable, "-m", "demo.worker", "--method", method, "--seed", str(seed)]
            command += ["--settings", json.dumps(settings.as_dict()), "--output", str(folder.resolve())]
            # One thread each: on a shared machine, threads that wait for each other cost more than they give.
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            workers.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **threads}))
        failed = [worker.args for worker in workers if worker.wait() != 0]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    if failed:
        raise RuntimeError(f"demo: {len(failed)} of {len(workers)} trainings failed: {' '.join(failed[0][1:6])}")
