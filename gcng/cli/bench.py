"""``gcng bench``: the benchmarks of a source checkout, for the installed gcng on this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
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
    measure = _module("measure")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.json or Path(folder) / "results.json").absolute()
        if not path.parent.is_dir():
            raise ConfigError(f"--json: the folder {path.parent} does not exist")
        options = measure.options_for(
            arguments.op, path, minutes=arguments.minutes, device=arguments.device, threads=arguments.threads,
            smoke=arguments.smoke, force=arguments.force, allow_modified=True,
        )  # fmt: skip
        note(f"gcng bench: rows go to {path}" if arguments.json else "gcng bench: --json FILE would keep the rows")
        status = measure.measure(options, announce=note)
        results = json.loads(path.read_text(encoding="utf-8"))
    print(_module("details").one_file(path.name, results))
    if compared is None:
        return EXIT_DONE if status == 0 else EXIT_WORSE
    text, worse = _module("compare").report(json.loads(compared.read_text(encoding="utf-8")), results)
    print(f"\n{text}")
    return EXIT_WORSE if worse or status else EXIT_DONE


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
