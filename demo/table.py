"""The demo's one table, for the terminal, the report and the README, and the trials of its tuning.

    python -m demo.table            # writes the blocks of README.md and docs/demo.md
    python -m demo.table --check    # exit status 1 if a block is not what the results say

Every number in these blocks comes from demo/results.json or demo/tuning.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from demo.settings import METHOD_NAMES, Settings

RESULTS = Path(__file__).parent / "results.json"
TRIALS = Path(__file__).parent / "tuning.jsonl"
ROOT = Path(__file__).resolve().parents[1]
BUSY = 1.25  # a training on one thread that takes this many times its processor time had to wait for others
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
    return "\n".join([_markdown([list(HEADER), *rows(results)]), "", *notes(results)])


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
    runs = results["runs"]
    if _mean([run["seconds"] for run in runs]) > BUSY * _mean([run["cpu_seconds"] for run in runs]):
        where += " The machine was busy with other work at the time: go by the CPU seconds."
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


def render_trials(trials: list[dict]) -> str:
    """The tuning trials in Markdown: what differs from the shipped settings, and the scores."""
    shipped = Settings().as_dict()
    cells = [["method", "differs from the shipped settings in", "seed", "Recall@1", "mAP@R", "CPU seconds"]]
    for trial in trials:
        changed = [f"{k} {v}" for k, v in trial["settings"].items() if v != shipped[k]]
        scores = [f"{trial[key]:.4f}" for key in ("recall_at_1", "mean_average_precision_at_r")]
        words = ", ".join(changed) or "nothing"
        cells.append([trial["method"], words, str(trial["seed"]), *scores, f"{trial['cpu_seconds']:.0f}"])
    return _markdown(cells)


def blocks() -> dict[str, tuple[str, str]]:
    """Document -> name of its markers and the text between them."""
    trials = [json.loads(line) for line in TRIALS.read_text().splitlines()]
    return {
        "README.md": ("demo", f"{render(json.loads(RESULTS.read_text()))} `demo/results.json`."),
        "docs/demo.md": ("tuning", render_trials(trials)),
    }


def with_block(text: str, name: str, block: str) -> str:
    """The text with everything between the markers replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the text must hold {begin} and then {end}, each once, where the table goes")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def write_documents(*, check: bool = False) -> list[str]:
    """Put the tables into the documents; returns those that differed. With ``check`` nothing is written."""
    differing = []
    for document, (name, block) in blocks().items():
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        wanted = with_block(text, name, block)
        if wanted != text:
            differing.append(document)
            if not check:
                path.write_text(wanted, encoding="utf-8")
    return differing


def _markdown(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the blocks."""
    parser = argparse.ArgumentParser(prog="python -m demo.table", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    differing = write_documents(check=options.check)
    if options.check and differing:
        print(f"not what the results say: {', '.join(differing)}; run python -m demo.table", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
