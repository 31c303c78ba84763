"""Tables of the README and of docs/benchmarks.md, written from benchmarks/results.

    python -m benchmarks.tables            # writes both between their markers
    python -m benchmarks.tables --check    # exit status 1 if a table is not what the results say

Every number in these tables comes from a results file; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.details import documentation
from benchmarks.results import FOLDER, load_all
from benchmarks.summaries import readme

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
TARGETS: dict[str, Callable[[list[tuple[str, dict]]], str]] = {
    "README.md": readme,
    "docs/benchmarks.md": documentation,
}


def with_tables(text: str, made: str, name: str) -> str:
    """The text with everything between its markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} must hold {BEGIN} and then {END}, each once; add both lines where the tables go")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Writes the tables, or checks them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results files")
    options = parser.parse_args(arguments)
    files, status = load_all(options.results), 0
    for name, render in TARGETS.items():
        path = options.root / name
        text = path.read_text(encoding="utf-8")
        wanted = with_tables(text, render(files), name)
        if text != wanted and options.check:
            print(f"{name} is out of date: run python -m benchmarks.tables", file=sys.stderr)
            status = 1
        elif text != wanted:
            path.write_text(wanted, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
