"""From configuration to data sets and extractor.

Owns the names of ``data.kind`` and what each one needs; the data sets themselves are in :mod:`gcng.data`, the
extractors in :mod:`gcng.models`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gcng.models import build_extractor, find_head
from gcng.training.config import Config, DataConfig, ModelConfig
from gcng.training.errors import ConfigError


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train: Map-style data set of ``(input, label)`` with labels 0 ... C-1.
        num_classes: C, the training classes.
        test: Data set of unseen classes, or None where nothing is evaluated.
        gallery: Where given, ``test`` holds the queries and the answers come from here.
    """

    train: Any
    num_classes: int
    test: Any = None
    gallery: Any = None

    def in_channels(self) -> int:
        """Channels of the inputs: the first extent of a sample."""
        from gcng.data import seeded_randomness

        with seeded_randomness(0):  # the sample's augmentation must not move the run's random state
            return int(self.train[0][0].shape[0])


class AugmentedBatches(Dataset):
    """A data set whose batches pass through ``augment``, which takes (n, ...) inputs and draws from torch.

    Whole batches at once, and inside the loader's seeded block, so the batch is the same for any number of
    workers.
    """

    def __init__(self, dataset: Any, augment: Callable[[Tensor], Tensor]) -> None:
        self.dataset = dataset
        self.augment = augment
        self.targets = dataset.targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        inputs, labels = self.dataset.batch(indices)
        return list(zip(self.augment(inputs).unbind(), labels.tolist(), strict=True))


def build_data(config: DataConfig) -> RunData:
    """Build the data sets of ``data.kind``.

    Raises:
        ConfigError: Unknown kind, missing files or packages, or test classes that are trained on.
    """
    if config.kind not in _KINDS:
        raise ConfigError(f"data.kind must be one of {', '.join(_KINDS)}, got {config.kind!r}")
    if config.kind != "matplotlib_letters" and not config.root:
        raise ConfigError(
            f"data.root must be given for data.kind {config.kind}: the folder or file of the data set"
        )
    try:
        return _KINDS[config.kind](config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise ConfigError(f"data.kind {config.kind}, data.root {config.root!r}: {error}") from error


def _letters(config: DataConfig) -> RunData:
    from gcng.data import matplotlib_letters

    return _glyph_run(config, matplotlib_letters("train"), matplotlib_letters("test"))


def _glyphs(config: DataConfig) -> RunData:
    from gcng.data import load_glyphs

    return _glyph_run(config, load_glyphs(config.root, "train"), load_glyphs(config.root, "test"))


def _glyph_run(config: DataConfig, train: Any, test: Any) -> RunData:
    from gcng.data import GlyphAugmentation

    side = train.images.shape[-1]
    if config.image_size not in (0, side):
        raise ConfigError(
            f"data.image_size must be 0 or {side} for data.kind {config.kind}, got {config.image_size}"
        )
    return RunData(AugmentedBatches(train, GlyphAugmentation()), len(train.classes), test)


_KINDS: dict[str, Callable[[DataConfig], RunData]] = {
    "matplotlib_letters": _letters,
    "glyphs": _glyphs,
}


class UnitLength(nn.Module):
    """An extractor whose embeddings are scaled to unit length."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    @property
    def head(self) -> nn.Module:
        """The embedding layer, where those who train it look for it."""
        return find_head(self.extractor)

    def forward(self, inputs: Any) -> Tensor:
        return nn.functional.normalize(self.extractor(inputs), dim=1)


def make_extractor(config: ModelConfig, *, in_channels: int, pretrained: bool | None = None) -> nn.Module:
    """Build the extractor of ``config``; ``pretrained`` replaces ``config.pretrained`` where given.

    torchvision's published weights are its ``IMAGENET1K_V1``, as in the authors' runs.

    Raises:
        ConfigError: Unknown backbone, a package that is not installed, or an option that the backbone does
            not have.
    """
    pretrained = config.pretrained if pretrained is None else pretrained
    library = config.backbone.partition(":")[0]
    options: dict[str, Any] = {}
    if library == "torchvision":
        options = {"head": config.head, "pooling": config.pooling}
        options |= {"weights": "IMAGENET1K_V1"} if pretrained else {}
    elif library == "timm":
        options = {"head": config.head, "in_chans": in_channels}
        options |= {"pretrained": True} if pretrained else {}
    elif config.backbone == "small_conv":
        options = {"in_channels": in_channels}
    try:
        extractor = build_extractor(config.backbone, config.embedding_size, **options)
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise ConfigError(f"model.backbone {config.backbone!r}: {error}") from error
    return UnitLength(extractor) if config.normalize else extractor


def make_criterion(config: Config, num_classes: int) -> nn.Module:
    """:class:`gcng.losses.GCAHNGLoss` with the settings of ``config``."""
    from gcng.losses import GCAHNGLoss

    settings = dataclasses.asdict(config.loss)
    settings["memory_budget"] = settings["memory_budget"] or None
    return GCAHNGLoss(config.model.embedding_size, num_classes, **settings)


def make_loader(config: Config, data: RunData) -> Any:
    """A loader of class-balanced batches, the same for any number of workers and after a resume."""
    from gcng.data import ClassBalancedBatchSampler, ResumableLoader, dataset_labels

    settings = config.data
    try:
        sampler = ClassBalancedBatchSampler(
            dataset_labels(data.train),
            settings.num_classes_per_batch,
            settings.samples_per_class,
            batches_per_epoch=settings.batches_per_epoch or None,
            drop_last=True,
            seed=config.run.seed,
        )
    except ValueError as error:
        raise ConfigError(f"data.num_classes_per_batch, data.samples_per_class: {error}") from error
    return ResumableLoader(
        data.train,
        sampler,
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available() and settings.workers > 0,
    )
