"""Two results files beside each other: what changed by more than the spread of both.

    python -m benchmarks.compare before.json after.json

A time has changed where the ranges of the rounds (least to largest) do not overlap AND the medians differ by more than
MIN_CHANGE. Peak memory has changed beyond MIN_CHANGE and a page or two. Exit status 1 if something got worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MIN_CHANGE = 0.05
PAGES = 2**16  # bytes of a resident set that mean nothing


class Change(NamedTuple):
    """One reading in two files."""

    row: str
    provider: str
    what: str  # a pass, "memory" or "status"
    before: float | str
    after: float | str
    verdict: str  # "slower", "faster", "larger", "smaller", "same", "changed"

    @property
    def is_worse(self) -> bool:
        """Slower, larger, or no longer measured."""
        return self.verdict in ("slower", "larger") or (self.verdict == "changed" and self.after != "measured")


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Every reading that both files have, in the order of the first."""
    rows = {row["name"]: row for row in after["rows"]}
    for row in before["rows"]:
        other = rows.get(row["name"])
        if other is None:
            continue
        for name, old in row["providers"].items():
            new = other["providers"].get(name)
            if new is None:
                continue
            if old["status"] != new["status"]:
                yield Change(row["name"], name, "status", old["status"], new["status"], "changed")
                continue
            for which, old_time in (old.get("time") or {}).items():
                new_time = (new.get("time") or {}).get(which)
                if new_time:
                    verdict = time_verdict(old_time, new_time)
                    yield Change(row["name"], name, which, old_time["median"], new_time["median"], verdict)
            peaks = [one.get("memory", {}).get("peak_bytes") for one in (old, new)]
            if None not in peaks:
                yield Change(row["name"], name, "memory", *peaks, memory_verdict(*peaks))


def time_verdict(before: dict, after: dict) -> str:
    """Whether two spreads of one call differ."""
    if abs(after["median"] / before["median"] - 1) <= MIN_CHANGE:
        return "same"
    if after["min"] > before["max"]:
        return "slower"
    return "faster" if after["max"] < before["min"] else "same"


def memory_verdict(before: int, after: int) -> str:
    """Whether two peaks differ."""
    if abs(after - before) <= max(PAGES, MIN_CHANGE * before):
        return "same"
    return "larger" if after > before else "smaller"


def report(before: dict, after: dict) -> tuple[str, bool]:
    """The changes in words, and whether something got worse."""
    found = list(changes(before, after))
    told = [change for change in found if change.verdict != "same"]
    kinds = [{key: one["machine"].get(key) for key in ("cpu", "cores", "gpu")} for one in (before, after)]
    same_machine = kinds[0] == kinds[1]
    lines = [] if same_machine else ["the two files are of different machines"]
    for change in told:
        lines.append(f"{change.row} {change.provider} {change.what}: {_words(change)} ({change.verdict})")
    lines.append(f"{len(found)} readings in both, {len(told)} changed beyond the spread")
    return "\n".join(lines), any(change.is_worse for change in told)


def _words(change: Change) -> str:
    if change.what == "status":
        return f"{change.before} -> {change.after}"
    unit, scale = ("MB", 1e-6) if change.what == "memory" else ("ms", 1e3)
    ratio = change.after / change.before
    return f"{change.before * scale:.4g} -> {change.after * scale:.4g} {unit}, x {ratio:.2f}"


def compare_files(before: Path, after: Path) -> int:
    """Print the report; 1 if something got worse."""
    text, worse = report(*(json.loads(path.read_text(encoding="utf-8")) for path in (before, after)))
    print(text)
    return 1 if worse else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    return compare_files(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
