"""The results file: what was measured where, written whole after every row, so that nothing is lost and reruns go on.

A file holds `machine`, `versions`, `protocol`, the measured `rates` of the machine, `rows` (one per operation, setting
and precision, each with the commit and time of its measurement), the lists `stages`, `overhead`, `accuracy` and, of a
GPU, `bandwidth` and `checks`, and in `finished` the names of the parts without rows that came to their end: a list is
written after every entry.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.operations import Operation
from benchmarks.settings import Setting
from benchmarks.verdicts import write

FORMAT = 2
FOLDER = Path(__file__).parent / "results"
TRUTH = "truth"  # what a row says to be running while its truth is made
LISTS = ("stages", "overhead", "accuracy", "bandwidth", "checks")


class Results:
    """A results file in memory; :meth:`save` replaces the file in one step."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def open(cls, path: Path, device: str = "cpu") -> Results:
        """The file, or an empty one for this machine. ValueError where it is of another machine or format."""
        described = machine.machine(device)
        if not path.exists():
            empty = {"format": FORMAT, "machine": described, "versions": machine.versions(), "protocol": {}}
            return cls(path, empty | {"rates": {}, "sweeps": {}, "rows": [], **{name: [] for name in LISTS}})
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} has format {data.get('format')}, expected {FORMAT}; measure into another file")
        # GPUs of one name are lent by hosts that differ.
        decisive = ("gpu",) if "gpu" in described or "gpu" in data["machine"] else ("cpu", "cores")
        kind = [key for key in decisive if data["machine"].get(key) != described.get(key)]
        if kind:
            raise ValueError(
                f"{path} was measured on another machine ({', '.join(kind)} differ); write to another file with --json"
            )
        return cls(path, data)

    def save(self) -> None:
        """Write the file whole, in one step."""
        write(self.path, self.data)

    def find(self, operation: str, setting: Setting, precision: str) -> dict | None:
        """The row of an operation at a setting, or None."""
        wanted = row_name(operation, setting, precision)
        return next((row for row in self.data["rows"] if row["name"] == wanted), None)

    def row(self, operation: Operation, setting: Setting, precision: str) -> dict:
        """The row, made if it does not exist."""
        found = self.find(operation.name, setting, precision)
        if found is None:
            sizes = {"batch_classes": setting.batch_classes, "training_classes": setting.training_classes}
            found = {
                "name": row_name(operation.name, setting, precision),
                "operation": operation.name,
                "precision": precision,
                "setting": {**setting.as_dict(), **sizes},
                "work": work_of(operation, setting, precision),
                "providers": {},
                "complete": False,
            }
            self.data["rows"].append(found)
        return found

    def is_finished(self, part: str) -> bool:
        """Whether a part without rows came to its end; that it has entries does not say so."""
        return part in self.data.get("finished", ())

    def finish(self, part: str) -> None:
        """A part without rows is whole."""
        self.data["finished"] = sorted({*self.data.get("finished", ()), part})
        self.save()

    def of_this_source(self, name: str) -> list[dict]:
        """The entries of a list that this source has measured."""
        return [one for one in self.data[name] if machine.is_of_this_source(one)]

    def replace(self, name: str, entries: Iterable[dict]) -> None:
        """Set one of the lists, every entry stamped with commit and time."""
        stamp = machine.revision()
        self.data[name] = [{**entry, **stamp} for entry in entries]
        self.save()


def row_name(operation: str, setting: Setting, precision: str) -> str:
    """Name of a row, for --parts and for comparisons."""
    return f"{operation}/{setting.name}/{precision}"


def work_of(operation: Operation, setting: Setting, precision: str) -> dict[str, dict[str, float]]:
    """Useful operations and bytes by pass; "both" where there is a backward."""
    item = {"float64": 8, "bfloat16": 2, "float16": 2}.get(precision, 4)
    passes = operation.work(setting, item)
    out = {name: {"flops": one.flops, "bytes": one.bytes} for name, one in passes.items()}
    if "backward" in out:
        out["both"] = {key: out["forward"][key] + out["backward"][key] for key in ("flops", "bytes")}
    return out


def spread(values: list[float]) -> dict:
    """Median, least and largest, and the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
        "rounds": values,
    }


def setting_of(row: dict) -> Setting:
    """The setting of a stored row."""
    known = {name: value for name, value in row["setting"].items() if name in Setting.__dataclass_fields__}
    return Setting(**known)


def load_all(folder: Path = FOLDER) -> list[tuple[str, dict]]:
    """File name and content of every results file of a folder, by name."""
    return [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def measured_time(row: dict, provider: str, which: str = "both") -> dict | None:
    """The spread of a pass; an op without a backward has its forward only."""
    times = row["providers"].get(provider, {}).get("time")
    if not times:
        return None
    return times.get(which) or (times.get("forward") if which == "both" else None)


def open_results(arguments: list[str] | None, about: str, part: str) -> tuple[argparse.Namespace, Results]:
    """Command line and results file of a module that measures one part, unfinished from now on; sets the threads."""
    import torch

    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results file to write to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="time after which nothing new starts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = Results.open(options.results, options.device)
    results.data["finished"] = [name for name in results.data.get("finished", ()) if name != part]
    return options, results
