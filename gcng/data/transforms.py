"""Image transforms on Pillow images, with all randomness from torch's default generator.

Seeding torch (or the seeds that a DataLoader gives its workers, or `ResumableLoader`) fixes them. Any other
callable from a Pillow image to a tensor works in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcng.data.optional import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_ATTEMPTS = 10


def _bilinear() -> Any:
    return require("PIL.Image", install="pillow", purpose="gcng.data.transforms").Resampling.BILINEAR


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"Compose: every transform must be callable, got {type(transform).__name__}")
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.transforms))})"


class Resize:
    """Resize to ``size``: an int is the shorter side (the aspect ratio stays), a pair is (height, width).

    Bilinear with antialiasing, as Pillow does it.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = size if isinstance(size, int) else _pair("Resize", size)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"Resize: size must be at least 1, got {size}")

    def __call__(self, image: Any) -> Any:
        if not isinstance(self.size, int):
            height, width = self.size
        else:
            shorter = min(image.size)
            width, height = (max(1, side * self.size // shorter) for side in image.size)
        return image if image.size == (width, height) else image.resize((width, height), _bilinear())

    def __repr__(self) -> str:
        return f"Resize({self.size})"


class CenterCrop:
    """Cut out the middle, ``size`` = side or (height, width); what lies beyond the image becomes black."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = _pair("CenterCrop", size)

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return f"CenterCrop({self.size})"


class RandomResizedCrop:
    """Cut out a random rectangle and resize it to ``size``.

    The area is uniform in ``scale`` (shares of the image's area), the aspect ratio (width / height)
    log-uniform in ``ratio``, the place uniform. After ten rectangles that do not fit, the largest centered
    one with a ratio inside the range is taken. Four numbers are drawn per attempt.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = _pair("RandomResizedCrop", size)
        self.scale = _interval("scale", scale)
        self.ratio = _interval("ratio", ratio)
        if self.scale[1] > 1:
            raise ValueError(f"RandomResizedCrop: scale must not exceed 1, got {self.scale}")

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        return image.resize((width, height), _bilinear(), box=self.box(image.width, image.height))

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """A rectangle (left, top, right, bottom) for this size, from torch's default generator."""
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(CROP_ATTEMPTS):
            draw = torch.rand(4, dtype=torch.float64).tolist()
            area = width * height * (self.scale[0] + draw[0] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + draw[1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(draw[2] * (width - w + 1)), int(draw[3] * (height - h + 1))
                return left, top, left + w, top + h
        bounded = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * bounded)), min(height, round(width / bounded))
        w, h = max(w, 1), max(h, 1)
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __repr__(self) -> str:
        return f"RandomResizedCrop({self.size}, scale={self.scale}, ratio={self.ratio})"


class RandomHorizontalFlip:
    """Mirror left and right with probability ``p``; one number is drawn either way."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"RandomHorizontalFlip: p must be between 0 and 1, got {p}")
        self.p = p

    def __call__(self, image: Any) -> Any:
        if float(torch.rand(())) >= self.p:
            return image
        image_module = require("PIL.Image", install="pillow", purpose="gcng.data.transforms")
        return image.transpose(image_module.Transpose.FLIP_LEFT_RIGHT)

    def __repr__(self) -> str:
        return f"RandomHorizontalFlip(p={self.p})"


class ToTensor:
    """A Pillow image, or an (H, W) or (H, W, C) uint8 array, to a (C, H, W) float32 tensor in [0, 1]."""

    def __call__(self, image: Any) -> Tensor:
        array = np.array(image, copy=True)
        if array.dtype == np.bool_:
            array = array.astype(np.uint8) * 255
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise TypeError(
                f"ToTensor: image must have 8 bits per channel, (H, W) or (H, W, C), got {array.dtype} "
                f"{array.shape}; convert it first, e.g. image.convert('RGB')"
            )
        array = array[:, :, None] if array.ndim == 2 else array
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 255

    def __repr__(self) -> str:
        return "ToTensor()"


class Normalize:
    """(C, H, W) float tensor -> (x - mean) / std per channel."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        if len(mean) != len(std) or not mean:
            raise ValueError(
                f"Normalize: mean has {len(mean)} channels and std {len(std)}; give one of each per channel"
            )
        if min(std) <= 0:
            raise ValueError(f"Normalize: std must be positive, got {tuple(std)}")
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, image: Tensor) -> Tensor:
        if image.dim() != 3 or image.shape[0] != len(self.mean):
            raise ValueError(
                f"Normalize: image must be ({len(self.mean)}, H, W), got {tuple(image.shape)}; load images "
                "with as many channels as mean has (mode='RGB' for 3)"
            )
        mean = torch.tensor(self.mean, dtype=image.dtype).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=image.dtype).view(-1, 1, 1)
        return (image - mean) / std

    def __repr__(self) -> str:
        return f"Normalize({self.mean}, {self.std})"


def training_transform(size: int = 224, *, scale: tuple[float, float] = (0.08, 1.0)) -> Compose:
    """The training pipeline of the published recipes: random resized crop, flip, ImageNet statistics.

    Args:
        size: side of the crop.
        scale: ``TRAIN.SCALE`` of the recipe, the range of the crop's area.
    """
    return Compose([RandomResizedCrop(size, scale), RandomHorizontalFlip(), ToTensor(), Normalize()])


def evaluation_transform(size: int = 224, *, resize: int = 256) -> Compose:
    """The test pipeline of the published recipes: shorter side to 256, center crop, ImageNet statistics."""
    return Compose([Resize(resize), CenterCrop(size), ToTensor(), Normalize()])


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(f"{name}: size must be a side or (height, width), each at least 1, got {size!r}")
    return pair[0], pair[1]


def _interval(name: str, interval: Sequence[float]) -> tuple[float, float]:
    if len(interval) != 2 or not 0 < interval[0] <= interval[1]:
        raise ValueError(
            f"RandomResizedCrop: {name} must be (low, high) with 0 < low <= high, got {interval!r}"
        )
    return float(interval[0]), float(interval[1])
