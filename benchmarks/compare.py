"""Two results files beside each other: what changed by more than the spread of both.

    python -m benchmarks.compare before.json after.json

A time has changed where the ranges of the rounds (least to largest) do not overlap AND the medians differ by more than
MIN_CHANGE. Peak memory has changed beyond MIN_CHANGE and a page or two. Exit status 1 if something got worse: in a row
of both files a reading that the second lacks is worse. Rows that the second lacks are named, and are no change.
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
GONE = "not in the second file"
SHOWN = 5  # rows that are named where many are missing


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
    """Every reading of the first file in the rows that both have; one that the second lacks is a change."""
    rows = {row["name"]: row for row in after["rows"]}
    for row in before["rows"]:
        for name, old in row["providers"].items() if row["name"] in rows else ():
            new = rows[row["name"]]["providers"].get(name, {"status": GONE})
            if old["status"] == new["status"]:
                yield from _readings(row["name"], name, old, new)
            elif new["status"] != GONE or old["status"] == "measured":
                yield Change(row["name"], name, "status", old["status"], new["status"], "changed")


def _readings(row: str, provider: str, old: dict, new: dict) -> Iterator[Change]:
    """Times and memory of a provider whose status is the same in both."""
    new_times = new.get("time") or {}
    for which, old_time in (old.get("time") or {}).items():
        if which in new_times:
            medians = old_time["median"], new_times[which]["median"]
            yield Change(row, provider, which, *medians, time_verdict(old_time, new_times[which]))
        else:
            yield Change(row, provider, which, "timed", GONE, "changed")
    peaks = [one.get("memory", {}).get("peak_bytes") for one in (old, new)]
    if None not in peaks:
        yield Change(row, provider, "memory", *peaks, memory_verdict(*peaks))
    elif peaks[0] is not None:
        yield Change(row, provider, "memory", "measured", GONE, "changed")


def missing_rows(before: dict, after: dict) -> list[str]:
    """Names of the rows that only the first file has: another plan, or a run that was cut off."""
    names = {row["name"] for row in after["rows"]}
    return [row["name"] for row in before["rows"] if row["name"] not in names]


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
    if missing := missing_rows(before, after):
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        lines.append(f"rows of the first file only: {', '.join(missing[:SHOWN])}{more}")
    lines.append(f"{len(found)} readings compared, {len(told)} changed beyond the spread")
    return "\n".join(lines), any(change.is_worse for change in told)


def _words(change: Change) -> str:
    if isinstance(change.before, str):
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
