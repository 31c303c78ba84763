"""Tables of the README and of docs/benchmarks.md, written from benchmarks/results.

    python -m benchmarks.tables            # writes both tables between their markers
    python -m benchmarks.tables --check    # exit status 1 if a table is not what the results say

Every number in these tables comes from a results file; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
WORDS = {
    "published": "published formulation",
    "published-freed": "published, first graph freed",
    "reference": "dense reference",
    "blocked": "gcng",
}
TIMED = ("published", "reference", "blocked")


def summary(results: dict) -> str:
    """The README's table: one line per setting, time / peak memory, and the ratios to the dense forms."""
    header = ["N", "D", "L", *(WORDS[name] for name in TIMED), "faster than published", "than reference"]
    header += ["memory of published", "share of GEMM rate"]
    lines = [_machine_line(results), "", *_table_head(header)]
    for row in results["rows"]:
        setting, providers = row["setting"], row["providers"]
        cells = [str(setting[key]) for key in ("samples", "embedding_size", "num_layers")]
        cells += [_time_and_memory(providers.get(name)) for name in TIMED]
        cells += [_speedup(providers, name) for name in ("published", "reference")]
        cells += [_memory_share(providers), _gemm_share(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(results: dict) -> str:
    """The documentation's table: one line per setting and provider, with spread, operations and accuracy."""
    header = ["N, D, L", "provider", "median s", "min s", "max s", "calls", "GFLOP/s of own work"]
    header += ["worst relative error", "peak MB", "predicted MB"]
    lines = [_machine_line(results), "", *_table_head(header)]
    for row in results["rows"]:
        for name, provider in row["providers"].items():
            lines.append(f"| {' | '.join(_detail_cells(row, name, provider))} |")
    return "\n".join([*lines, "", *_yardstick_lines(results)])


TARGETS: dict[str, Callable[[dict], str]] = {"README.md": summary, "docs/benchmarks.md": details}


def load_results(folder: Path = RESULTS) -> list[dict]:
    """All results files of a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def with_tables(text: str, results: list[dict], render: Callable[[dict], str], name: str) -> str:
    """The text with everything between its markers replaced by the tables."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{name} must hold {BEGIN} and then {END}, each once; add both lines where the table goes"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    tables = "\n\n".join(render(result) for result in results)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def _machine_line(results: dict) -> str:
    described, versions, protocol = results["machine"], results["versions"], results["protocol"]
    memory = f"{described['memory_bytes'] / 2**30:.0f} GiB"
    where = f"{described['cpu']}, {described['cores']} cores, {memory}"
    what = f"torch {versions['torch']}, gcng {versions['gcng']} at {results['commit'][:10]}"
    how = f"{protocol['dtype']}, {protocol['threads']} threads, dropout {protocol['dropout']:g}"
    return f"{where}; {what}; {how}; {results['date'][:10]}."


def _table_head(header: list[str]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'|'.join(' ---: ' for _ in header)}|"]


def _time_and_memory(provider: dict | None) -> str:
    if provider is None:
        return "not run"
    memory = provider["memory"]
    if memory["status"] != "measured":
        return _missing(memory)
    seconds = f"{_seconds(provider['time']['median'])} s" if "time" in provider else "not timed"
    return f"{seconds} / {_bytes(memory['peak_bytes'])}"


def _missing(memory: dict) -> str:
    predicted = memory.get("predicted_bytes")
    return memory["status"] + (f" ({_bytes(predicted)} predicted)" if predicted else "")


def _speedup(providers: dict, other: str) -> str:
    times = [providers.get(name, {}).get("time") for name in (other, "blocked")]
    return f"{times[0]['median'] / times[1]['median']:.1f}x" if all(times) else "-"


def _memory_share(providers: dict) -> str:
    rows = [providers.get(name, {}).get("memory", {}) for name in ("published", "blocked")]
    sizes = [row.get("peak_bytes") or row.get("predicted_bytes") for row in rows]
    return f"{100 * sizes[1] / sizes[0]:.1f} %" if all(sizes) else "-"


def _gemm_share(row: dict) -> str:
    time = row["providers"].get("blocked", {}).get("time")
    if time is None or "gemm" not in row:
        return "-"
    return f"{100 * row['useful_flops'] / time['median'] / row['gemm']['flops']:.0f} %"


def _detail_cells(row: dict, name: str, provider: dict) -> list[str]:
    setting, time, memory = row["setting"], provider.get("time"), provider["memory"]
    cells = [f"{setting['samples']}, {setting['embedding_size']}, {setting['num_layers']}", WORDS[name]]
    if time is None:
        cells += ["-"] * 6
    else:
        units = row["units_per_pair"]["useful" if name == "blocked" else name]
        operations = row["useful_flops"] * units / row["units_per_pair"]["useful"]
        cells += [f"{time[key]:.3g}" for key in ("median", "min", "max")]
        cells += [
            str(time["count"]),
            f"{operations / time['median'] / 1e9:.0f}",
            f"{provider['relative_error']:.1e}",
        ]
    measured = memory["status"] == "measured"
    cells.append(f"{memory['peak_bytes'] / 1e6:.0f}" if measured else memory["status"])
    predicted = memory.get("predicted_bytes")
    return [*cells, f"{predicted / 1e6:.0f}" if predicted else "-"]


def _yardstick_lines(results: dict) -> list[str]:
    """The product's rate per width: the median over the settings that have it."""
    rates: dict[tuple, list[float]] = {}
    for row in results["rows"]:
        if "gemm" in row:
            rates.setdefault(tuple(row["gemm"]["shape"]), []).append(row["gemm"]["flops"])
    lines = []
    for (rows, inner, columns), found in sorted(rates.items()):
        span = f"{min(found) / 1e9:.0f} to {max(found) / 1e9:.0f} GFLOP/s over the settings of that width"
        lines.append(f"- Yardstick ({rows} x {inner}) @ ({inner} x {columns}): {span}.")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _bytes(value: int) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Writes the tables, or checks them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args(arguments)
    results, status = load_results(options.results), 0
    for name, render in TARGETS.items():
        path = options.root / name
        text = path.read_text(encoding="utf-8")
        wanted = with_tables(text, results, render, name)
        if text != wanted and options.check:
            print(f"{name} is out of date: run python -m benchmarks.tables", file=sys.stderr)
            status = 1
        elif text != wanted:
            path.write_text(wanted, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
