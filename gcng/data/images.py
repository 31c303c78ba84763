"""Image files as a dataset: loading, class folders, and the checks that all layouts share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gcng.data.optional import require
from gcng.data.splits import check_class_ids, select_indices
from gcng.data.transforms import ToTensor

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageDataset(Dataset):
    """Image files with labels: an item is ``(transform(image), int label)``.

    Args:
        paths: image files.
        targets: label of each file, from 0 to len(classes) - 1.
        classes: name of each class.
        transform: called with the Pillow image; None makes a float tensor (C, H, W) in [0, 1].
        mode: Pillow mode that images are converted to, ``"RGB"`` or ``"L"``.
        sources: where each path was listed, ``"file:line"``, for error messages; None leaves it out.

    Attributes:
        paths: list of `Path`.
        targets: int64 tensor (n,).
        classes: list of names.

    Raises:
        FileNotFoundError, ValueError: when an item is read that is absent or no readable image; the message
            names the file and the line that lists it. `verify` finds them all beforehand.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        targets: Sequence[int] | Tensor,
        classes: Sequence[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        mode: str = "RGB",
        sources: Sequence[str] | None = None,
    ) -> None:
        name = type(self).__name__
        if mode not in ("RGB", "L"):
            raise ValueError(f"{name}: mode must be 'RGB' or 'L', got {mode!r}")
        self.paths = [Path(path) for path in paths]
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.classes = [str(label) for label in classes]
        self.transform = ToTensor() if transform is None else transform
        self.mode = mode
        self.sources = None if sources is None else list(sources)
        if not self.paths:
            raise ValueError(f"{name}: no images")
        if len(self.targets) != len(self.paths):
            raise ValueError(f"{name}: {len(self.paths)} paths but {len(self.targets)} targets")
        self._check_classes(name)

    def _check_classes(self, name: str) -> None:
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(
                f"{name}: targets run from {low} to {high}, but there are {len(self.classes)} classes"
            )
        empty = torch.nonzero(torch.bincount(self.targets, minlength=len(self.classes)) == 0).flatten()
        if len(empty):
            raise ValueError(
                f"{name}: class {self.classes[int(empty[0])]!r} has no image ({len(empty)} empty classes of "
                f"{len(self.classes)}); remove it or restore its images"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.image(index)), int(self.targets[index])

    def image(self, index: int) -> Any:
        """The Pillow image of a sample, converted to ``mode``, untransformed."""
        listed = "" if self.sources is None else f", listed in {self.sources[index]}"
        return load_image(self.paths[index], self.mode, type(self).__name__, listed)

    def verify(self) -> None:
        """Decode every image once; raises for the first that is absent or unreadable, with the number of all.

        Reads the whole data set: minutes for large ones.
        """
        problems = []
        for index in range(len(self)):
            try:
                self.image(index)
            except (FileNotFoundError, ValueError) as error:
                problems.append(error)
        if problems:
            raise type(problems[0])(f"{problems[0]} ({len(problems)} of {len(self)} images are bad)")

    def select_classes(self, class_ids: Sequence[int] | Tensor) -> ImageDataset:
        """Some of the classes, numbered 0, 1, ... in the order given, as a dataset of its own."""
        kept = check_class_ids(class_ids, self.targets)
        indices, targets = select_indices(self.targets, kept)
        return ImageDataset(
            [self.paths[index] for index in indices.tolist()],
            targets,
            [self.classes[label] for label in kept.tolist()],
            transform=self.transform,
            mode=self.mode,
            sources=None if self.sources is None else [self.sources[index] for index in indices.tolist()],
        )


def load_image(path: Path, mode: str, owner: str, listed: str = "") -> Any:
    """Open and decode one image; every failure names the file, where it was listed, and a remedy."""
    image_module = require("PIL.Image", install="pillow", purpose=f"{owner} (reading images)")
    if not path.is_file():
        raise FileNotFoundError(
            f"{owner}: no image {path}{listed}; the data set is incomplete or its root is another folder"
        )
    try:
        with image_module.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        # Pillow raises a SyntaxError for some broken PNG files.
        raise ValueError(
            f"{owner}: cannot read the image {path}{listed} ({type(error).__name__}: {error}); it is damaged "
            "or no image, fetch it again or take it out of the data set"
        ) from error


class ClassFolder(ImageDataset):
    """One folder per class: ``root/<class>/**/<image>``, classes in the order of their sorted names.

    Files that are no images by their suffix and names that begin with a dot are ignored.

    Args:
        root: folder of the class folders.
        classes: names of the class folders to take, in this order; None takes all, sorted.
        transform, mode: see `ImageDataset`.

    Raises:
        FileNotFoundError: ``root`` or one of ``classes`` is absent.
        ValueError: no class folders, or a class without images.

    Example:
        >>> train = ClassFolder("flowers/train", transform=training_transform())
    """

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        mode: str = "RGB",
    ) -> None:
        name = type(self).__name__
        root = require_folder(root, name, "one folder per class")
        names = list_folders(root) if classes is None else [str(label) for label in classes]
        if not names:
            raise ValueError(f"{name}: {root} has no class folders; expected {root}/<class>/<image>")
        paths: list[Path] = []
        targets: list[int] = []
        for label, folder in enumerate(names):
            found = list_images(require_folder(root / folder, name, "the images of one class"))
            if not found:
                raise ValueError(
                    f"{name}: the class folder {root / folder} has no images ({', '.join(IMAGE_SUFFIXES)}); "
                    "remove it or restore its images"
                )
            paths += found
            targets += [label] * len(found)
        super().__init__(paths, targets, names, transform=transform, mode=mode)
        self.root = root


def require_folder(path: str | Path, owner: str, holds: str) -> Path:
    """``path`` as a `Path`; FileNotFoundError or NotADirectoryError when it is no folder."""
    path = Path(path)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{owner}: {path} is a file; expected a folder with {holds}")
    raise FileNotFoundError(f"{owner}: no folder {path}; expected {holds} there")


def list_folders(root: Path) -> list[str]:
    """Names of the folders in ``root``, sorted, without hidden ones."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def list_images(root: Path) -> list[Path]:
    """Image files below ``root``, sorted, without hidden files and folders."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in files
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(found)
