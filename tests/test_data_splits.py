"""Class splits, selections of classes, labels of data sets, and the check for shared classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset

from gcng.data import ClassSubset, check_disjoint_classes, dataset_labels, select_classes, split_classes


class Pairs(Dataset):
    """A map-style data set that has nothing but items, and counts how often they are read."""

    def __init__(self, labels: list[int]) -> None:
        self.values = labels
        self.reads = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[str, int]:
        self.reads += 1
        return f"input {index}", self.values[index]


class Named(Pairs):
    """As a torchvision folder: targets and class names."""

    def __init__(self, labels: list[int], classes: list[str]) -> None:
        super().__init__(labels)
        self.targets = labels
        self.classes = classes


def test_the_split_is_the_documented_permutation() -> None:
    train, test = split_classes(1199)
    order = np.random.default_rng(100).permutation(1199)
    assert train.tolist() == order[:599].tolist()
    assert test.tolist() == order[599:].tolist()


def test_the_permutation_is_the_same_on_every_machine() -> None:
    train, test = split_classes(10)
    assert (train.tolist(), test.tolist()) == ([7, 3, 5, 2, 6], [1, 0, 9, 4, 8])


@given(
    num_classes=st.integers(2, 300),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_a_split_is_a_partition(num_classes: int, fraction: float, seed: int) -> None:
    train, test = split_classes(num_classes, train_fraction=fraction, seed=seed)
    assert len(train) >= 1
    assert len(test) >= 1
    assert sorted(train.tolist() + test.tolist()) == list(range(num_classes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 9, "train_fraction": 0.0}, "train_fraction must be between 0 and 1, got 0.0"),
        ({"num_classes": 9, "train_fraction": 1.0}, "train_fraction must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_splits_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_classes(**arguments)


def test_labels_come_from_targets_without_reading_items() -> None:
    dataset = Named([0, 2, 1], ["a", "b", "c"])
    assert dataset_labels(dataset).tolist() == [0, 2, 1]
    assert dataset.reads == 0


def test_labels_come_from_the_items_where_there_is_no_other_way() -> None:
    dataset = Pairs([4, 4, 7])
    assert dataset_labels(dataset).tolist() == [4, 4, 7]
    assert dataset.reads == 3


def test_labels_of_subsets_and_concatenations() -> None:
    dataset = Named([5, 6, 7, 8], list("abcdefghi"))
    assert dataset_labels(Subset(dataset, [3, 1])).tolist() == [8, 6]
    assert dataset_labels(ConcatDataset([dataset, Subset(dataset, [0])])).tolist() == [5, 6, 7, 8, 5]
    assert dataset.reads == 0


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, "must hold integers, got torch.float32"),
        (np.array([True, False]), TypeError, "must hold integers, got torch.bool"),
        (
            torch.zeros(2, 1, dtype=torch.int64),
            ValueError,
            r"one label per sample, \(N,\), got shape \(2, 1\)",
        ),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets: object, error: type, message: str) -> None:
    dataset = Pairs([0, 1])
    dataset.targets = targets
    with pytest.raises(error, match=message):
        dataset_labels(dataset)


def test_something_without_labels_is_refused() -> None:
    with pytest.raises(TypeError, match="map-style dataset or have .targets, got object"):
        dataset_labels(object())


def test_a_selection_renumbers_in_the_order_given() -> None:
    dataset = Named([0, 1, 2, 0, 2, 1], ["a", "b", "c"])
    chosen = select_classes(dataset, [2, 0])
    assert isinstance(chosen, ClassSubset)
    assert chosen.classes == ["c", "a"]
    assert chosen.targets.tolist() == [0, 0, 1, 1]
    assert chosen.indices.tolist() == [2, 4, 0, 3]
    assert chosen[1] == ("input 4", 0)
    assert len(chosen) == 4


def test_a_selection_of_a_data_set_without_names_uses_the_labels() -> None:
    assert select_classes(Pairs([10**12, -3, 10**12]), torch.tensor([10**12])).classes == [str(10**12)]


@pytest.mark.parametrize(
    ("class_ids", "message"),
    [
        ([0, 0], "class 0 is given more than once"),
        ([0, 9], "class 9 has no sample in the dataset, which has 2 classes"),
        ([], "class_ids is empty"),
    ],
)
def test_bad_selections_are_refused(class_ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_classes(Named([0, 1], ["a", "b"]), class_ids)


def test_shared_classes_are_found_by_name_and_counted() -> None:
    train, test = Named([0, 1], ["a", "b"]), Named([0, 1], ["c", "d"])
    check_disjoint_classes(train, test)
    with pytest.raises(ValueError, match="4 of 5 test classes are train classes too: b, c, d and 1 more"):
        check_disjoint_classes(["a", "b", "c", "d", "e"], ["b", "c", "d", "e", "f"])
    with pytest.raises(ValueError, match=r"1 of 2 .*: b; .*split_classes"):
        check_disjoint_classes(train, ("b", "x"))


def test_the_check_for_shared_classes_needs_names() -> None:
    with pytest.raises(
        TypeError, match="test must have .classes or be a collection of class names, got Pairs"
    ):
        check_disjoint_classes(["a"], Pairs([0]))
