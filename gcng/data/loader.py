"""A data loader whose batches, augmentation included, do not depend on workers and survive a resume."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from gcng.data.sampler import ClassBalancedBatchSampler, mix_seed


class ResumableLoader:
    """Batches of a map-style dataset in the order of a `ClassBalancedBatchSampler`, resumable at any batch.

    Each batch is built under random states of its own, seeded by (seed, epoch, batch): torch's CPU generator,
    ``random`` and ``numpy.random``. So transforms that draw from any of them give the same batch with 0 or
    more workers, and after a resume; the states of the calling process are left as they were.

    The loader counts what was consumed, while workers draw ahead: ``state_dict()`` is right at any time. An
    epoch that ran to its end is followed by the next; one broken off starts again unless a state is
    loaded. Use the loader's ``set_epoch`` and state, not the sampler's.

    Args:
        dataset: map-style dataset; ``__getitems__`` is used where it exists.
        batch_sampler: gives the indices of each batch.
        num_workers: worker processes; 0 loads in this process.
        seed: seed of the augmentation; None takes the sampler's seed.
        collate_fn, pin_memory, prefetch_factor, persistent_workers: as in ``torch.utils.data.DataLoader``.

    Example:
        >>> sampler = ClassBalancedBatchSampler(dataset, 32, 4, seed=0)
        >>> loader = ResumableLoader(dataset, sampler, num_workers=2)
        >>> for images, labels in loader:
        ...     state = loader.state_dict()  # any time, e.g. for a checkpoint
    """

    def __init__(
        self,
        dataset: Any,
        batch_sampler: ClassBalancedBatchSampler,
        *,
        num_workers: int = 0,
        seed: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"ResumableLoader: dataset must be map-style, got {type(dataset).__name__}")
        for name in ("seek", "state_dict", "load_state_dict"):
            if not hasattr(batch_sampler, name):
                raise TypeError(
                    f"ResumableLoader: batch_sampler must be a ClassBalancedBatchSampler, got "
                    f"{type(batch_sampler).__name__} without .{name}"
                )
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        self.seed = int(batch_sampler.seed if seed is None else seed)
        self.epoch = batch_sampler.epoch
        self.position = batch_sampler.position
        self._start = batch_sampler.position
        self._loader = DataLoader(
            _SeededDataset(dataset),
            batch_sampler=_KeyedBatches(self),  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            # A generator of its own, so that starting an epoch draws nothing from torch's default generator.
            generator=Generator().manual_seed(mix_seed(self.seed, 0)),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        self.position, self._start = self._start, 0
        self.batch_sampler.seek(epoch, self.position)
        for batch in self._loader:
            self.position += 1
            yield batch
        if self.epoch == epoch:
            self._seek(epoch + 1, 0)

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next pass. The position survives where ``epoch`` is the epoch just loaded."""
        if epoch != self.epoch:
            self._seek(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches consumed, seeds and settings, as plain numbers and strings."""
        state = self.batch_sampler.state_dict(position=self.position)
        return {"sampler": {**state, "epoch": self.epoch}, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: a key is missing, or the state belongs to other labels or settings.
        """
        for key in ("sampler", "seed"):
            if key not in state:
                raise ValueError(f"ResumableLoader.load_state_dict: the state has no entry {key!r}")
        self.batch_sampler.load_state_dict(state["sampler"])
        self.seed = int(state["seed"])
        self._seek(self.batch_sampler.epoch, self.batch_sampler.position)

    def _seek(self, epoch: int, position: int) -> None:
        self.batch_sampler.seek(epoch, position)
        self.epoch, self.position, self._start = epoch, position, position


class _KeyedBatches:
    """What the DataLoader sees as its batch sampler: (seed of the batch, indices)."""

    def __init__(self, owner: ResumableLoader) -> None:
        self.owner = owner

    def __len__(self) -> int:
        return len(self.owner.batch_sampler)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        owner = self.owner
        epoch, first = owner.epoch, owner.position
        for number, indices in enumerate(owner.batch_sampler, start=first):
            yield mix_seed(owner.seed, epoch, number), indices


class _SeededDataset(Dataset):
    """Builds a whole batch under the random states that its key asks for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, key: tuple[int, list[int]]) -> list[Any]:
        seed, indices = key
        with seeded_randomness(seed):
            fetch = getattr(self.dataset, "__getitems__", None)
            return fetch(indices) if fetch is not None else [self.dataset[index] for index in indices]


@contextmanager
def seeded_randomness(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, ``random`` and ``numpy.random`` inside the block; restore them after.

    CUDA generators are not touched.
    """
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
