"""The demo's one table, for the terminal, the report and the README.

python -m demo.table            # writes the README's block from demo/results.json
python -m demo.table --check    # exit status 1 if the block is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from demo.settings import METHOD_NAMES

RESULTS = Path(__file__).parent / "results.json"
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
HEADER = ("method", "Recall@1", "mAP@R", "seconds", "CPU seconds", "peak memory")
MEASURES: dict[str, tuple[Callable[[dict], float | None], str]] = {
    "Recall@1": (lambda run: run["scores"]["recall_at_1"], "{:.4f}"),
    "mAP@R": (lambda run: run["scores"]["mean_average_precision_at_r"], "{:.4f}"),
    "seconds": (lambda run: run["seconds"], "{:.0f}"),
    "CPU seconds": (lambda run: run["cpu_seconds"], "{:.0f}"),
    "peak memory": (lambda run: None if run["peak_bytes"] is None else run["peak_bytes"] / 1e6, "{:.0f} MB"),
}


def rows(results: dict) -> list[list[str]]:
    """Cells of the table without its header: untrained, both methods, and their paired difference."""
    runs = {method: [r for r in results["runs"] if r["method"] == method] for method in METHOD_NAMES}
    untrained = [{**run, "scores": run["scores_before"]} for run in runs["n-pair"]]
    table = [["not trained", *(cell(untrained, name) for name in HEADER[1:3]), "", "", ""]]
    table += [[METHOD_NAMES[method], *(cell(runs[method], name) for name in HEADER[1:])] for method in runs]
    return [*table, ["GCA-HNG minus N-pair", *(difference(runs, name) for name in HEADER[1:])]]


def cell(runs: list[dict], name: str) -> str:
    """Mean over the seeds, and the least and largest value where there are several."""
    measure, form = MEASURES[name]
    return spread([measure(run) for run in runs], form)


def difference(runs: dict[str, list[dict]], name: str) -> str:
    """Mean over the seeds of GCA-HNG minus N-pair from the same start on the same batches."""
    measure, form = MEASURES[name]
    pairs = zip(runs["gca-hng"], runs["n-pair"], strict=True)
    values = [(measure(generated), measure(plain)) for generated, plain in pairs]
    if any(value is None for pair in values for value in pair):
        return spread([None], form)
    return spread([generated - plain for generated, plain in values], form.replace("{:", "{:+"))


def spread(values: list[float | None], form: str) -> str:
    """``mean (least to largest)``."""
    known = [value for value in values if value is not None]
    if not known:
        return "not measured"
    mean = form.format(sum(known) / len(known))
    bare = form.split("}")[0] + "}"
    return mean if len(known) == 1 else f"{mean} ({bare.format(min(known))} to {bare.format(max(known))})"


def render(results: dict) -> str:
    """The table in Markdown, aligned, with what it was measured on and what it says."""
    cells = [list(HEADER), *rows(results)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, "", *notes(results)])


def notes(results: dict) -> list[str]:
    """What the numbers are, where they were taken, and which method is ahead."""
    settings, machine, versions = results["settings"], results["machine"], results["versions"]
    seeds = len(results["seeds"])
    test = [run["scores"] for run in results["runs"]][0]
    batch = f"{settings['classes_per_batch']} classes x {settings['samples_per_class']} samples"
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    what = (
        f"{test['num_queries']} rendered letters of classes that no training saw (type, not photographs), each one "
        f"searched among all others. {settings['iterations']} iterations of {batch}, D = {settings['embedding_size']}; "
        + ("one seed." if seeds == 1 else f"mean and range over {seeds} seeds.")
    )
    where = (
        f"One thread a training, {results['side_by_side']} side by side; peak memory of the training above the process "
        f"before it. {machine['cpu']}, {machine['cores']} cores, {memory}; torch {versions['torch']}, gcng "
        f"{versions['gcng']}, {results['date'][:10]}."
    )
    return [verdict(results), "", what, "", where]


def verdict(results: dict) -> str:
    """One sentence from the paired differences, whatever they are."""
    runs = {method: [r for r in results["runs"] if r["method"] == method] for method in METHOD_NAMES}
    sentences = []
    for name in HEADER[1:3]:
        measure = MEASURES[name][0]
        gains = [measure(g) - measure(p) for g, p in zip(runs["gca-hng"], runs["n-pair"], strict=True)]
        ahead = sum(gain > 0 for gain in gains)
        mean = f"{_mean(gains):+.4f} on average"
        sentences.append(f"{name}: GCA-HNG minus N-pair is {mean}; GCA-HNG is ahead in {ahead} of {len(gains)} seeds.")
    ratio = _mean([r["cpu_seconds"] for r in runs["gca-hng"]]) / _mean([r["cpu_seconds"] for r in runs["n-pair"]])
    sentences.append(f"For the same number of iterations it takes {ratio:.1f} times the processor time of N-pair.")
    return " ".join(sentences)


def with_block(text: str, block: str) -> str:
    """The text with everything between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and then {END}, each once, where the table goes")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def write_readme(readme: Path = README, path: Path = RESULTS, *, check: bool = False) -> bool:
    """Put the table of the results file into the README; with ``check`` only say whether it is there."""
    text = readme.read_text(encoding="utf-8")
    wanted = with_block(text, render(json.loads(path.read_text())))
    if not check and wanted != text:
        readme.write_text(wanted, encoding="utf-8")
    return wanted == text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the README's block."""
    parser = argparse.ArgumentParser(prog="python -m demo.table", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    same = write_readme(check=options.check)
    if options.check and not same:
        print("README.md does not show demo/results.json; run python -m demo.table", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
