"""Chooses the demo's settings on the training classes alone: fit on two thirds of them, validate on the rest.

    python -m demo.tune n-pair extractor_lr=0.002 gca-hng graph_lr=0.001 alpha=3

runs one trial per method named, with the settings that follow it, and adds a line per trial to
demo/tuning.jsonl. The test classes are never loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from demo.settings import METHODS, Settings
from demo.table import TRIALS
from demo.training import embed, train
from gcng.data import matplotlib_letters, split_classes
from gcng.evaluation import evaluate_retrieval

VALIDATION_SPLIT_SEED = 7


def trial(method: str, settings: Settings, seed: int) -> dict:
    """Train on two thirds of the training classes, score on the other third."""
    letters = matplotlib_letters("train")
    fitting, held_out = split_classes(len(letters.classes), train_fraction=2 / 3, seed=VALIDATION_SPLIT_SEED)
    trained = train(method, letters.select_classes(fitting), settings, seed)
    validation = letters.select_classes(held_out)
    scores = evaluate_retrieval(embed(trained.extractor, validation), validation.targets, k=(1,))
    return {
        "method": method,
        "seed": seed,
        "recall_at_1": scores["recall_at_1"],
        "mean_average_precision_at_r": scores["mean_average_precision_at_r"],
        "cpu_seconds": trained.clock.cpu_seconds,
        "last_terms": {name: sum(values[-20:]) / len(values[-20:]) for name, values in trained.terms.items()},
        "settings": settings.as_dict(),
    }


def parse_trials(words: list[str]) -> list[tuple[str, Settings]]:
    """``method key=value ... method ...`` as methods and settings; an unknown word is a ValueError."""
    known = {field.name for field in fields(Settings) if field.default is not None}
    trials: list[tuple[str, Settings]] = []
    for word in words:
        key, _, value = word.partition("=")
        if word in METHODS:
            trials.append((word, Settings()))
        elif trials and key in known and value:
            method, settings = trials[-1]
            kind = type(getattr(settings, key))
            trials[-1] = method, replace(settings, **{key: kind(value)})
        else:
            raise ValueError(f"demo.tune: {word!r} is neither a method ({', '.join(METHODS)}) nor setting=value")
    return trials


def main(arguments: list[str] | None = None) -> int:
    """Runs the trials, one after the other, on one thread."""
    parser = argparse.ArgumentParser(prog="python -m demo.tune", description=__doc__.split("\n")[0])
    parser.add_argument("trials", nargs="+", help="method setting=value ... method ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=TRIALS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for method, settings in parse_trials(options.trials):
        outcome = trial(method, settings, options.seed)
        with options.output.open("a") as file:
            file.write(json.dumps(outcome) + "\n")
        print(json.dumps({key: value for key, value in outcome.items() if key != "settings"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
