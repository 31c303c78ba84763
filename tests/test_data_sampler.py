"""The class-balanced batch sampler: what a batch holds, how long an epoch is, and resume at any batch."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from gcng.data import ClassBalancedBatchSampler

EQUAL = [label for label in range(10) for _ in range(12)]


def epochs(sampler: ClassBalancedBatchSampler, count: int) -> list[list[list[int]]]:
    return [list(sampler) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    samples=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_every_batch_holds_m_classes_with_k_samples_each(
    counts: list[int], samples: int, seed: int, data: st.DataObject
) -> None:
    labels = np.repeat(np.arange(len(counts)) * 7 - 3, counts)
    labels = labels[np.random.default_rng(seed).permutation(len(labels))]
    classes = data.draw(st.integers(1, len(counts)))
    sampler = ClassBalancedBatchSampler(labels, classes, samples, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-len(labels) // (classes * samples))
    for batch in batches:
        by_class = labels[batch].reshape(classes, samples)  # class-major
        assert (by_class == by_class[:, :1]).all()
        assert len(set(by_class[:, 0])) == classes
        for row, label in zip(np.reshape(batch, (classes, samples)), by_class[:, 0], strict=True):
            size = int((labels == label).sum())
            # As few repeats as the class allows: none with at least K samples.
            assert max(Counter(row.tolist()).values()) == -(-samples // size)


def test_classes_are_drawn_equally_often_whatever_their_size() -> None:
    labels = [0] * 50 + [1] * 5 + [2] * 5 + [3] * 5
    sampler = ClassBalancedBatchSampler(labels, 3, 2, seed=1, batches_per_epoch=41)
    drawn = Counter(labels[batch[place]] for batch in sampler for place in range(0, 6, 2))
    assert sum(drawn.values()) == 123
    assert set(drawn.values()) <= {30, 31}


def test_samples_of_a_class_come_equally_often() -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 5, 4, seed=2, batches_per_epoch=18)
    drawn = Counter(index for batch in sampler for index in batch)
    assert len(drawn) == 120  # 18 x 5 x 4 = 360 draws, 3 for each sample
    assert set(drawn.values()) == {3}


def test_an_epoch_of_equal_classes_shows_every_sample_once_where_the_numbers_divide() -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 5, 4, seed=3)
    assert len(sampler) == 6
    assert sorted(index for batch in sampler for index in batch) == list(range(120))


def test_batches_are_uniform_over_pairs_of_classes() -> None:
    sampler = ClassBalancedBatchSampler(list(range(6)), 2, 1, seed=4, batches_per_epoch=6000)
    pairs = Counter(frozenset(batch) for batch in sampler)
    assert len(pairs) == 15
    # 400 expected per pair; dealing from a deck leaves less spread than independent draws (sd 19).
    assert min(pairs.values()) > 320
    assert max(pairs.values()) < 480


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 8), ({"drop_last": True}, 7), ({"batches_per_epoch": 3}, 3), ({"batches_per_epoch": 50}, 50)],
)
def test_the_length_of_an_epoch_is_what_it_says(options: dict, length: int) -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 4, 4, seed=0, **options)  # 120 / 16 = 7.5
    assert len(sampler) == length
    assert [len(batch) for batch in sampler] == [16] * length


def test_the_seed_fixes_every_epoch_and_epochs_differ() -> None:
    first = epochs(ClassBalancedBatchSampler(EQUAL, 4, 3, seed=5), 3)
    again = epochs(ClassBalancedBatchSampler(EQUAL, 4, 3, seed=5), 3)
    other = epochs(ClassBalancedBatchSampler(EQUAL, 4, 3, seed=6), 3)
    assert first == again
    assert first != other
    assert first[0] != first[1] != first[2]
    assert other[0] != first[1]


def test_the_seed_comes_from_the_generator() -> None:
    torch.manual_seed(11)
    by_default = ClassBalancedBatchSampler(EQUAL, 4, 3)
    generator = torch.Generator().manual_seed(11)
    by_generator = ClassBalancedBatchSampler(EQUAL, 4, 3, generator=generator)
    assert by_default.seed == by_generator.seed
    assert list(by_default) == list(by_generator)
    assert ClassBalancedBatchSampler(EQUAL, 4, 3, generator=generator).seed != by_default.seed


def test_drawing_batches_leaves_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    list(ClassBalancedBatchSampler(EQUAL, 4, 3, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", range(11))
def test_resume_gives_the_very_batches_that_were_left(stop: int) -> None:
    straight = epochs(ClassBalancedBatchSampler(EQUAL, 3, 4, seed=7), 3)
    sampler = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=7)
    list(sampler)
    running = iter(sampler)
    for _ in range(min(stop, len(sampler))):
        next(running)
    state = sampler.state_dict()
    resumed = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=99)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.position) == (1, min(stop, len(sampler)))
    resumed.set_epoch(1)  # as a loop over epochs does: must not rewind
    assert list(resumed) == straight[1][stop:]
    assert list(resumed) == straight[2]


def test_the_state_counts_what_was_consumed_where_it_is_told() -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=7)
    straight = list(sampler)
    sampler.seek(0)
    for _ in zip(range(5), sampler, strict=False):
        pass
    sampler.load_state_dict(sampler.state_dict(position=2))
    assert list(sampler) == straight[2:]


def test_the_state_is_plain_and_survives_a_safe_checkpoint(tmp_path) -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=7)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == sampler.state_dict()


def test_an_epoch_broken_off_starts_again() -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=8)
    straight = list(ClassBalancedBatchSampler(EQUAL, 3, 4, seed=8))
    assert next(iter(sampler)) == straight[0]
    assert list(sampler) == straight


def test_set_epoch_chooses_the_order() -> None:
    straight = epochs(ClassBalancedBatchSampler(EQUAL, 3, 4, seed=9), 4)
    sampler = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=9)
    for epoch in (3, 0, 2):
        sampler.set_epoch(epoch)
        assert list(sampler) == straight[epoch]


def test_small_classes_are_repeated_skipped_or_refused() -> None:
    labels = [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    repeat = ClassBalancedBatchSampler(labels, 3, 4, seed=0)
    assert repeat.num_classes == 3
    assert sum(index == 4 for index in next(iter(repeat))) == 4
    skip = ClassBalancedBatchSampler(labels, 2, 4, seed=0, small_classes="skip", batches_per_epoch=20)
    assert skip.num_classes == 2
    assert 4 not in {index for batch in skip for index in batch}
    assert (
        len(ClassBalancedBatchSampler(labels, 2, 4, small_classes="skip")) == 2
    )  # 9 samples in use, 8 a batch
    with pytest.raises(
        ValueError, match="1 classes have fewer than samples_per_class=4 samples, first class 1 with 1"
    ):
        ClassBalancedBatchSampler(labels, 2, 4, small_classes="error")


def test_a_small_class_is_repeated_evenly() -> None:
    sampler = ClassBalancedBatchSampler([0, 0, 0, 1, 1, 1], 1, 5, seed=0, batches_per_epoch=60)
    drawn = Counter(index for batch in sampler for index in batch)
    assert sum(drawn.values()) == 300
    assert set(drawn.values()) == {50}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ([0, 0, 1], 3, 2),
            {},
            "classes_per_batch=3 exceeds the 2 classes of the dataset; use classes_per_batch <= 2",
        ),
        (
            ([0, 0, 1], 2, 2),
            {"small_classes": "skip"},
            r"exceeds the 1 classes of the dataset \(1 more have too few samples and small_classes='skip'\)",
        ),
        (([0], 0, 2), {}, "classes_per_batch must be an integer of at least 1, got 0"),
        (([0], 1, 2.0), {}, "samples_per_class must be an integer of at least 1, got 2.0"),
        (([0], 1, True), {}, "samples_per_class must be an integer of at least 1, got True"),
        (([0], 1, 1), {"batches_per_epoch": 0}, "batches_per_epoch must be an integer of at least 1, got 0"),
        (
            ([0], 1, 1),
            {"small_classes": "drop"},
            "small_classes must be one of repeat, skip, error, got 'drop'",
        ),
        (([], 1, 1), {}, "labels is empty"),
        (([0, 1], 2, 2), {"drop_last": True}, "2 samples are fewer than one batch of 2 x 2 = 4"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassBalancedBatchSampler(*arguments, **options)


def test_numpy_integers_are_integers() -> None:
    sampler = ClassBalancedBatchSampler(np.array([0, 0, 1], np.uint8), np.int64(2), np.int32(2), seed=0)
    assert (sampler.batch_size, len(sampler)) == (4, 1)
    assert type(sampler.state_dict()["classes_per_batch"]) is int


def test_labels_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="labels must hold integers, got torch.float32; use labels.long"):
        ClassBalancedBatchSampler(torch.tensor([0.0, 1.0]), 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": EQUAL[::-1]}, "label_checksum is"),
        ({"classes_per_batch": 4}, "classes_per_batch is 3 in the state and 4 here"),
        ({"samples_per_class": 5}, "samples_per_class is 4 in the state and 5 here"),
        ({"batches_per_epoch": 9}, "batches_per_epoch is 10 in the state and 9 here"),
        ({"small_classes": "skip"}, "small_classes is 'repeat' in the state and 'skip' here"),
    ],
)
def test_the_state_of_another_run_is_refused(change: dict, message: str) -> None:
    settings = {"labels": EQUAL, "classes_per_batch": 3, "samples_per_class": 4, "seed": 0}
    state = ClassBalancedBatchSampler(**settings).state_dict()
    with pytest.raises(ValueError, match=message):
        ClassBalancedBatchSampler(**settings | change).load_state_dict(state)


def test_a_state_without_an_entry_is_refused() -> None:
    sampler = ClassBalancedBatchSampler(EQUAL, 3, 4, seed=0)
    state = sampler.state_dict()
    del state["position"]
    with pytest.raises(ValueError, match="the state has no entry 'position'"):
        sampler.load_state_dict(state)


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (0, -1), (0, 11)])
def test_places_outside_an_epoch_are_refused(epoch: int, position: int) -> None:
    with pytest.raises(
        ValueError, match=f"got epoch {epoch}, position {position}; .* an epoch has 10 batches"
    ):
        ClassBalancedBatchSampler(EQUAL, 3, 4, seed=0).seek(epoch, position)


def test_it_works_as_the_batch_sampler_of_a_data_loader() -> None:
    dataset = TensorDataset(torch.arange(120), torch.tensor(EQUAL))
    sampler = ClassBalancedBatchSampler(dataset, 4, 3, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler)
    assert len(loader) == 10
    for inputs, labels in loader:
        assert labels.view(4, 3).unique(dim=1).shape == (4, 1)
        assert inputs.tolist() == [index for index in inputs.tolist() if EQUAL[index] in labels]


def test_the_labels_may_come_from_a_subset_of_a_data_set() -> None:
    dataset = TensorDataset(torch.arange(120), torch.tensor(EQUAL))
    sampler = ClassBalancedBatchSampler(Subset(dataset, range(24, 60)), 3, 2, seed=0)
    assert sampler.num_classes == 3
    assert {index for batch in sampler for index in batch} == set(range(36))


class Plain:
    """What DataLoader takes for a dataset, and nothing more."""

    def __init__(self, labels: list[int]) -> None:
        self.labels_of_samples = labels

    def __len__(self) -> int:
        return len(self.labels_of_samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(2), self.labels_of_samples[index]


def test_a_dataset_needs_no_base_class() -> None:
    batches = list(ClassBalancedBatchSampler(Plain(EQUAL), 3, 4, seed=0))
    assert batches == list(ClassBalancedBatchSampler(EQUAL, 3, 4, seed=0))
    for column in (tuple(EQUAL), np.array(EQUAL), array("q", EQUAL), iter(EQUAL)):
        assert list(ClassBalancedBatchSampler(column, 3, 4, seed=0)) == batches
