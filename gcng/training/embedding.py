"""Embedding a whole data set, and getting a trained extractor back from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gcng.data import seeded_randomness
from gcng.evaluation import evaluate_retrieval
from gcng.training.checkpoint import CheckpointFolder, load_checkpoint
from gcng.training.config import Config
from gcng.training.config_io import load_config
from gcng.training.datasets import RunData, make_extractor
from gcng.training.errors import CheckpointError
from gcng.training.signals import children_spared


def embed_dataset(
    extractor: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    workers: int = 0,
    limit: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed every sample in evaluation mode.

    Args:
        extractor: Maps a batch to (n, D). Its training mode is put back afterwards.
        dataset: Map-style, items ``(input, label)``.
        batch_size: Samples at once.
        device: Where the extractor is.
        workers: Loader processes.
        limit: Embed the first so many samples only.
        on_batch: Called with (samples done, samples in all).

    Returns:
        Embeddings (n, D) float32 and labels (n,) int64, both on the CPU, in the order of the data set.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = DataLoader(dataset, batch_size, sampler=range(count), num_workers=workers)
    modes = [(module, module.training) for module in extractor.modules()]
    extractor.eval()
    embeddings, labels = [], []
    try:
        # Transforms of the data set may draw; the same numbers each time, and not from the run's.
        with torch.no_grad(), seeded_randomness(0):
            with children_spared():
                batches = iter(loader)
            for inputs, batch_labels in batches:
                embeddings.append(extractor(inputs.to(device)).float().cpu())
                labels.append(batch_labels.to(torch.int64))
                if on_batch is not None:
                    on_batch(min(len(embeddings) * batch_size, count), count)
    finally:
        for module, mode in modes:
            module.training = mode
    if not embeddings:
        raise ValueError("embed_dataset: the data set is empty; there is nothing to embed")
    return torch.cat(embeddings), torch.cat(labels)


def evaluate(
    config: Config,
    extractor: nn.Module,
    data: RunData,
    *,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Retrieval metrics of ``data.test``: among itself, or against ``data.gallery`` where there is one.

    Returns:
        What :func:`gcng.evaluation.evaluate_retrieval` gives.
    """
    settings = {
        "batch_size": config.evaluation.batch_size,
        "device": device,
        "workers": config.data.workers,
        "limit": limit,
        "on_batch": on_batch,
    }
    query, query_labels = embed_dataset(extractor, data.test, **settings)
    reference = reference_labels = None
    if data.gallery is not None:
        reference, reference_labels = embed_dataset(extractor, data.gallery, **settings)
    return evaluate_retrieval(query, query_labels, reference, reference_labels, k=config.evaluation.k)


def find_checkpoint(path: str | Path) -> Path:
    """The file that ``path`` means: a checkpoint file, or the best (else the newest) one of a run's folder.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        checkpoints = CheckpointFolder(folder)
        best = checkpoints.best_file()
        if best is not None:
            return best
        if checkpoints.files():
            return checkpoints.load_newest().path
    raise CheckpointError(f"no checkpoint at {path}; give a step-*.pt file or the output folder of a run")


def load_extractor(
    path: str | Path, *, overrides: Any = (), device: torch.device | str = "cpu"
) -> tuple[Config, nn.Module, Path]:
    """Rebuild the extractor of a checkpoint with its weights, in evaluation mode.

    Args:
        path: A checkpoint file, or the output folder of a run (its best checkpoint, else its newest).
        overrides: Changes to the run's configuration, as in :func:`gcng.training.load_config`.
        device: Where the extractor goes.

    Returns:
        The run's configuration with the overrides, the extractor, the file that was read.

    Raises:
        CheckpointError: Damaged, missing, or weights that do not fit the extractor (names the keys).
    """
    file = find_checkpoint(path)
    state = load_checkpoint(file)
    for key in ("config", "extractor", "in_channels"):
        if key not in state:
            raise CheckpointError(f"checkpoint {file} has no entry {key!r}: it is not the checkpoint of a run")
    config = load_config(base=state["config"], overrides=overrides)
    # The weights come from the file, not from where the published ones are.
    extractor = make_extractor(config.model, in_channels=state["in_channels"], pretrained=False)
    try:
        extractor.load_state_dict(state["extractor"])
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint {file} does not fit model.backbone {config.model.backbone}: {message}"
        ) from None
    return config, extractor.to(device).eval(), file
