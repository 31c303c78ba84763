"""The class-balanced batch sampler: M classes x K samples per batch, resumable at any batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from gcng.data.splits import as_labels, dataset_labels

SMALL_CLASS_POLICIES = ("repeat", "skip", "error")
_WORD = (1 << 64) - 1


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Batches of M classes with K samples each, class after class (class-major).

    Works with every map-style dataset: it needs the labels only. Hand it to ``DataLoader(batch_sampler=...)``
    or to `ResumableLoader`.

    **What a batch holds.** M distinct classes, dealt from a shuffled deck of all classes that is reshuffled
    when it runs out, so over an epoch any two classes are drawn equally often, give or take one. K samples of
    each class, dealt from a shuffled deck of that class in the same way: no sample comes twice in a batch,
    and none comes again before the others of its class have come. A class with n < K samples follows
    ``small_classes``: ``"repeat"`` (default) takes every sample floor(K / n) times and the rest from the
    deck, ``"skip"`` leaves the class out, ``"error"`` refuses.

    **How long an epoch is.** ``len(sampler)`` batches, all of them full. Default: n / (M * K), rounded up
    (down with ``drop_last=True``), where n counts the samples of the classes in use: an epoch draws as many
    samples as there are. With classes of equal size every sample is expected once; otherwise a class of twice
    the mean size shows each of its samples half as often, since classes, not samples, are drawn evenly. Not
    every sample comes in every epoch. ``batches_per_epoch`` sets any other length.

    **Order and resume.** The batches of an epoch depend on (seed, epoch, labels, M, K) only. An epoch that
    ran to its end is followed by the next one; one that was broken off starts again from its first batch.
    ``state_dict()`` holds epoch, position (batches drawn) and seed; after ``load_state_dict`` the next pass
    begins at that position with the very batch that would have come. A ``DataLoader`` with workers draws
    ahead of what was consumed: pass ``state_dict(position=consumed)`` or use `ResumableLoader`, which counts.

    Args:
        labels: (n,) integer labels, or a dataset to read them from (see `dataset_labels`).
        classes_per_batch: M, at least 1.
        samples_per_class: K, at least 1.
        batches_per_epoch: length of an epoch in batches; None as above.
        drop_last: round the default length down and not up.
        small_classes: ``"repeat"``, ``"skip"`` or ``"error"``, for classes with fewer than K samples.
        seed: seed of all epochs; None draws one from ``generator``.
        generator: source of the seed when ``seed`` is None; None is torch's default generator.

    Attributes:
        epoch, position: where the current or next pass stands.
        num_classes: number of classes in use.

    Raises:
        ValueError: M exceeds the number of classes (the message holds both), an unknown policy, no samples,
            or a default length of zero batches.

    Memory: 16 bytes per sample, and the decks of the classes drawn so far.

    Example:
        >>> sampler = ClassBalancedBatchSampler([0, 0, 1, 1, 2, 2], 2, 2, seed=0)
        >>> len(sampler), [len(batch) for batch in sampler]
        (2, [4, 4])
    """

    def __init__(
        self,
        labels: Any,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        batches_per_epoch: int | None = None,
        drop_last: bool = False,
        small_classes: str = "repeat",
        seed: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.classes_per_batch = _positive("classes_per_batch", classes_per_batch)
        self.samples_per_class = _positive("samples_per_class", samples_per_class)
        if small_classes not in SMALL_CLASS_POLICIES:
            raise ValueError(
                f"ClassBalancedBatchSampler: small_classes must be one of {', '.join(SMALL_CLASS_POLICIES)}, "
                f"got {small_classes!r}"
            )
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, (), generator=generator))
        self.seed = int(seed)
        self.small_classes = small_classes
        values = _label_tensor(labels)
        self._members = _group(values, self.samples_per_class, small_classes)
        self.num_classes = len(self._members)
        if self.classes_per_batch > self.num_classes:
            raise ValueError(
                _too_few_classes(self.classes_per_batch, self.num_classes, values, small_classes)
            )
        if batches_per_epoch is None:
            batches_per_epoch = self._default_length(drop_last)
        self.batches_per_epoch = _positive("batches_per_epoch", batches_per_epoch)
        self._label_checksum = zlib.crc32(values.numpy().tobytes())
        self.epoch = 0
        self.position = 0
        self._start = 0

    def _default_length(self, drop_last: bool) -> int:
        samples = sum(len(members) for members in self._members)
        batch = self.classes_per_batch * self.samples_per_class
        if drop_last and samples < batch:
            raise ValueError(
                f"ClassBalancedBatchSampler: drop_last=True leaves no batch: {samples} samples are fewer "
                f"than one batch of {self.classes_per_batch} x {self.samples_per_class} = {batch}; use "
                "drop_last=False or set batches_per_epoch"
            )
        return samples // batch if drop_last else -(-samples // batch)

    @property
    def batch_size(self) -> int:
        """Samples per batch, M * K."""
        return self.classes_per_batch * self.samples_per_class

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self._start
        self._start, self.position = 0, start
        deal = _EpochDeal(
            self._members, self.classes_per_batch, self.samples_per_class, mix_seed(self.seed, epoch)
        )
        for _ in range(start):
            deal.batch()
        for position in range(start, self.batches_per_epoch):
            batch = deal.batch()
            self.position = position + 1
            yield batch
        if self.epoch == epoch:
            self.seek(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next pass. The position survives where ``epoch`` is the epoch just loaded."""
        if epoch != self.epoch:
            self.seek(epoch)

    def seek(self, epoch: int, position: int = 0) -> None:
        """Let the next pass begin at batch ``position`` of ``epoch``."""
        if epoch < 0 or not 0 <= position <= self.batches_per_epoch:
            raise ValueError(
                f"ClassBalancedBatchSampler.seek: got epoch {epoch}, position {position}; epochs start at 0 "
                f"and an epoch has {self.batches_per_epoch} batches"
            )
        self.epoch, self.position, self._start = epoch, position, position

    def state_dict(self, *, position: int | None = None) -> dict[str, Any]:
        """Plain numbers and strings that `load_state_dict` takes.

        Args:
            position: batches of the epoch that were consumed; None takes the number that was drawn.
        """
        return {
            "epoch": self.epoch,
            "position": self.position if position is None else int(position),
            "seed": self.seed,
            **self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken: the next pass begins at its epoch and position.

        Raises:
            ValueError: a key is missing, or the state belongs to other labels or settings; names both values.
        """
        settings = self._settings()
        for key in ("epoch", "position", "seed", *settings):
            if key not in state:
                raise ValueError(f"ClassBalancedBatchSampler.load_state_dict: the state has no entry {key!r}")
        for key, here in settings.items():
            if state[key] != here:
                raise ValueError(
                    f"ClassBalancedBatchSampler.load_state_dict: {key} is {state[key]!r} in the state and "
                    f"{here!r} here; resume needs the dataset and the sampler settings of the saved run"
                )
        self.seed = int(state["seed"])
        self.seek(int(state["epoch"]), int(state["position"]))

    def _settings(self) -> dict[str, Any]:
        return {
            "classes_per_batch": self.classes_per_batch,
            "samples_per_class": self.samples_per_class,
            "batches_per_epoch": self.batches_per_epoch,
            "small_classes": self.small_classes,
            "label_checksum": self._label_checksum,
        }


class _Deck:
    """Deals from a shuffled deck of ``size`` cards; reshuffles when it is empty, no card twice in a hand."""

    def __init__(self, size: int, generator: Generator) -> None:
        self.size = size
        self.generator = generator
        self.cards: list[int] = []
        self.top = 0

    def deal(self, count: int) -> list[int]:
        """The next ``count`` cards, at most ``size``."""
        hand = self.cards[self.top : self.top + count]
        self.top += len(hand)
        missing = count - len(hand)
        if missing:
            held = set(hand)
            fresh = torch.randperm(self.size, generator=self.generator).tolist()
            # Cards of this hand go to the bottom of the new deck: they come again, but not in this hand.
            others = [card for card in fresh if card not in held]
            hand += others[:missing]
            self.cards, self.top = others[missing:] + [card for card in fresh if card in held], 0
        return hand


class _EpochDeal:
    """The batches of one epoch, in order."""

    def __init__(self, members: list[Tensor], classes: int, samples: int, seed: int) -> None:
        self.members = members
        self.classes = classes
        self.samples = samples
        self.generator = Generator().manual_seed(seed)
        self.class_deck = _Deck(len(members), self.generator)
        self.sample_decks: dict[int, _Deck] = {}

    def batch(self) -> list[int]:
        indices: list[int] = []
        for chosen in self.class_deck.deal(self.classes):
            members = self.members[chosen]
            deck = self.sample_decks.get(chosen)
            if deck is None:
                deck = self.sample_decks[chosen] = _Deck(len(members), self.generator)
            whole, rest = divmod(self.samples, len(members))
            places = [place for _ in range(whole) for place in deck.deal(len(members))] + deck.deal(rest)
            indices += members[places].tolist()
        return indices


def mix_seed(*values: int) -> int:
    """One seed in [0, 2^63) from several integers; neighboring inputs give unrelated seeds (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _WORD)) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state >> 1


def _label_tensor(labels: Any) -> Tensor:
    name = "ClassBalancedBatchSampler: labels"
    values = dataset_labels(labels) if _is_dataset(labels) else as_labels(labels, name)
    if len(values) == 0:
        raise ValueError(f"{name} is empty; the dataset has no samples")
    return values.contiguous()


def _is_dataset(labels: Any) -> bool:
    named = any(hasattr(labels, name) for name in ("targets", "labels", "datasets"))
    if named or isinstance(labels, torch.utils.data.Dataset):
        return True
    # What DataLoader takes for a dataset needs no base class; columns of labels convert to arrays.
    is_column = isinstance(labels, Tensor | Sequence) or hasattr(labels, "__array__")
    return not is_column and hasattr(labels, "__getitem__") and hasattr(labels, "__len__")


def _group(labels: Tensor, samples_per_class: int, small_classes: str) -> list[Tensor]:
    order = torch.argsort(labels, stable=True)
    names, counts = labels[order].unique_consecutive(return_counts=True)
    small = counts < samples_per_class
    if small_classes == "error" and small.any():
        first = int(torch.nonzero(small)[0])
        raise ValueError(
            f"ClassBalancedBatchSampler: {int(small.sum())} classes have fewer than samples_per_class="
            f"{samples_per_class} samples, first class {int(names[first])} with {int(counts[first])}; use "
            "small_classes='repeat' or 'skip', or a smaller samples_per_class"
        )
    groups = list(torch.split(order, counts.tolist()))
    if small_classes == "skip":
        groups = [group for group in groups if len(group) >= samples_per_class]
    return groups


def _too_few_classes(wanted: int, usable: int, labels: Tensor, small_classes: str) -> str:
    present = len(labels.unique())
    note = (
        f" ({present - usable} more have too few samples and small_classes='skip')"
        if usable < present
        else ""
    )
    return (
        f"ClassBalancedBatchSampler: classes_per_batch={wanted} exceeds the {usable} classes of the "
        f"dataset{note}; "
        f"use classes_per_batch <= {usable}"
        + (" or small_classes='repeat'" if small_classes == "skip" else "")
    )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"ClassBalancedBatchSampler: {name} must be an integer of at least 1, got {value!r}")
    return int(value)
