"""The resumable loader: the same batches for any number of workers, and after a resume at any batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from gcng.data import ClassBalancedBatchSampler, ResumableLoader, seeded_randomness

LABELS = [label for label in range(6) for _ in range(8)]


class Noisy(Dataset):
    """Items that draw from all three generators that transforms use."""

    targets = LABELS

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = [float(torch.rand(())), random.random(), float(np.random.random())]
        return torch.tensor([index, *drawn], dtype=torch.float64), LABELS[index]


class Fetching(Noisy):
    """As Noisy, but reads batches at once."""

    def __init__(self) -> None:
        self.calls = 0

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        self.calls += 1
        return [self[index] for index in indices]


def make(workers: int = 0, seed: int = 3, **options: object) -> ResumableLoader:
    sampler = ClassBalancedBatchSampler(LABELS, 3, 4, seed=seed)
    return ResumableLoader(Noisy(), sampler, num_workers=workers, **options)


def read(loader: ResumableLoader, epochs: int = 1) -> list[Tensor]:
    return [inputs for _ in range(epochs) for inputs, _ in loader]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)


def test_batches_hold_the_items_of_the_sampler() -> None:
    loader = make()
    order = list(ClassBalancedBatchSampler(LABELS, 3, 4, seed=3))
    assert len(loader) == len(order) == 4
    for (inputs, labels), indices in zip(loader, order, strict=True):
        assert inputs[:, 0].long().tolist() == indices
        assert labels.tolist() == [LABELS[index] for index in indices]


def test_workers_do_not_change_the_batches() -> None:
    assert_same(read(make(), epochs=2), read(make(workers=2), epochs=2))


def test_persistent_workers_do_not_change_the_batches() -> None:
    loader = make(workers=2, persistent_workers=True)
    assert_same(read(make(), epochs=2), read(loader, epochs=2))


def test_batches_epochs_and_seeds_draw_differently() -> None:
    first, other = read(make(), epochs=2), read(make(seed=4), epochs=2)
    drawn = torch.cat([batch[:, 1:] for batch in first + other])
    assert len(drawn.unique()) == drawn.numel()


def test_the_generators_of_the_caller_are_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    untouched = random.random(), float(np.random.random()), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    read(make())
    read(make(workers=2))
    assert (random.random(), float(np.random.random()), float(torch.rand(()))) == untouched


def test_the_batches_do_not_depend_on_the_state_of_the_caller() -> None:
    first = read(make())
    torch.manual_seed(12345)
    random.seed(5)
    assert_same(first, read(make()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_resume_is_bitwise(workers: int, stop: int) -> None:
    straight = read(make(), epochs=3)
    loader = make(workers=workers)
    seen, state = 0, loader.state_dict()
    while seen < stop:
        for _ in loader:
            seen += 1
            state = loader.state_dict()
            if seen == stop:
                break
    resumed = make(workers=workers, seed=77)
    resumed.load_state_dict(state)
    rest = read(resumed)
    while len(rest) < len(straight) - stop:
        rest += read(resumed)
    assert_same(straight[stop:], rest)


def test_the_state_after_the_last_batch_leaves_an_empty_rest_of_the_epoch() -> None:
    loader = make()
    running = iter(loader)
    for _ in range(len(loader)):
        next(running)
    state = loader.state_dict()
    assert (state["sampler"]["epoch"], state["sampler"]["position"]) == (0, 4)
    resumed = make()
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert resumed.epoch == 1


def test_a_loop_over_epochs_resumes_where_it_stood() -> None:
    straight = read(make(), epochs=2)
    resumed = make()
    resumed.load_state_dict({"sampler": make().batch_sampler.state_dict(position=2), "seed": 3})
    rest = []
    for epoch in range(resumed.epoch, 2):
        resumed.set_epoch(epoch)
        rest += read(resumed)
    assert_same(straight[2:], rest)


def test_an_epoch_broken_off_starts_again_with_and_without_workers() -> None:
    straight = read(make())
    for workers in (0, 2):
        loader = make(workers=workers)
        next(iter(loader))
        assert_same(straight, read(loader))


def test_set_epoch_chooses_the_batches() -> None:
    straight = read(make(), epochs=3)
    loader = make()
    loader.set_epoch(2)
    assert_same(straight[8:], read(loader))


def test_datasets_that_read_whole_batches_are_asked_once_per_batch() -> None:
    dataset = Fetching()
    loader = ResumableLoader(dataset, ClassBalancedBatchSampler(LABELS, 3, 4, seed=3))
    assert_same(read(loader), read(make()))
    assert dataset.calls == 4


def test_the_state_is_plain_and_survives_a_safe_checkpoint(tmp_path) -> None:
    loader = make()
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == loader.state_dict()


def test_bad_arguments_are_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="dataset must be map-style, got generator"):
        ResumableLoader((i for i in range(3)), ClassBalancedBatchSampler(LABELS, 3, 4))
    with pytest.raises(
        TypeError, match="batch_sampler must be a ClassBalancedBatchSampler, got list without .seek"
    ):
        ResumableLoader(Noisy(), [[0, 1]])
    with pytest.raises(TypeError, match="dataset must be map-style, got Stream"):
        ResumableLoader(Stream(), ClassBalancedBatchSampler(LABELS, 3, 4))
    with pytest.raises(ValueError, match="the state has no entry 'sampler'"):
        make().load_state_dict({"seed": 0})


def test_seeded_randomness_restores_after_an_error() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(RuntimeError, match="inside"), seeded_randomness(4):
        torch.rand(3), random.random(), np.random.random()
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
