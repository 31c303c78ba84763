"""Checks of the GPU suite that are no timings: repeats bit for bit, and what a sanitizer runs.

    python -m benchmarks.checks repeats --results FILE --device cuda     # 250 times the same bits, on two shapes
    python -m benchmarks.checks once --device cuda     # every op once, both syntheses: what a sanitizer runs

The first writes an entry of `checks` in the results file, as benchmarks/verdicts.py does for other programs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import bandwidth, operations
from benchmarks.operations import Operation, Unavailable
from benchmarks.results import Results
from benchmarks.settings import Setting
from benchmarks.verdicts import store
from gcng.ops import dispatch
from tests.run_case import equal_bits

REPEATS, SMOKE_REPEATS = 250, 3
SHAPES = (Setting(1, 512, 256), Setting(1, 256, 1024))
SANITIZED = Setting(1, 64, 48)
SYNTHESIZING = ("iteration", "synthesis")


def repeats(device: str, *, smoke: bool = False) -> dict:
    """Losses and gradients of an iteration again and again: the first repeat that differs in a bit fails."""
    iteration = operations.load("iteration")
    precision = "float32" if device == "cpu" else "bfloat16"
    shapes, count = ((iteration.tiny,), SMOKE_REPEATS) if smoke else (SHAPES, REPEATS)
    start, details = time.time(), []
    for setting in shapes:
        ready = iteration.prepare("gcng", setting, precision, device)
        first = ready.arrays()
        if wrong := sorted(name for name, x in first.items() if not bool(torch.isfinite(x).all())):
            text = f"{setting.name} {precision}: not finite: {', '.join(wrong[:5])}"
            return {"status": "failed", "details": text, "seconds": time.time() - start}
        for repeat in range(1, count):
            again = ready.arrays()
            wrong = sorted(name for name, x in first.items() if not equal_bits(x, again[name]))
            if wrong:
                text = f"{setting.name} {precision}: repeat {repeat} differs in {', '.join(wrong[:5])}"
                return {"status": "failed", "details": text, "seconds": time.time() - start}
        details.append(f"{setting.name} {precision}: {count} times the same bits")
    return {"status": "passed", "details": "; ".join(details), "seconds": time.time() - start}


def once(device: str, *, smoke: bool = False) -> list[str]:
    """Every op forward and backward, once, on a small shape; names of those whose results are not finite.

    What synthesizes runs again with the form of the synthesis that dispatch leaves out.
    """

    def run(names: tuple[str, ...]) -> list[str]:
        loaded = map(operations.load, names)
        return [x for one in loaded for x in _not_finite(one, one.tiny if smoke else SANITIZED, device)]

    bad = run(operations.OPERATIONS)
    for form, other in other_syntheses(device):
        with other:
            bad += [f"{form}: {name}" for name in run(SYNTHESIZING)]
    return bad


def other_syntheses(device: str) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Name and context of each form of the synthesis that runs on a device and that dispatch does not take there."""
    like = torch.empty(0, device=device)
    for form, kernels in bandwidth.forms(device).items():
        if isinstance(kernels, str):
            print(f"{form} is not run: {kernels}")
        elif type(kernels) is not type(dispatch.synthesis_kernels(like)):
            yield form, dispatch.forced_kernels(dispatch.pair_kernels(like), kernels)


def _not_finite(operation: Operation, setting: Setting, device: str) -> list[str]:
    bad = []
    for precision in ("float32", "bfloat16"):
        try:
            arrays = operation.prepare("gcng", setting, precision, device).arrays()
        except Unavailable:
            continue
        names = [key for key, x in arrays.items() if not bool(torch.isfinite(x).all())]
        bad += [f"{operation.name} {precision} {key}" for key in names]
    return bad


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, few repeats")
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("repeats", "once"):
        actions.add_parser(name)
    options = parser.parse_args(arguments)
    if options.action == "once":
        bad = once(options.device, smoke=options.smoke)
        print("not finite: " + ", ".join(bad) if bad else "every result is finite")
        return 1 if bad else 0
    results = Results.open(options.results, options.device)
    entry = repeats(options.device, smoke=options.smoke)
    store(results.data, "repeats", entry)
    results.save()
    print(f"repeats: {entry['status']}: {entry['details']}")
    return 1 if entry["status"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
