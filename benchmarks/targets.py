"""The targets on a GPU and on a CPU, each read from a results file: what was asked for, what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


def _peak(name: str, limit: float, provider: str = "gcng-recompute") -> Callable[[dict], tuple[str, bool] | None]:
    def read(results: dict) -> tuple[str, bool] | None:
        row = _row(results, name) or {"providers": {}}
        size = row["providers"].get(provider, {}).get("memory", {}).get("peak_bytes")
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
    # Of the fastest product of the card, where that was measured: one of a tile's shape may be slower.
    square = results["rates"].get("gemm", {}).get("bfloat16", {}).get("square", {}).get("flops", 0.0)
    rates = [one["generator"].get("gemm_flops", square) for one in found]
    scales = [rate / max(rate, square) if square else 1.0 for rate in rates]
    shares = [
        max(one["generator"][key] * scale for one, scale in zip(found, scales, strict=True))
        for key in ("executed_share", "useful_share")
    ]
    return f"{100 * shares[0]:.0f} % ({100 * shares[1]:.0f} % without recompute)", shares[0] >= 0.5


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
    words = f"{seconds_words(ours)}; {best} {seconds_words(times[best])}"
    return words + ("; no peer installed" if set(times) == {"chunked torch"} else ""), ours <= times[best]


def _captured(results: dict) -> tuple[str, bool] | None:
    for row in results["overhead"]:
        if (row["operation"], row["way"]) == ("iteration", "CUDA graph"):
            return ("no: " + row["reason"], False) if "reason" in row else (seconds_words(row["median"]), True)
    return None


def _copy_share(which: str, least: float) -> Callable[[dict], tuple[str, bool] | None]:
    """Shares of both forms of the synthesis with bfloat16 gates; the one that dispatch prefers has to reach it."""

    def read(results: dict) -> tuple[str, bool] | None:
        found = {one["form"]: copy_shares(one, which) for one in measured_forms(results, "bfloat16")}
        if not found:
            return None
        words = (f"{form} {100 * one['bytes']:.0f} %{_gates_words(one)}" for form, one in found.items())
        return "; ".join(words), next(iter(found.values()))["bytes"] >= least

    return read


def _gates_words(shares: dict[str, float]) -> str:
    return f" ({100 * shares['gate_bytes']:.0f} % by gates alone)" if shares["gate_bytes"] < shares["bytes"] else ""


def measured_forms(results: dict, gates: str) -> list[dict]:
    """Entries of the bandwidth part that were timed, the preferred form first."""
    return [one for one in results.get("bandwidth", ()) if one["gates"] == gates and "passes" in one]


def copy_shares(one: dict, which: str) -> dict[str, float]:
    """What a pass has to move, over its time, as shares of the copy rate beside it: see benchmarks/bandwidth.py."""
    found = one["passes"][which]
    return {key: found[key] / found["median"] / one["copy_bytes"] for key in ("bytes", "gate_bytes")}


def form_ahead(results: dict | None, gates: str = "bfloat16") -> str:
    """One sentence: which form of the synthesis is ahead, and by how much; that it is not measured where it is not."""
    forms = measured_forms(results, gates) if results else []
    if len(forms) < 2:
        return "Which form of the synthesis is ahead, CUDA C++ or Triton, is not measured."
    words = []
    for which in ("forward", "backward"):
        fast, slow = sorted(forms, key=lambda one: one["passes"][which]["median"])
        times = [one["passes"][which] for one in (fast, slow)]
        if times[0]["max"] >= times[1]["min"]:
            words.append(f"{which}: no difference beyond the spread")
        else:
            words.append(f"{which}: {fast['form']}, by {times[1]['median'] / times[0]['median']:.2f}x")
    return f"The form of the synthesis that is ahead, {gates} gates: {'; '.join(words)}."


def _faster_than(name: str, other: str, least: float) -> Callable[[dict], tuple[str, bool] | None]:
    def read(results: dict) -> tuple[str, bool] | None:
        times = [_seconds(results, name, provider) for provider in (other, "gcng")]
        return None if None in times else (f"{times[0] / times[1]:.1f}x", times[0] / times[1] >= least)

    return read


def _memory_share(name: str, other: str, most: float) -> Callable[[dict], tuple[str, bool] | None]:
    def read(results: dict) -> tuple[str, bool] | None:
        providers = (_row(results, name) or {"providers": {}})["providers"]
        sizes = [providers.get(one, {}).get("memory", {}).get("peak_bytes") for one in ("gcng", other)]
        if not all(sizes):
            return None
        words = f"{100 * sizes[0] / sizes[1]:.1f} % ({bytes_words(sizes[0])} of {bytes_words(sizes[1])})"
        return words, sizes[0] / sizes[1] <= most

    return read


def _stage(results: dict, provider: str, name: str) -> dict:
    return next((one for one in results["stages"] if (one["provider"], one["name"]) == (provider, name)), {})


def _cpu_product_share(results: dict) -> tuple[str, bool] | None:
    found = _stage(results, "gcng", "N160-D512-L1").get("generator")
    return None if found is None else (f"{100 * found['useful_share']:.0f} %", found["useful_share"] >= 0.7)


def _outside_share(results: dict) -> tuple[str, bool] | None:
    """Of two profiled iterations: seconds in anything but products, with the extension and without."""
    found = [_stage(results, provider, "N160-D512-L1").get("outside_products") for provider in ("gcng", WITHOUT)]
    if not all(found):
        return None
    with_it, without = (one["rest"] for one in found)
    words = f"{100 * with_it / without:.0f} % ({seconds_words(with_it)} of {seconds_words(without)})"
    return words, with_it / without <= 0.5


WITHOUT = "gcng-no-extension"
CPU_ITERATION, CPU_SYNTHESIS = "iteration/N160-D512-L1/float32", "synthesis/N160-D512-L1/float32"
CPU_TARGETS = (
    Target("one iteration, against the published formulation", "at least 3.5x faster",
           _faster_than(CPU_ITERATION, "published", 3.5)),
    Target("one iteration, against the dense reference", "at least 2.5x faster",
           _faster_than(CPU_ITERATION, "reference", 2.5)),
    Target("its peak memory, of the published formulation's", "at most 10 %",
           _memory_share(CPU_ITERATION, "published", 0.1)),
    Target("useful products of the generator phase, share of the product rate", "at least 70 %", _cpu_product_share),
    Target("time outside of products, of that without the extension", "at most 50 %", _outside_share),
    Target("synthesis, forward and backward, against its dense form", "at least 5x faster",
           _faster_than(CPU_SYNTHESIS, "reference", 5)),
    Target("peak memory of one iteration, N = 1024, D = 128", "at most 700 MB",
           _peak("iteration/N1024-D128-L1/float32", 700e6, "gcng")),
)  # fmt: skip
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
    Target("synthesis and its reductions, share of the card's copy rate", "at least 80 %", _copy_share("forward", 0.8)),
    Target("synthesis backward, share of the card's copy rate", "at least 70 %", _copy_share("backward", 0.7)),
)


def readings(results: dict | None, targets: Iterable[Target] = TARGETS) -> Iterator[tuple[str, str, str, str]]:
    """(what, limit, measured, whether it is reached); without a file every cell says that it is not measured."""
    for target in targets:
        found = target.read(results) if results is not None else None
        if found is None:
            yield target.what, target.limit, NOT_MEASURED, "-"
        else:
            yield target.what, target.limit, found[0], "yes" if found[1] else "no"
