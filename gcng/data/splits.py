"""Class splits: the fixed permutation, selections of classes, and the check that two sets are disjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

SPLIT_SEED = 100


def split_classes(
    num_classes: int, *, train_fraction: float = 0.5, seed: int = SPLIT_SEED
) -> tuple[Tensor, Tensor]:
    """Split class indices into disjoint train and test classes by a fixed permutation.

    The permutation is ``numpy.random.default_rng(seed).permutation(num_classes)``; its first
    ``int(num_classes * train_fraction)`` entries are the train classes, the rest the test classes. It
    depends on nothing but the arguments, so two machines agree on it.

    Args:
        num_classes: number of classes, at least 2.
        train_fraction: share of the train classes, in (0, 1); both parts keep at least one class.
        seed: seed of the permutation; the documented splits use 100.

    Returns:
        Two int64 tensors, (num_train,) and (num_test,), in the order of the permutation.

    Example:
        >>> train, test = split_classes(1199)
        >>> len(train), len(test)
        (599, 600)
    """
    if num_classes < 2:
        raise ValueError(f"split_classes: num_classes must be at least 2, got {num_classes}")
    if not 0.0 < train_fraction < 1.0:
        raise ValueError(f"split_classes: train_fraction must be between 0 and 1, got {train_fraction}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_classes).astype(np.int64))
    num_train = min(max(int(num_classes * train_fraction), 1), num_classes - 1)
    return order[:num_train].clone(), order[num_train:].clone()


def dataset_labels(dataset: Any) -> Tensor:
    """The class label of every sample, without loading the samples where the dataset allows it.

    Looks at ``dataset.targets``, then ``dataset.labels``; a ``Subset`` and a ``ConcatDataset`` are looked
    through; any other map-style dataset of ``(input, label)`` pairs is read once, sample by sample.

    Returns:
        int64 tensor (len(dataset),) on the CPU.

    Raises:
        TypeError: there is nothing to read labels from.
    """
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is not None:
            return as_labels(values, f"dataset.{name}")
    if isinstance(dataset, Subset):
        return dataset_labels(dataset.dataset)[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([dataset_labels(part) for part in dataset.datasets])
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return as_labels([dataset[index][1] for index in range(len(dataset))], "the labels of dataset[i][1]")
    raise TypeError(
        f"dataset_labels: dataset must be a map-style dataset or have .targets, got {type(dataset).__name__}"
    )


def as_labels(values: Any, name: str) -> Tensor:
    """Labels as an int64 CPU tensor (n,); refuses floats, booleans and other shapes, naming ``name``."""
    if not isinstance(values, Tensor | np.ndarray):
        values = [int(value) if isinstance(value, Tensor) else value for value in values]
    labels = torch.as_tensor(values)
    if labels.numel() == 0:
        labels = labels.to(torch.int64)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {labels.dtype}; use labels.long()")
    if labels.dim() != 1:
        raise ValueError(f"{name} must be one label per sample, (N,), got shape {tuple(labels.shape)}")
    return labels.detach().to(device="cpu", dtype=torch.int64)


class ClassSubset(Dataset):
    """Some classes of a map-style dataset, with labels 0, 1, ... in the order in which they are given.

    Args:
        dataset: map-style dataset of ``(input, label)`` pairs.
        class_ids: labels of ``dataset`` to keep.

    Attributes:
        targets: int64 tensor (n,), the new labels.
        classes: names of the kept classes (the old label as text where ``dataset`` has no ``classes``).
        indices: int64 tensor (n,), where each sample lies in ``dataset``.
    """

    def __init__(self, dataset: Any, class_ids: Sequence[int] | Tensor) -> None:
        labels = dataset_labels(dataset)
        kept = check_class_ids(class_ids, labels)
        self.dataset = dataset
        self.indices, self.targets = select_indices(labels, kept)
        names = getattr(dataset, "classes", None)
        self.classes = [str(label) if names is None else names[label] for label in kept.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[int(self.indices[index])][0], int(self.targets[index])


def select_classes(dataset: Any, class_ids: Sequence[int] | Tensor) -> Any:
    """Keep some classes of a dataset and number them 0, 1, ... in the order given.

    A dataset with a ``select_classes`` method of its own (the glyph sets) is asked first, so that it stays
    in one array; every other map-style dataset is wrapped in a `ClassSubset`.

    Raises:
        ValueError: a class is given twice or has no sample.
    """
    method: Callable[..., Any] | None = getattr(dataset, "select_classes", None)
    return ClassSubset(dataset, class_ids) if method is None else method(class_ids)


def check_class_ids(class_ids: Sequence[int] | Tensor, labels: Tensor) -> Tensor:
    """Validated class ids (int64): distinct, and each with at least one sample in ``labels``."""
    kept = as_labels(class_ids, "select_classes: class_ids")
    if len(kept) == 0:
        raise ValueError("select_classes: class_ids is empty; give at least one class")
    if len(kept.unique()) != len(kept):
        values, counts = kept.unique(return_counts=True)
        raise ValueError(f"select_classes: class {int(values[counts > 1][0])} is given more than once")
    absent = kept[~torch.isin(kept, labels)]
    if len(absent):
        raise ValueError(
            f"select_classes: class {int(absent[0])} has no sample in the dataset, which has "
            f"{len(labels.unique())} classes"
        )
    return kept


def select_indices(labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the samples of the kept classes, class by class, and their new labels 0, 1, ..."""
    ascending, rank = kept.sort()
    place = torch.searchsorted(ascending, labels).clamp_(max=len(kept) - 1)
    indices = torch.nonzero(ascending[place] == labels).flatten()
    targets = rank[place[indices]]
    order = torch.argsort(targets, stable=True)
    return indices[order], targets[order]


def check_disjoint_classes(train: Any, test: Any) -> None:
    """Raise when a test class was trained on.

    Args:
        train, test: datasets with ``.classes`` (names), or iterables of names.

    Raises:
        ValueError: the sets share a class; the message names up to three of them and their number.
    """
    train_names, test_names = _class_names(train, "train"), _class_names(test, "test")
    shared = sorted(train_names & test_names)
    if shared:
        more = "" if len(shared) <= 3 else f" and {len(shared) - 3} more"
        raise ValueError(
            f"check_disjoint_classes: {len(shared)} of {len(test_names)} test classes are train classes too: "
            f"{', '.join(shared[:3])}{more}; retrieval is measured on unseen classes, so split by class "
            "(gcng.data.split_classes)"
        )


def _class_names(source: Any, role: str) -> set[str]:
    names: Iterable[Any] | None = getattr(source, "classes", None)
    if names is None:
        if not isinstance(source, list | tuple | set | frozenset):
            raise TypeError(
                f"check_disjoint_classes: {role} must have .classes or be a collection of class names, "
                f"got {type(source).__name__}"
            )
        names = source
    return {str(name) for name in names}
