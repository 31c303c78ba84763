"""The tables of docs/benchmarks.md: every provider, exponents, stages, accuracy, overhead, and the machine's rates."""

from __future__ import annotations

from benchmarks import notes
from benchmarks.results import setting_of
from benchmarks.scaling import Fit, scalings
from benchmarks.summaries import cpu_targets, gpu_targets, ops
from benchmarks.targets import copy_shares
from benchmarks.words import bytes_words, missing_words, provider_words, seconds_words, source_line, table


def documentation(files: list[tuple[str, dict]]) -> str:
    """Everything between the markers of docs/benchmarks.md."""
    return "\n\n".join(one_file(name, results) for name, results in files) or "No results file yet."


def one_file(name: str, results: dict) -> str:
    """All tables of one file that have rows."""
    made = {
        "Targets": gpu_targets(name, results) if "gpu" in results["machine"] else cpu_targets(results),
        "Rates of this machine": rates(results),
        "Every op beside its peers": ops(name, results),
        "Every row": every_row(results),
        "Exponents": exponents(results),
        "Time of an iteration by op": stages(results),
        "Synthesis by form": bandwidth(results),
        "Accuracy": accuracy(results),
        "Overhead of a call at N = 80": overhead(results),
    }
    parts = [f"### {name}", source_line(name, results, results["rows"])]
    for title, text in made.items():
        parts += [f"#### {title}", text] if text else []
    return "\n\n".join(parts)


def rates(results: dict) -> str:
    """Product and copy rates."""
    if not results["rates"]:
        return ""
    lines = [
        [precision, " x ".join(map(str, found["shape"])), f"{found['flops'] / 1e9:.0f} GFLOP/s"]
        for precision, widths in results["rates"]["gemm"].items()
        for found in widths.values()
    ]
    copy = results["rates"]["copy"]
    lines.append(["copy", bytes_words(copy["bytes_moved"]), f"{copy['bytes'] / 1e9:.1f} GB/s"])
    return table(["precision", "rows x inner x columns", "rate"], lines)


def every_row(results: dict) -> str:
    """Median and range of the passes, rates, error and memory of every provider of every row."""
    header = ["row", "provider", "forward", "backward", "both: least to largest", "rounds", "GFLOP/s", "GB/s"]
    header += ["worst relative error", "peak", "predicted"]
    lines = [
        _provider_cells(row, name, provider)
        for row in sorted(results["rows"], key=lambda row: (row["operation"], row["precision"], setting_of(row)))
        for name, provider in row["providers"].items()
    ]
    return table(header, lines) if lines else ""


def _provider_cells(row: dict, name: str, provider: dict) -> list[str]:
    times, memory = provider.get("time") or {}, provider.get("memory", {})
    whole = times.get("both") or times.get("forward")
    label = f"{row['operation']} {setting_of(row).name} {row['precision']}"
    cells = [label, provider_words(name)]
    if whole is None:
        reason = provider.get("reason", "").splitlines()
        cells += [missing_words(provider) + (f": {reason[0]}" if reason else ""), *["-"] * 6]
    else:
        work = row["work"].get("both" if "both" in times else "forward", row["work"]["forward"])
        cells += [seconds_words(times[key]["median"]) if key in times else "-" for key in ("forward", "backward")]
        cells += [f"{seconds_words(whole['min'])} to {seconds_words(whole['max'])}", str(whole["count"])]
        cells += [f"{work[key] / whole['median'] / 1e9:.3g}" for key in ("flops", "bytes")]
        error = provider.get("relative_error")
        cells.append("other loss" if error is None else f"{error:.1e}")
    for key in ("peak_bytes", "predicted_bytes"):
        cells.append(bytes_words(memory[key]) if key in memory else "-")
    return cells


def exponents(results: dict) -> str:
    """Fits of time and memory over each size, beside those of useful operations and of the estimate, and the powers."""
    lines = []
    for provider in ("gcng", "published"):
        for one in scalings(results, provider):
            where = [f"{one.operation} {one.precision}", provider_words(provider), one.size, one.fixed]
            span = f"{one.values[0]} to {one.values[-1]} ({len(one.values)})"
            time, memory, model, estimate = map(_fit_words, (one.time, one.memory, one.model, one.estimate))
            share = "-" if one.of_estimate is None else f"{100 * one.of_estimate:.0f} %"
            leading = [str(power) for power in one.expected] if one.expected else ["-", "-"]
            lines.append([*where, span, time, model, leading[0], memory, leading[1], estimate, share])
    header = ["op", "provider", "over", "at", "sizes", "time", "useful operations", "leading", "memory", "leading"]
    header += ["estimated memory", "peak of estimate"]
    return table(header, lines) if lines else ""


def _fit_words(found: Fit | None) -> str:
    return "-" if found is None else f"{found.exponent:.2f} ± {found.error:.2f}"


def stages(results: dict) -> str:
    """Time share of every op, its rate, and its share of the roof at its intensity."""
    lines = []
    for one in results["stages"]:
        for name, stage in sorted(one["stages"].items(), key=lambda item: -item[1]["seconds"]):
            share = f"{100 * stage['seconds'] / one['seconds']:.0f} %"
            cells = [f"{one['name']} {one['precision']}", provider_words(one["provider"]), name]
            cells += [seconds_words(max(stage["seconds"], 0.0)), share]
            lines.append([*cells, *_roof_cells(results, one, stage)])
        lines += _generator_cells(one) + _outside_cells(one)
    header = ["setting", "provider", "op", "time", "of the iteration", "GFLOP/s", "of the GEMM rate"]
    header += ["GB/s", "of the copy rate", "of its roof"]
    if not lines:
        return ""
    return "\n\n".join(filter(None, [table(header, lines), notes.lines(results, roof_share, notes.read())]))


