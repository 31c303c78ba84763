"""``gcng eval``."""

from __future__ import annotations

import argparse
import zipfile
import zlib
from pathlib import Path
from typing import Any

from gcng.cli.output import note, print_result
from gcng.cli.settings import all_overrides
from gcng.training.errors import EXIT_DONE, ConfigError

DEFAULT_RANKS = (1, 2, 4, 8)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate embeddings from files, or a checkpoint on the data of its run."""
    if (arguments.embeddings is None) == (arguments.checkpoint is None):
        raise ConfigError("give either a file of embeddings or --checkpoint PATH")
    metrics = _from_checkpoint(arguments) if arguments.embeddings is None else _from_files(arguments)
    print_result(metrics, as_json=arguments.json)
    return EXIT_DONE


def _from_files(arguments: argparse.Namespace) -> dict[str, float]:
    overrides = all_overrides(arguments)
    if overrides:
        raise ConfigError(f"{overrides[0].partition('=')[0]} is a setting of a run; it needs --checkpoint")
    query, query_labels = read_embeddings(arguments.embeddings, arguments.labels, "--labels")
    reference = reference_labels = None
    if arguments.reference is not None:
        reference, reference_labels = read_embeddings(
            arguments.reference, arguments.reference_labels, "--reference-labels"
        )
    from gcng.evaluation import evaluate_retrieval

    ranks = tuple(arguments.k or DEFAULT_RANKS)
    return evaluate_retrieval(query, query_labels, reference, reference_labels, k=ranks)


def _from_checkpoint(arguments: argparse.Namespace) -> dict[str, float]:
    from gcng.training.datasets import build_data
    from gcng.training.embedding import evaluate, load_extractor
    from gcng.training.optimization import choose_device

    overrides = all_overrides(arguments)
    if arguments.k:
        overrides.append("evaluation.k=" + ",".join(map(str, arguments.k)))
    config, extractor, file = load_extractor(arguments.checkpoint, overrides=overrides)
    note(f"gcng eval: {file}")
    data = build_data(config.data)
    if data.test is None:
        raise ConfigError(f"data.kind {config.data.kind} has no test classes; nothing can be evaluated")
    device = choose_device(config.run.device)
    return evaluate(config, extractor.to(device), data, device=device)


def read_embeddings(path: str, labels_path: str | None, labels_flag: str) -> tuple[Any, Any]:
    """Embeddings (n, D) and labels (n,) from a ``.npz``, or from a ``.npy`` with a second one for the labels.

    Raises:
        ConfigError: Missing file or array, labels given twice or not at all. Pickled arrays are refused.
    """
    import numpy
    import torch

    if Path(path).suffix == ".npz":
        if labels_path is not None:
            raise ConfigError(f"{labels_flag} goes with a .npy file; {path} holds its labels itself")
        with _opened(path, "npz") as arrays:
            missing = [name for name in ("embeddings", "labels") if name not in arrays]
            if missing:
                raise ConfigError(f"{path} has no array {missing[0]!r}; it has {', '.join(arrays) or 'none'}")
            embeddings, labels = _array(arrays, "embeddings", path), _array(arrays, "labels", path)
    else:
        if labels_path is None:
            raise ConfigError(f"{path} holds no labels: give them with {labels_flag} FILE.npy, or use a .npz")
        embeddings, labels = _opened(path, "npy"), _opened(labels_path, "npy")
    if not numpy.issubdtype(labels.dtype, numpy.integer):
        raise ConfigError(f"labels of {path} must be integers, got {labels.dtype}")
    # Torch takes the machine's byte order only.
    embeddings = numpy.ascontiguousarray(embeddings.astype(embeddings.dtype.newbyteorder("="), copy=False))
    try:
        return torch.from_numpy(embeddings), torch.from_numpy(labels.astype("int64"))
    except TypeError as error:
        raise ConfigError(f"{path}: embeddings of {embeddings.dtype} cannot be used: {error}") from None


def _opened(path: str, kind: str) -> Any:
    """An array (kind "npy") or an archive ("npz") of arrays."""
    import numpy

    try:
        found = numpy.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not a NumPy file of plain arrays: {error}") from None
    if isinstance(found, numpy.ndarray) != (kind == "npy"):
        kinds = {"npy": "one array, as in a .npy file", "npz": "an archive of arrays, as in a .npz file"}
        raise ConfigError(f"{path} must hold {kinds.pop(kind)}, but holds {kinds.popitem()[1]}")
    return found


def _array(arrays: Any, name: str, path: str) -> Any:
    try:
        return arrays[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # damage, or an array of objects
        raise ConfigError(f"{path}: array {name!r} cannot be read: {error}") from None
