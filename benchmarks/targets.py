"""The GPU targets, each read from a results file: what was asked for, what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.results import measured_time, setting_of
from benchmarks.words import NOT_MEASURED, bytes_words, seconds_words


@dataclass(frozen=True)
class Target:
    """One line: what, its limit in words, and a reading (words, whether it is reached) or None."""

    what: str
    limit: str
    read: Callable[[dict], tuple[str, bool] | None]


def _row(results: dict, name: str) -> dict | None:
    return next((row for row in results["rows"] if row["name"] == name), None)


def _seconds(results: dict, name: str, provider: str = "gcng") -> float | None:
    row = _row(results, name)
    time = measured_time(row, provider) if row else None
    return time["median"] if time else None


def _at_most(name: str, limit: float) -> Callable[[dict], tuple[str, bool] | None]:
    def read(results: dict) -> tuple[str, bool] | None:
        seconds = _seconds(results, name)
        return None if seconds is None else (seconds_words(seconds), seconds <= limit)

    return read


def _peak(name: str, limit: float) -> Callable[[dict], tuple[str, bool] | None]:
    def read(results: dict) -> tuple[str, bool] | None:
        row = _row(results, name) or {"providers": {}}
        size = row["providers"].get("gcng-recompute", {}).get("memory", {}).get("peak_bytes")
        return None if size is None else (bytes_words(size), size <= limit)

    return read


def _per_pair(results: dict) -> tuple[str, bool] | None:
    sizes = (2048, 8192)
    times = [_seconds(results, f"iteration/N{n}-D512-L1/bfloat16") for n in sizes]
    if None in times:
        return None
    small, large = (t / (n * (n + 1) / 2) for t, n in zip(times, sizes, strict=True))
    return f"{100 * (large / small - 1):+.0f} %", abs(large / small - 1) <= 0.1


def _share(results: dict) -> tuple[str, bool] | None:
    found = [one for one in results["stages"] if one.get("generator") and one["provider"] == "gcng"]
    if not found:
        return None
    executed, useful = (max(one["generator"][key] for one in found) for key in ("executed_share", "useful_share"))
    return f"{100 * executed:.0f} % ({100 * useful:.0f} % without recompute)", executed >= 0.5


def _against_dense(results: dict) -> tuple[str, bool] | None:
    """The largest N where the dense reference fits, in tf32 and ieee float32, against gcng in bfloat16."""
    words, reached = [], True
    for precision, factor in (("tf32", 6), ("float32", 15)):
        rows = [r for r in results["rows"] if (r["operation"], r["precision"]) == ("iteration", precision)]
        timed = [row for row in rows if measured_time(row, "reference") and setting_of(row).classes == 0]
        if not timed:
            return None
        largest = max(timed, key=lambda row: setting_of(row).samples)
        ours = _row(results, largest["name"].replace(precision, "bfloat16"))
        time = measured_time(ours, "gcng") if ours else None
        if time is None:
            return None
        ratio = measured_time(largest, "reference")["median"] / time["median"]
        peaks = [
            row["providers"][name].get("memory", {}).get("peak_bytes", 0)
            for row, name in ((largest, "reference"), (ours, "gcng"))
        ]
        share = peaks[0] / peaks[1] if peaks[1] else 0
        words.append(f"{ratio:.1f}x than {precision}, 1/{share:.0f} of its memory (N = {setting_of(largest).samples})")
        reached &= ratio >= factor and share >= 50
    return "; ".join(words), reached


def _cross_entropy(results: dict) -> tuple[str, bool] | None:
    row = _row(results, "class_cross_entropy/N32768-D512-L1-C131072/bfloat16")
    times = {name: t["median"] for name in (row or {"providers": {}})["providers"] if (t := measured_time(row, name))}
    ours = times.pop("gcng", None)
    times.pop("gcng-no-extension", None)
    if ours is None or not times:
        return None
    best = min(times, key=times.get)
    return f"{seconds_words(ours)}; {best} {seconds_words(times[best])}", ours <= times[best]


def _captured(results: dict) -> tuple[str, bool] | None:
    for row in results["overhead"]:
        if (row["operation"], row["way"]) == ("iteration", "CUDA graph"):
            return ("no: " + row["reason"], False) if "reason" in row else (seconds_words(row["median"]), True)
    return None


TARGETS = (
    Target("one iteration, N = 1024", "at most 60 ms", _at_most("iteration/N1024-D512-L1/bfloat16", 0.060)),
    Target("one iteration, N = 4096", "at most 0.9 s", _at_most("iteration/N4096-D512-L1/bfloat16", 0.9)),
    Target("time per pair, N = 8192 against N = 2048", "within 10 %", _per_pair),
    Target("executed products of the generator phase, share of the card's product rate", "at least 50 %", _share),
    Target(
        "one iteration, N = 4096, C = 11,318", "at most 1.6 s", _at_most("iteration/N4096-D512-L1-C11318/bfloat16", 1.6)
    ),
    Target("peak memory, N = 4096, nothing kept", "at most 6 GB", _peak("iteration/N4096-D512-L1/bfloat16", 6e9)),
    Target("peak memory, N = 16,384, nothing kept", "at most 24 GB", _peak("iteration/N16384-D512-L1/bfloat16", 24e9)),
    Target("against the dense reference at its largest N", "6x than tf32, 15x than float32, 1/50", _against_dense),
    Target("one iteration, N = 80", "at most 6 ms", _at_most("iteration/N80-D512-L1/bfloat16", 0.006)),
    Target("the same from a CUDA graph", "capturable", _captured),
    Target(
        "linear cross-entropy, 32,768 rows, C = 131,072, forward and backward", "no slower than peers", _cross_entropy
    ),
)


def readings(results: dict | None) -> Iterator[tuple[str, str, str, str]]:
    """(what, limit, measured, whether it is reached); without a file every cell says that it is not measured."""
    for target in TARGETS:
        found = target.read(results) if results is not None else None
        if found is None:
            yield target.what, target.limit, NOT_MEASURED, "-"
        else:
            yield target.what, target.limit, found[0], "yes" if found[1] else "no"
