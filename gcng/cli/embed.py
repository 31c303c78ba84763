"""``gcng embed``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gcng.cli.output import note, print_result
from gcng.cli.settings import all_overrides
from gcng.training.errors import EXIT_DONE, ConfigError


def run(arguments: argparse.Namespace) -> int:
    """Embed one part of the data of a run and write ``embeddings`` and ``labels`` as a ``.npz``."""
    target = Path(arguments.output)
    if target.suffix != ".npz":
        raise ConfigError(f"--output must end in .npz, got {arguments.output}")
    if not target.parent.is_dir():
        raise ConfigError(f"--output: the folder {target.parent} does not exist")
    import numpy

    from gcng.training.datasets import build_data
    from gcng.training.embedding import embed_dataset, load_extractor
    from gcng.training.optimization import choose_device
    from gcng.training.records import ProgressBar

    config, extractor, file = load_extractor(arguments.checkpoint, overrides=all_overrides(arguments))
    note(f"gcng embed: {file}")
    data = build_data(config.data)
    dataset = {"train": data.train_plain, "test": data.test, "gallery": data.gallery}[arguments.split]
    if dataset is None:
        raise ConfigError(f"--split {arguments.split}: data.kind {config.data.kind} has no such part")
    device, bar = choose_device(config.run.device), ProgressBar(config.logging.progress)
    embeddings, labels = embed_dataset(
        extractor.to(device),
        dataset,
        batch_size=config.evaluation.batch_size,
        device=device,
        workers=config.data.workers,
        on_batch=lambda done, total: bar.update("embedding", done, total, {}),
    )
    bar.clear()
    partial = target.with_name(f"{target.name}.tmp.{os.getpid()}")
    try:
        with open(partial, "wb") as stream:
            numpy.savez(stream, embeddings=embeddings.numpy(), labels=labels.numpy())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    result = {"output": str(target), "samples": len(labels), "embedding_size": embeddings.shape[1]}
    print_result(result, as_json=arguments.json)
    return EXIT_DONE
