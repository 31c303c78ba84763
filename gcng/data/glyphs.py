"""Glyph sets in memory: the dataset class and the packed arrays that it reads (`load_glyphs`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gcng.data.splits import as_labels, check_class_ids, select_indices, split_classes

SPLITS = ("train", "test", "all")
# A glyph is empty when its brightest pixel has less than half of the full grey: a hairline that the packing
# to 16 levels keeps is no answer to a query either.
INK_LEVEL = 128


class GlyphDataset(Dataset):
    """Gray images of one size, all in memory: an item is ``(float32 (1, S, S) in [0, 1], int label)``.

    Args:
        images: (n, S, S) or (n, 1, S, S) uint8, white ink on black.
        targets: (n,) integer labels from 0 to len(classes) - 1.
        classes: name of each class.
        samples: name of each sample (a font, a drawer); None leaves them unnamed.
        transform: called with the float image; augmentation of whole batches (`GlyphAugmentation`) is faster.

    Attributes:
        images: (n, 1, S, S) uint8.
        targets: (n,) int64.

    Memory: the bytes of ``images``.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        targets: Any,
        classes: Sequence[str],
        *,
        samples: Sequence[str] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8:
            raise TypeError(f"GlyphDataset: images has dtype {images.dtype}; use uint8, 0 black to 255 white")
        images = images.unsqueeze(1) if images.dim() == 3 else images
        if images.dim() != 4 or images.shape[1] != 1:
            raise ValueError(
                f"GlyphDataset: images must be (n, S, S) or (n, 1, S, S), got {tuple(images.shape)}"
            )
        self.targets = as_labels(targets, "GlyphDataset: targets")
        self.classes = list(classes)
        if len(self.targets) != len(images):
            raise ValueError(f"GlyphDataset: {len(images)} images but {len(self.targets)} targets")
        if len(images) and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < len(self.classes):
            raise ValueError(
                f"GlyphDataset: targets run from {int(self.targets.min())} to {int(self.targets.max())}, but "
                f"there are {len(self.classes)} classes"
            )
        if samples is not None and len(samples) != len(images):
            raise ValueError(f"GlyphDataset: {len(images)} images but {len(samples)} sample names")
        self.images = images.contiguous()
        self.samples = None if samples is None else list(samples)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].float() / 255
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        images, labels = self.batch(indices)
        if self.transform is not None:
            return [
                (self.transform(image), label) for image, label in zip(images, labels.tolist(), strict=True)
            ]
        return list(zip(images.unbind(), labels.tolist(), strict=True))

    def batch(self, indices: Sequence[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 1, S, S) float32 in [0, 1], without the transform, and labels (n,); None takes all."""
        if indices is None:
            return self.images.float() / 255, self.targets.clone()
        places = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[places].float() / 255, self.targets[places]

    def select_classes(self, class_ids: Sequence[int] | Tensor) -> GlyphDataset:
        """Some of the classes, numbered 0, 1, ... in the order given, as a dataset of its own."""
        kept = check_class_ids(class_ids, self.targets)
        indices, targets = select_indices(self.targets, kept)
        return GlyphDataset(
            self.images[indices],
            targets,
            [self.classes[label] for label in kept.tolist()],
            samples=None if self.samples is None else [self.samples[index] for index in indices.tolist()],
            transform=self.transform,
        )


def grid_dataset(
    grid: np.ndarray,
    classes: Sequence[str],
    samples: Sequence[str],
    transform: Callable[[Tensor], Tensor] | None = None,
) -> GlyphDataset:
    """A full grid (classes, samples, S, S) as a dataset, class after class."""
    num_classes, num_samples = grid.shape[:2]
    return GlyphDataset(
        np.ascontiguousarray(grid).reshape(num_classes * num_samples, *grid.shape[2:]),
        np.repeat(np.arange(num_classes), num_samples),
        classes,
        samples=list(samples) * num_classes,
        transform=transform,
    )


def check_split(function: str, split: str) -> None:
    """Refuse a split that is not train, test or all."""
    if split not in SPLITS:
        raise ValueError(f"{function}: split must be one of {', '.join(SPLITS)}, got {split!r}")


def permuted_split(num_classes: int, split: str) -> np.ndarray:
    """Class indices of a split by the permutation of `split_classes`; "all" keeps the order."""
    if split == "all":
        return np.arange(num_classes)
    train, test = split_classes(num_classes)
    return (train if split == "train" else test).numpy()


def has_ink(grid: np.ndarray) -> np.ndarray:
    """(classes, samples, ...) uint8 -> (classes,) bool: every sample of the class shows ink."""
    return (grid.reshape(*grid.shape[:2], -1).max(axis=-1) >= INK_LEVEL).all(axis=1)


def load_glyphs(
    path: str | Path, split: str = "train", *, transform: Callable[[Tensor], Tensor] | None = None
) -> GlyphDataset:
    """Read a packed glyph array: ``omniglot_32.npz`` or a ``*_4bit.npz`` file.

    Layouts: ``x`` uint8 (samples, classes, S, S) with ``names`` and ``split`` (0 train, 1 test), as in
    ``omniglot_32.npz``; or ``q`` uint8 (classes, fonts, S, S / 2), two pixels a byte, the left one in the
    high nibble, with ``chars`` (code points) and ``fonts``. In the second layout, classes with an empty glyph
    in some font are dropped, then the rest is split by the permutation of `split_classes`, first half train.
    The name of a class of characters is the character.

    Args:
        path: the file.
        split: ``"train"``, ``"test"`` or ``"all"``.
        transform: see `GlyphDataset`.

    Raises:
        FileNotFoundError: with the ways to get the data.
        ValueError: not such a file; names the array and what is wrong with it.

    Memory: one byte per pixel of the split, and the file's arrays while it is read.
    """
    check_split("load_glyphs", split)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(_how_to_get(path))
    arrays = _read_npz(path)
    if "x" in arrays:
        return _from_images(path, arrays, split, transform)
    if "q" in arrays:
        return _from_nibbles(path, arrays, split, transform)
    raise ValueError(
        f"load_glyphs: {path} has the arrays {', '.join(sorted(arrays)) or '(none)'}; expected x, names, "
        "split (the layout of omniglot_32.npz) or q, chars, fonts (the layout of *_4bit.npz)"
    )


def _how_to_get(path: Path) -> str:
    if "omniglot" in path.name.lower():
        remedy = (
            "get images_background.zip and images_evaluation.zip from "
            "https://github.com/brendenlake/omniglot (folder python) and use gcng.data.omniglot(folder, "
            "split)"
        )
    elif "kanji" in path.name.lower():
        remedy = "build it from Debian's fonts: gcng.data.save_glyphs(gcng.data.render_kanji16(), path)"
    elif "hangul" in path.name.lower():
        remedy = "build it from Debian's fonts: gcng.data.save_glyphs(gcng.data.render_hangul16(), path)"
    else:
        remedy = "check the path; gcng.data.matplotlib_letters() is a set that needs no file"
    return f"load_glyphs: no file {path}; {remedy}"


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib, numpy and the OS each have a type of their own for a bad file
        raise ValueError(
            f"load_glyphs: cannot read {path} as .npz ({type(error).__name__}: {error}); the file is damaged "
            "or of another kind, fetch or build it again"
        ) from error


def _take(path: Path, arrays: dict[str, np.ndarray], name: str, length: int | None = None) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"load_glyphs: {path} has no array {name!r}, only {', '.join(sorted(arrays))}")
    array = arrays[name]
    if length is not None and array.shape != (length,):
        raise ValueError(f"load_glyphs: {path}: {name} has shape {array.shape}, expected ({length},)")
    return array


def _from_images(path: Path, arrays: dict[str, np.ndarray], split: str, transform: Any) -> GlyphDataset:
    x = arrays["x"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(
            f"load_glyphs: {path}: x is {x.dtype} {x.shape}; expected uint8 (samples, classes, S, S)"
        )
    names = _take(path, arrays, "names", x.shape[1])
    part = _take(path, arrays, "split", x.shape[1])
    if not np.isin(part, (0, 1)).all():
        raise ValueError(f"load_glyphs: {path}: split holds values other than 0 (train) and 1 (test)")
    chosen = np.arange(x.shape[1]) if split == "all" else np.nonzero(part == int(split == "test"))[0]
    samples = [str(sample) for sample in arrays.get("fonts", np.arange(x.shape[0]))]
    return grid_dataset(
        x[:, chosen].transpose(1, 0, 2, 3), [str(name) for name in names[chosen]], samples, transform
    )


def _from_nibbles(path: Path, arrays: dict[str, np.ndarray], split: str, transform: Any) -> GlyphDataset:
    q = arrays["q"]
    if q.dtype != np.uint8 or q.ndim != 4 or q.shape[2] != 2 * q.shape[3]:
        raise ValueError(
            f"load_glyphs: {path}: q is {q.dtype} {q.shape}; expected uint8 (classes, fonts, S, S / 2)"
        )
    chars = _take(path, arrays, "chars", q.shape[0])
    fonts = _take(path, arrays, "fonts", q.shape[1])
    inked = np.nonzero(has_ink(np.maximum(q & 0xF0, q << 4)))[0]
    chosen = inked[permuted_split(len(inked), split)] if len(inked) > 1 else inked
    return grid_dataset(
        unpack_nibbles(q[chosen]),
        [chr(char) for char in chars[chosen]],
        [str(font) for font in fonts],
        transform,
    )


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """(..., S, S / 2) bytes of two pixels each -> (..., S, S) uint8; 15 becomes 255."""
    pixels = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    pixels[..., 0::2] = (packed >> 4) * 17
    pixels[..., 1::2] = (packed & 15) * 17
    return pixels


def pack_nibbles(grid: np.ndarray) -> np.ndarray:
    """(..., S, S) uint8 -> (..., S, S / 2): grey >> 4, the left pixel in the high nibble."""
    return (grid[..., 0::2] & 0xF0) | (grid[..., 1::2] >> 4)
