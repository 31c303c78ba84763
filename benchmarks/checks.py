"""Checks of the GPU suite that are no timings: repeats bit for bit, what a sanitizer or a test run said.

    python -m benchmarks.checks repeats --results FILE --device cuda     # 250 times the same bits, on two shapes
    python -m benchmarks.checks once --device cuda     # every op once, both syntheses: what a sanitizer runs
    python -m benchmarks.checks record PART CODE LOG --results FILE      # exit code and log of another program
    python -m benchmarks.checks join PART --results FILE                 # one entry of those named PART-...

Each writes one entry of `checks` in the results file: passed, failed, or not run with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import bandwidth, machine, operations
from benchmarks.operations import Operation, Unavailable
from benchmarks.results import Results
from benchmarks.settings import Setting
from gcng.ops import dispatch
from tests.run_case import equal_bits

REPEATS, SMOKE_REPEATS = 250, 3
SHAPES = (Setting(1, 512, 256), Setting(1, 256, 1024))
SANITIZED = Setting(1, 64, 48)
SYNTHESIZING = ("iteration", "synthesis")
OUT_OF_TIME = (124, 137)  # of timeout, by the first signal and by the last
WORST = ("failed", "not run", "passed")
NOT_RUN = ("Device not supported", "command not found", "failed to run command")
CLEAN = (r"ERROR SUMMARY: 0 errors", r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)")


def repeats(device: str, *, smoke: bool = False) -> dict:
    """Losses and gradients of an iteration again and again: the first repeat that differs in a bit fails."""
    iteration = operations.load("iteration")
    precision = "float32" if device == "cpu" else "bfloat16"
    shapes, count = ((iteration.tiny,), SMOKE_REPEATS) if smoke else (SHAPES, REPEATS)
    start, details = time.time(), []
    for setting in shapes:
        ready = iteration.prepare("gcng", setting, precision, device)
        first = ready.arrays()
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


def judged(part: str, code: int, log: str) -> dict:
    """What a program's exit code and log mean."""
    for reason in NOT_RUN:
        if reason in log and not re.search(r"\d+ passed", log):
            return {"status": "not run", "details": reason}
    if code in OUT_OF_TIME:
        words = "ran out of the time that the suite gives it"
        if not part.startswith(("tests", "long")):
            return {"status": "not run", "details": words}
        marks = "".join(re.findall(r"^([.sxXFE]+)(?: +\[ *\d+%\])?$", log, re.MULTILINE))
        wrong, right = marks.count("F") + marks.count("E"), marks.count(".")
        words = f"{wrong} failed, {right} passed, then {words}"
        return {"status": "failed" if wrong else "not run", "details": words}
    if part.startswith("sanitizer"):
        clean = any(re.search(pattern, log) for pattern in CLEAN)
        lines = [line.strip("= ") for line in log.splitlines() if "SUMMARY" in line]
        status = "passed" if clean and code == 0 else "failed"
        return {"status": status, "details": "; ".join(lines) or f"exit code {code}, no summary"}
    counted = re.findall(r"^=* ?(.*(?:passed|failed|skipped|error).*? in [0-9.]+s.*?) ?=*$", log, re.MULTILINE)
    words = counted[-1] if counted else (log.strip().splitlines() or ["no output"])[-1]
    if code == 0 and re.search(r"\d+ skipped", words) and "passed" not in words:
        return {"status": "not run", "details": words}
    return {"status": "passed" if code == 0 else "failed", "details": words}


def joined(results: Results, part: str) -> dict:
    """The entries whose names begin with a part's as one: the worst status, and what each says."""
    entries = [one for one in results.data["checks"] if one["part"].startswith(f"{part}-")]
    if not entries:
        return {"status": "not run", "details": "nothing of it was run"}
    words = [f"{one['part'].removeprefix(f'{part}-')}: {one['status']}, {one['details']}" for one in entries]
    return {"status": min((one["status"] for one in entries), key=WORST.index), "details": "; ".join(words)}


def store(results: Results, part: str, entry: dict) -> None:
    """Replace the entry of a part."""
    others = [one for one in results.data["checks"] if one["part"] != part]
    results.data["checks"] = [*others, {"part": part, **entry, **machine.revision()}]
    results.save()


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, few repeats")
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("repeats", "once"):
        actions.add_parser(name)
    record = actions.add_parser("record")
    record.add_argument("part")
    record.add_argument("code", type=int)
    record.add_argument("log", type=Path)
    actions.add_parser("join").add_argument("part")
    options = parser.parse_args(arguments)
    if options.action == "once":
        bad = once(options.device, smoke=options.smoke)
        print("not finite: " + ", ".join(bad) if bad else "every result is finite")
        return 1 if bad else 0
    results = Results.open(options.results, options.device)
    if options.action == "repeats":
        part, entry = "repeats", repeats(options.device, smoke=options.smoke)
    elif options.action == "join":
        part, entry = options.part, joined(results, options.part)
    else:
        part = options.part
        entry = judged(part, options.code, options.log.read_text(encoding="utf-8", errors="replace"))
    store(results, part, entry)
    print(f"{part}: {entry['status']}: {entry['details']}")
    return 1 if entry["status"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
