"""Numbers and names as the tables print them, and where a table comes from."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.machine import BUSY

NOT_MEASURED = "not measured"
MODIFIED = {False: "", True: " with changes", None: ", changes unknown"}  # what follows the commit of a row
WORDS = {
    "published": "published formulation",
    "published-compiled": "published, torch.compile",
    "reference": "dense reference",
    "reference-compiled": "dense reference, torch.compile",
    "gcng": "gcng",
    "gcng-no-extension": "gcng, no extension",
    "gcng-recompute": "gcng, nothing kept",
}


def provider_words(name: str) -> str:
    """A provider's name for readers."""
    return WORDS.get(name, name)


def seconds_words(seconds: float) -> str:
    """Three digits in a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            value = seconds * scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def bytes_words(size: float) -> str:
    """Gigabytes, megabytes or kilobytes of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            value = size / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table, numbers to the right."""
    header = list(header)
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(' ---: ' for _ in header)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def source_line(file: str, results: dict, rows: Iterable[dict] = ()) -> str:
    """Machine, versions, commits and dates of some rows, and the file that holds them."""
    described, versions = results["machine"], results["versions"]
    memory = f"{described['memory_bytes'] / 2**30:.0f} GiB"
    where = f"{described['cpu']}, {described['cores']} cores, {memory}"
    if "gpu" in described:
        where = f"{described['gpu']}, {described['gpu_memory_bytes'] / 2**30:.0f} GiB"
    stamped = [row for row in rows if row.get("commit")]
    commits = sorted({row["commit"][:10] + MODIFIED[row.get("modified", False)] for row in stamped})
    dates = sorted({row["date"][:10] for row in stamped})
    when = f"; commit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if stamped else ""
    extensions = {row["extension"] for row in stamped if row.get("extension", "none") != "none"}
    extension = f"; {', '.join(sorted(extensions))}" if extensions else ""
    threads = results["protocol"].get("threads")
    load = max((row["load_average"] for row in stamped if "load_average" in row), default=0.0)
    busy = f"; load average up to {load:.1f} before a row, earlier rows included" if load > BUSY else ""
    return (
        f"{where}; {threads} threads; torch {versions['torch']}, gcng {versions['gcng']}{extension}{when}{busy}; "
        f"`benchmarks/results/{file}`."
    )


def missing_words(provider: dict | None) -> str:
    """What a cell says where there is no number."""
    if provider is None:
        return NOT_MEASURED
    memory = provider.get("memory", {})
    predicted = memory.get("predicted_bytes")
    if provider["status"] in ("out of memory", "killed"):
        return provider["status"] + (f" ({bytes_words(predicted)} predicted)" if predicted else "")
    if provider["status"] == "measured":
        return "not timed"
    return provider["status"]
