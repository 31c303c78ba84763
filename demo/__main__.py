"""`python -m demo`: train N-pair and GCA-HNG, print the table, write the report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from demo.settings import QUICK, QUICK_SEEDS, SEEDS, Settings

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; the table goes to standard output, progress to standard error."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.strip())
    parser.add_argument("--quick", action="store_true", help="a few classes and iterations: does everything run?")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of report.html, figures/ and runs/")
    parser.add_argument(
        "--record", action="store_true", help="also write demo/results.json and the README's table from it"
    )
    options = parser.parse_args(arguments)
    if options.record and options.quick:
        parser.error("--record keeps the results of a full run; leave out --quick")
    started = time.perf_counter()
    try:
        import PIL  # noqa: F401
        from fontTools import ttLib  # noqa: F401

        from demo import figures, report, run, table, worker
    except ModuleNotFoundError as error:
        print(f"demo: {error.name} is missing; make demo sets everything up", file=sys.stderr)
        return 1

    settings, seeds = (QUICK, QUICK_SEEDS) if options.quick else (Settings(), SEEDS)
    print("rendering the letters of the matplotlib wheel, or reading them from the cache", file=sys.stderr)
    test = worker.load_letters("test", settings)
    outcomes = run.run_trainings(settings, seeds, options.output / "runs")
    results = run.results(outcomes, settings, seeds, started)
    pictures = figures.draw_all(outcomes, test, options.output / "runs", options.output / "figures")
    report.write(results, outcomes, pictures, options.output / "report.html")
    (options.output / "runs" / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.record:
        table.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        table.write_documents()
    print(table.render(results))
    print(f"\n{options.output / 'report.html'} ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
