"""``gcng bench``: the benchmarks of a source checkout, for the installed gcng on this machine.

Owns what a results file may keep from an earlier run: what was measured from the commit that is measured now.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Set
from pathlib import Path
from types import ModuleType

import gcng
from gcng.cli.output import note
from gcng.training.errors import EXIT_DONE, ConfigError

EXIT_WORSE = 1
SOURCE = "git clone the repository of gcng and pip install -e '.[bench]' there"


def run(arguments: argparse.Namespace) -> int:
    """Measure an op, or everything; print the tables, and what changed since another results file."""
    compared = Path(arguments.compare) if arguments.compare else None
    if compared is not None and not compared.is_file():
        raise ConfigError(f"--compare: {compared} does not exist")
    # Before anything is measured: it may be the file that is written to.
    before = None if compared is None else json.loads(compared.read_text(encoding="utf-8"))
    measure = _module("measure")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.json or Path(folder) / "results.json").absolute()
        if not path.parent.is_dir():
            raise ConfigError(f"--json: the folder {path.parent} does not exist")
        options = measure.options_for(
            arguments.op, path, minutes=arguments.minutes, device=arguments.device, threads=arguments.threads,
            smoke=arguments.smoke, force=arguments.force, allow_modified=True,
        )  # fmt: skip
        if path.is_file() and not options.force:
            note(f"gcng bench: {_keep_what_holds(measure, options)}")
        note(f"gcng bench: rows go to {path}" if arguments.json else "gcng bench: --json FILE would keep the rows")
        status = measure.measure(options, announce=note)
        results = json.loads(path.read_text(encoding="utf-8"))
    print(_module("details").one_file(path.name, results))
    if before is None:
        return EXIT_DONE if status == 0 else EXIT_WORSE
    text, worse = _module("compare").report(before, results)
    print(f"\n{text}")
    return EXIT_WORSE if worse or status else EXIT_DONE


def _keep_what_holds(measure: ModuleType, options: argparse.Namespace) -> str:
    """Mark as missing what is asked for and was measured from another source than this; says what is kept and what not.

    Nobody knows whether two sources with changes beside the commit, or without a commit, are the same.
    """
    results = _module("results").Results.open(options.json, options.device)
    of_this_source = _module("machine").is_of_this_source
    parts = measure.chosen(measure.parts_of(options), options.parts)
    wanted = {entry.name for entries in parts.values() for entry in entries}

    def holds(stamped: list[dict]) -> bool:
        return bool(stamped) and all(map(of_this_source, stamped))

    rows = {row["name"]: row for row in results.data["rows"] if row["complete"] and row["name"] in wanted}
    lists = {name: _stamped(results.data.get(name)) for name in parts if results.is_finished(name)}
    stale = {name for name, row in rows.items() if not holds([row])}
    stale_lists = {name for name, stamped in lists.items() if not holds(stamped)}
    if stale or stale_lists:
        results.data["rows"] = [row for row in results.data["rows"] if row["name"] not in stale]
        results.data["finished"] = [name for name in results.data["finished"] if name not in stale_lists]
        results.save()
    kept = f"{_counted(rows.keys() - stale, lists.keys() - stale_lists)} of {options.json.name} kept"
    kept += ", of this commit; --force measures again" if rows.keys() - stale or lists.keys() - stale_lists else ""
    again = _counted(stale, stale_lists)
    return kept + (f"; {again} of another commit or of changed files measured again" if stale or stale_lists else "")


def _stamped(found: dict | list[dict] | None) -> list[dict]:
    """What of a part without rows says where it was measured."""
    return found if isinstance(found, list) else [found or {}]


def _counted(rows: Set[str], lists: Set[str]) -> str:
    words = ([f"{len(rows)} row{'' if len(rows) == 1 else 's'}"] if rows or not lists else []) + sorted(lists)
    return ", ".join(words)


def _module(name: str) -> ModuleType:
    """A module of the checkout's ``benchmarks``, which no wheel holds.

    Raises:
        ConfigError: gcng is installed without its source, or a package of the benchmarks is missing.
    """
    root = Path(gcng.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "measure.py").is_file():
        raise ConfigError(f"the benchmarks are part of the source, and {root} has none; {SOURCE}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; pip install -e '.[bench]' in {root}") from error