def _generator_cells(one: dict) -> list[list[str]]:
    """The generator phase as a whole: its products, with what is computed again, over the product rate beside it."""
    if "generator" not in one:
        return []
    found = one["generator"]
    words = f"{100 * found['useful_share']:.0f} % ({100 * found['executed_share']:.0f} % with what is computed again)"
    name = f"{one['name']} {one['precision']}", provider_words(one["provider"]), "generator phase, alone"
    return [[*name, seconds_words(found["seconds"]), "-", "-", words, "-", "-", "-"]]


def _outside_cells(one: dict) -> list[list[str]]:
    """The iteration again, under the profiler: in calls of a matrix product, and in everything else."""
    if "outside_products" not in one:
        return []
    name = f"{one['name']} {one['precision']}", provider_words(one["provider"])
    seconds = one["outside_products"]
    total = sum(seconds.values())
    words = {"products": "all calls of a matrix product, by the profiler", "rest": "everything else, by the profiler"}
    return [
        [*name, words[part], seconds_words(spent), f"{100 * spent / total:.0f} %", *["-"] * 5]
        for part, spent in seconds.items()
    ]


def _roof_cells(results: dict, one: dict, stage: dict) -> list[str]:
    reached = roof_share(results, one, stage)
    if reached is None:
        return ["-"] * 5
    products, copies = roof(results, one)
    flops, moved = stage["flops"] / stage["seconds"], stage["bytes"] / stage["seconds"]
    return [
        f"{flops / 1e9:.3g}", f"{100 * flops / products:.0f} %", f"{moved / 1e9:.3g}", f"{100 * moved / copies:.0f} %",
        f"{100 * reached:.0f} %",
    ]  # fmt: skip


def roof_share(results: dict, one: dict, stage: dict) -> float | None:
    """Share of the smaller of product rate and copy rate at the stage's intensity; None where there is no roof."""
    rate = roof(results, one)
    if rate is None or not stage["bytes"] or stage["seconds"] <= 0:
        return None
    products, copies = rate
    least = max(stage["flops"] / products, stage["bytes"] / copies)
    return least / stage["seconds"]


def roof(results: dict, one: dict) -> tuple[float, float] | None:
    """Product rate at the setting's width and precision, and copy rate: those taken between the rounds of the stages.

    A file from before these were taken has the rates of the machine only, which another minute may not reach.
    """
    if "rates" in one:
        return one["rates"]["gemm_flops"], one["rates"]["copy_bytes"]
    if not results["rates"]:
        return None
    by_width = results["rates"]["gemm"].get(one["precision"], {})
    if not by_width:
        return None
    widths = [key for key in by_width if key.isdigit()]  # beside them lies the largest product of a GPU
    width = min(widths, key=lambda key: abs(int(key) - one["setting"]["embedding_size"]))
    return by_width[width]["flops"], results["rates"]["copy"]["bytes"]


def bandwidth(results: dict) -> str:
    """Every pass of both forms of the synthesis: time, and what it moves as a share of the copy rate beside it."""
    lines = []
    for one in results.get("bandwidth", ()):
        where = [one["setting"], one["form"], one["gates"]]
        if "passes" not in one:
            lines.append([*where, f"no: {' '.join(one['reason'].splitlines()[:2])}", *["-"] * 4])
        for which, time in one.get("passes", {}).items():
            median, least, most = (seconds_words(time[key]) for key in ("median", "min", "max"))
            shares = copy_shares(one, which).values() if "bytes" in time else ()
            cells = [f"{median} ({least} to {most})", *([f"{100 * share:.0f} %" for share in shares] or ["-", "-"])]
            lines.append([*where, which, *cells, f"{one['relative_error']:.1e}"])
    header = ["setting", "form", "gates", "pass", "time", "of the copy rate", "by gates alone", "worst relative error"]
    return table(header, lines) if lines else ""


def accuracy(results: dict) -> str:
    """Worst relative error of gcng beside that of the dense definition, by op and precision."""
    lines = []
    for one in results["accuracy"]:
        for name, found in one["providers"].items():
            if name == "reference":
                continue
            dense = one["providers"].get("reference")
            same = f"{dense['errors'][found['array']]:.1e}" if dense else "torch cannot"
            worst = f"{dense['worst']:.1e} ({dense['array']})" if dense else "-"
            where = [one["operation"], one["setting"], one["precision"], provider_words(name)]
            lines.append([*where, found["array"], f"{found['worst']:.1e}", same, worst])
    header = ["op", "setting", "precision", "provider", "worst array", "its error", "dense there", "dense, worst"]
    return table(header, lines) if lines else ""


def overhead(results: dict) -> str:
    """Time of a call by way of calling."""
    lines = []
    names = list(dict.fromkeys(row["operation"] for row in results["overhead"]))
    for row in sorted(results["overhead"], key=lambda row: names.index(row["operation"])):
        if "reason" in row:
            time = f"no: {row['reason']}"
        else:
            time = f"{seconds_words(row['median'])} ({seconds_words(row['min'])} to {seconds_words(row['max'])})"
        lines.append([row["operation"], row["setting"], row["way"], time])
    return table(["op", "setting", "called as", "time"], lines) if lines else ""
