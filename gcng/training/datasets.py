"""From configuration to data sets and extractor.

Owns the names of ``data.kind`` and what each one needs; the data sets themselves are in :mod:`gcng.data`, the
extractors in :mod:`gcng.models`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gcng.data import (
    CUB200,
    Cars196,
    ClassBalancedBatchSampler,
    ClassFolder,
    GlyphAugmentation,
    InShop,
    Manifest,
    ResumableLoader,
    StanfordOnlineProducts,
    check_disjoint_classes,
    dataset_labels,
    evaluation_transform,
    load_glyphs,
    matplotlib_letters,
    omniglot,
    seeded_randomness,
    training_transform,
)
from gcng.losses import GCAHNGLoss
from gcng.models import build_extractor, find_head
from gcng.training.config import DATA_KINDS, Config, DataConfig, ModelConfig
from gcng.training.errors import ConfigError


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train: Map-style data set of ``(input, label)`` with labels 0 ... C-1, augmented.
        train_plain: The same samples as they are embedded, without augmentation.
        num_classes: C, the training classes.
        test: Data set of unseen classes, or None where nothing is evaluated.
        gallery: Where given, ``test`` holds the queries and the answers come from here.
    """

    train: Any
    train_plain: Any
    num_classes: int
    test: Any = None
    gallery: Any = None

    def sample(self) -> Tensor:
        """One training input. What its augmentation draws does not move the run's random state."""
        with seeded_randomness(0):
            return torch.as_tensor(self.train[0][0])

    def in_channels(self) -> int:
        """Channels of the inputs: the first extent of a sample, 1 where it has none."""
        sample = self.sample()
        return int(sample.shape[0]) if sample.dim() else 1


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
    if config.kind not in DATA_KINDS:
        raise ConfigError(f"data.kind must be one of {', '.join(DATA_KINDS)}, got {config.kind!r}")
    if config.kind != "matplotlib_letters" and not config.root:
        raise ConfigError(f"data.root must be given for data.kind {config.kind}: the folder or file of the data set")
    try:
        if config.kind in _GLYPHS:
            return _glyph_run(config, _GLYPHS[config.kind])
        return _image_run(config, _IMAGES[config.kind])
    except ConfigError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise ConfigError(f"data.kind {config.kind}, data.root {config.root!r}: {error}") from error


def _glyph_run(config: DataConfig, read: Callable[[str, str], Any]) -> RunData:
    train, test = read(config.root, "train"), read(config.root, "test")
    side = train.images.shape[-1]
    if config.image_size not in (0, side):
        raise ConfigError(f"data.image_size must be 0 or {side} for data.kind {config.kind}, got {config.image_size}")
    check_disjoint_classes(train, test)
    return RunData(AugmentedBatches(train, GlyphAugmentation()), train, len(train.classes), test)


def _image_run(config: DataConfig, read: Callable[..., Any]) -> RunData:
    size = config.image_size or PHOTO_SIZE
    plain = evaluation_transform(size, resize=round(size * 256 / 224))
    train = read(config.root, "train", transform=training_transform(size, scale=config.crop_scale))
    gallery = None
    if config.kind == "inshop":
        test, gallery = (read(config.root, part, transform=plain) for part in ("query", "gallery"))
    else:
        test = read(config.root, "test", transform=plain)
    check_disjoint_classes(train, test)
    train_plain = read(config.root, "train", transform=plain)
    return RunData(train, train_plain, len(train.classes), test, gallery)


def _letters(_: str, split: str) -> Any:
    return matplotlib_letters(split)


def _class_folders(root: str, split: str, *, transform: Any) -> Any:
    return ClassFolder(Path(root) / split, transform=transform)


PHOTO_SIZE = 224
_GLYPHS: dict[str, Callable[[str, str], Any]] = {
    "matplotlib_letters": _letters,
    "glyphs": load_glyphs,
    "omniglot": omniglot,
}
_IMAGES: dict[str, Callable[..., Any]] = {
    "class_folders": _class_folders,
    "manifest": Manifest,
    "cub200": CUB200,
    "cars196": Cars196,
    "sop": StanfordOnlineProducts,
    "inshop": InShop,
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
    settings = dataclasses.asdict(config.loss)
    settings["memory_budget"] = settings["memory_budget"] or None
    return GCAHNGLoss(config.model.embedding_size, num_classes, **settings)


def make_loader(config: Config, data: RunData) -> Any:
    """A loader of class-balanced batches, the same for any number of workers and after a resume."""
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
