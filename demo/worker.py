"""One training in a process of its own, so that its time and peak memory are its own.

    python -m demo.worker --method gca-hng --seed 0 --settings '{"iterations": 20}' --output FOLDER

writes FOLDER/gca-hng-0.json (scores, loss terms, looks at the negatives) and FOLDER/gca-hng-0.npz (embeddings
of the test images before and after). One thread: trainings run side by side, and results do not depend on how
many cores there are.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from demo.memory import PeakMemory
from demo.settings import METHODS, Settings
from demo.training import embed, start_extractor, train
from gcng.data import GlyphDataset, check_disjoint_classes, matplotlib_letters
from gcng.evaluation import evaluate_retrieval

RANKS = (1, 2, 4, 8)


def load_letters(split: str, settings: Settings) -> GlyphDataset:
    """The training or test classes, or as many of them as the settings use."""
    letters = matplotlib_letters(split)
    if settings.max_classes is None:
        return letters
    return letters.select_classes(range(settings.max_classes))


def run(method: str, seed: int, settings: Settings, output: Path) -> None:
    """Train, evaluate on the unseen classes, write both files."""
    training, test = load_letters("train", settings), load_letters("test", settings)
    check_disjoint_classes(training, test)
    before = embed(start_extractor(settings, seed), test)
    # Loads what torch loads on first use, so that it counts in no method.
    tiny = replace(settings, classes_per_batch=2, embedding_size=8, iterations=2, probes=1)
    train(method, training, tiny, seed)

    def say(line: str) -> None:
        print(f"{method}, seed {seed}: {line}", file=sys.stderr, flush=True)

    memory = PeakMemory()
    trained = train(method, training, settings, seed, say=say, aside=memory.aside)
    peak = memory.peak_bytes()
    after = embed(trained.extractor, test)
    outcome = {
        "method": method,
        "seed": seed,
        "scores": evaluate_retrieval(after, test.targets, k=RANKS),
        "scores_before": evaluate_retrieval(before, test.targets, k=RANKS),
        "seconds": trained.clock.seconds,
        "cpu_seconds": trained.clock.cpu_seconds,
        "peak_bytes": peak,
        "high_water_mark_reset": memory.reset_permitted,
        "start_checksum": trained.start_checksum,
        "batch_checksum": trained.batch_checksum,
        "terms": trained.terms,
        "probes": [probe.as_dict() for probe in trained.probes],
    }
    output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output / f"{method}-{seed}.npz", before=before.numpy(), after=after.numpy())
    (output / f"{method}-{seed}.json").write_text(json.dumps(outcome) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Command line of the child process."""
    parser = argparse.ArgumentParser(prog="python -m demo.worker", description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON object of demo.settings.Settings")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run(options.method, options.seed, Settings(**options.settings), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
