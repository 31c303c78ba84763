"""The full measurement: memory of every provider at every setting, then time, into benchmarks/results.

    python -m benchmarks.measure                 # all settings, about half an hour on two cores
    python -m benchmarks.measure --smoke --output smoke.json

Memory comes first, smallest N first: where the square law predicts more than the machine has, a provider is
recorded as out of memory with the predicted bytes, and is left out of the timings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine, memory, plan
from benchmarks.settings import (
    GEMM_ROWS,
    MEMORY_PROVIDERS,
    PROVIDERS,
    Setting,
    all_settings,
    shipped_settings,
    units_per_pair,
)

RESULTS = Path(__file__).parent / "results"
BUSY = 0.5  # load average above which the machine is not idle
SMOKE = {"samples": (8,), "embedding_sizes": (16,), "layers": (1,)}


def measure_memory(settings: list[Setting], providers: tuple[str, ...], threads: int) -> dict:
    """Peaks by provider and setting, each from a process of its own."""
    table: dict[str, dict[Setting, dict]] = {name: {} for name in providers}
    for setting in settings:
        for name in providers:
            known = {s: row["peak_bytes"] for s, row in table[name].items() if row["status"] == "measured"}
            predicted = None if name == "blocked" else memory.predicted_bytes(setting, known)
            available = memory.available_bytes()
            if predicted is not None and predicted > memory.USABLE_SHARE * available:
                row = {"status": "out of memory", "available_bytes": available}
            else:
                row = memory.measure_in_subprocess(name, setting, threads)
            table[name][setting] = {**row, "predicted_bytes": predicted}
            _say(f"{setting.name} {name}: {_memory_words(table[name][setting])}")
    return table


def timing_plan(settings: list[Setting], peaks: dict, providers: tuple[str, ...], repeats: int) -> dict:
    """Providers that fit, and the one that serves as float64 truth: it needs twice its float32 peak."""
    rows = []
    for setting in settings:
        fitting = tuple(name for name in providers if peaks[name][setting]["status"] == "measured")
        room = memory.USABLE_SHARE * memory.available_bytes() / 2
        truths = [name for name in fitting if peaks[name][setting]["peak_bytes"] < room]
        if truths:
            rows.append((setting, fitting, truths[0]))
    return plan.dump_plan(rows, repeats)


def measure_time(timings: dict, threads: int) -> tuple[dict, str]:
    """Runs the plan under pytest-benchmark in a process of its own.

    Returns its JSON, and what it said about cases that failed: a setting that does not pass the closeness
    gate is not timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan_file, result_file = Path(folder) / "plan.json", Path(folder) / "result.json"
        plan_file.write_text(json.dumps(timings))
        command = [
            *(sys.executable, "-m", "pytest", str(RESULTS.parent / "bench_iteration.py"), "-q", "--tb=short"),
            *("--plan", str(plan_file), "--threads", str(threads), "-p", "no:cacheprovider", "--timeout=0"),
            f"--benchmark-json={result_file}",
        ]
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
        said = done.stdout[-8000:] + done.stderr[-2000:]
        if done.returncode not in (0, 1) or not result_file.exists():
            raise RuntimeError(f"the timing run failed with exit code {done.returncode}:\n{said}")
        return json.loads(result_file.read_text()), said if done.returncode else ""


def collect(settings: list[Setting], peaks: dict, timed: dict) -> list[dict]:
    """One row per setting: what was computed, the yardstick, and time and memory of every provider."""
    rounds: dict[tuple[Setting, str], list[float]] = {}
    errors: dict[tuple[Setting, str], float] = {}
    for entry in timed["benchmarks"]:
        info = entry["extra_info"]
        key = (Setting(**info["setting"]), info["provider"])
        rounds.setdefault(key, []).extend(entry["stats"]["data"])
        errors[key] = info.get("relative_error")
    rows = []
    for setting in settings:
        row = _setting_row(setting)
        if (setting, "gemm") in rounds:
            D = setting.embedding_size
            shape, spread = [GEMM_ROWS, D, 4 * D], _spread(rounds[setting, "gemm"])
            row["gemm"] = {"shape": shape, "flops": 2.0 * GEMM_ROWS * D * 4 * D / spread["median"], **spread}
        for name in peaks:
            row["providers"][name] = {"memory": peaks[name][setting]}
            if (setting, name) in rounds:
                time = {**_spread(rounds[setting, name]), "rounds": rounds[setting, name]}
                row["providers"][name] |= {"time": time, "relative_error": errors[setting, name]}
        rows.append(row)
    return rows


def _setting_row(setting: Setting) -> dict:
    units = {name: units_per_pair(name, setting.num_layers) for name in ("published", "reference", "useful")}
    sizes = {"batch_classes": setting.batch_classes, "training_classes": setting.training_classes}
    work = {"units_per_pair": units, "useful_flops": setting.useful_flops()}
    return {"name": setting.name, "setting": {**setting.as_dict(), **sizes}, **work, "providers": {}}


def _spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def _memory_words(row: dict) -> str:
    if row["status"] == "measured":
        return f"{row['peak_bytes'] / 1e6:.0f} MB"
    predicted = f", {row['predicted_bytes'] / 1e9:.1f} GB predicted" if row["predicted_bytes"] else ""
    return f"{row['status']}{predicted}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", help="N, two samples per class")
    parser.add_argument("--embedding-sizes", type=int, nargs="+", help="D")
    parser.add_argument("--layers", type=int, nargs="+", help="L")
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="probability of (11); 0 in the shipped results"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each provider at each setting")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--smoke", action="store_true", help="one tiny size and one repeat: does everything run?"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<machine>.json")
    return parser.parse_args(arguments)


def chosen_settings(options: argparse.Namespace) -> list[Setting]:
    """The shipped settings, or the grid that the options name."""
    if options.smoke:
        return all_settings(**SMOKE, dropout=options.dropout)
    named = {key: getattr(options, key) for key in SMOKE if getattr(options, key) is not None}
    return all_settings(**named, dropout=options.dropout) if named else shipped_settings(options.dropout)


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the results file and says where it is; exit status 1 if a setting was refused."""
    options = parse(arguments)
    repeats = 1 if options.smoke else options.repeats
    settings, providers = chosen_settings(options), tuple(options.providers)
    described = {"machine": machine.machine(), "versions": machine.versions(), **machine.revision()}
    measured = tuple(n for n in MEMORY_PROVIDERS if n.removesuffix("-freed") in providers)
    load = machine.load_average()
    if load > BUSY:
        _say(
            f"warning: the load average is {load:.1f}; times of a busy machine say little about the providers"
        )
    peaks = measure_memory(settings, measured, options.threads)
    timed, failures = measure_time(timing_plan(settings, peaks, providers, repeats), options.threads)
    protocol = {
        "threads": options.threads,
        "dtype": "float32",
        "dropout": options.dropout,
        "repeats": repeats,
    }
    results = {"format": 1, **described, "protocol": protocol, "rows": collect(settings, peaks, timed)}
    output = options.output or RESULTS / machine.file_name(described["machine"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(output)
    if failures:
        _say(f"some cases failed and were not timed:\n{failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
