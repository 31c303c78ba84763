"""The Pillow transforms: sizes, values, distributions, and randomness from torch's default generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcng.data import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
    evaluation_transform,
    training_transform,
)

image_module = pytest.importorskip("PIL.Image", reason="the transforms work on Pillow images")


def gradient(width: int, height: int):
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return image_module.fromarray(pixels)


def test_to_tensor_keeps_the_values() -> None:
    image = gradient(5, 3)
    tensor = ToTensor()(image)
    assert (tensor.shape, tensor.dtype) == ((3, 3, 5), torch.float32)
    assert torch.equal(tensor[0] * 255, torch.arange(5.0).expand(3, 5))
    assert torch.equal(tensor[1] * 255, torch.arange(3.0)[:, None].expand(3, 5))
    assert ToTensor()(np.full((2, 2), 255, np.uint8)).tolist() == [[[1.0, 1.0], [1.0, 1.0]]]
    assert ToTensor()(image_module.new("1", (2, 1), 1)).tolist() == [[[1.0, 1.0]]]
    with pytest.raises(TypeError, match=r"8 bits per channel, .* got float64 \(2, 2\); convert it first"):
        ToTensor()(np.zeros((2, 2)))


def test_normalize_is_per_channel() -> None:
    image = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 2, 2)
    out = Normalize((1.0, 1.0, 1.0), (1.0, 2.0, 4.0))(image)
    assert out[:, 0, 0].tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"image must be \(3, H, W\), got \(1, 2, 2\); .*mode='RGB'"):
        Normalize()(image[:1])
    with pytest.raises(ValueError, match="mean has 3 channels and std 2"):
        Normalize((1.0, 1.0, 1.0), (1.0, 2.0))
    with pytest.raises(ValueError, match="std must be positive"):
        Normalize((1.0,), (0.0,))


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [
        (256, (512, 384), (341, 256)),
        (256, (100, 300), (256, 768)),
        ((10, 20), (7, 7), (20, 10)),
        (8, (8, 9), (8, 9)),
    ],
)
def test_resize(size, before: tuple[int, int], after: tuple[int, int]) -> None:
    assert (
        Resize(size)(gradient(*before) if max(before) < 256 else image_module.new("RGB", before)).size
        == after
    )


def test_center_crop_takes_the_middle_and_pads_with_black() -> None:
    crop = np.asarray(CenterCrop((2, 4))(gradient(10, 8)))
    assert crop[0, :, 0].tolist() == [3, 4, 5, 6]
    assert crop[:, 0, 1].tolist() == [3, 4]
    padded = np.asarray(CenterCrop(4)(image_module.new("L", (2, 2), 255)))
    assert padded.tolist() == [[0, 0, 0, 0], [0, 255, 255, 0], [0, 255, 255, 0], [0, 0, 0, 0]]


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_random_boxes_lie_inside_the_image(width: int, height: int, seed: int) -> None:
    torch.manual_seed(seed)
    left, top, right, bottom = RandomResizedCrop(8).box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_boxes_have_the_asked_areas_ratios_and_places() -> None:
    crop = RandomResizedCrop(8, scale=(0.1, 0.3), ratio=(0.5, 2.0))
    boxes = torch.tensor([crop.box(1000, 1000) for _ in range(4000)], dtype=torch.float64)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 1e6, torch.log(width / height)
    assert 0.0985 < area.min() < 0.102
    assert 0.298 < area.max() < 0.3015
    assert area.mean() == pytest.approx(0.2, abs=4 * 0.0577 / math.sqrt(4000))
    assert ratio.abs().max() < math.log(2) + 0.01
    assert ratio.mean() == pytest.approx(0.0, abs=4 * 0.4 / math.sqrt(4000))
    assert ratio.std() == pytest.approx(2 * math.log(2) / math.sqrt(12), rel=0.05)
    place = boxes[:, 0] / (1000 - width)
    assert place.mean() == pytest.approx(0.5, abs=4 * 0.289 / math.sqrt(4000))
    assert place.min() < 0.01
    assert place.max() > 0.99


def test_an_image_of_an_extreme_ratio_is_cropped_in_the_middle() -> None:
    crop = RandomResizedCrop(8, scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    assert crop.box(1000, 10) == (493, 0, 506, 10)
    assert crop.box(10, 1000) == (0, 493, 10, 506)


def test_a_crop_of_everything_is_a_resize() -> None:
    image = gradient(40, 40)
    cropped = RandomResizedCrop(20, scale=(1.0, 1.0), ratio=(1.0, 1.0))(image)
    assert np.array_equal(np.asarray(cropped), np.asarray(Resize(20)(image)))
    assert RandomResizedCrop((5, 9))(image).size == (9, 5)


def test_the_flip_mirrors_half_of_the_images() -> None:
    image = gradient(3, 1)
    assert np.asarray(RandomHorizontalFlip(1.0)(image))[0, :, 0].tolist() == [2, 1, 0]
    assert RandomHorizontalFlip(0.0)(image) is image
    flipped = sum(np.asarray(RandomHorizontalFlip()(image))[0, 0, 0] == 2 for _ in range(400))
    assert 150 < flipped < 250


def test_the_published_pipelines() -> None:
    training, evaluation = training_transform(scale=(0.2, 1.0)), evaluation_transform()
    assert repr(training).startswith(
        "Compose(RandomResizedCrop((224, 224), scale=(0.2, 1.0), ratio=(0.75, 1.33"
    )
    assert "RandomHorizontalFlip(p=0.5), ToTensor(), Normalize((0.485, 0.456, 0.406)" in repr(training)
    assert repr(evaluation).startswith("Compose(Resize(256), CenterCrop((224, 224)), ToTensor(), Normalize(")
    image = image_module.new("RGB", (300, 260), (255, 128, 0))
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    for transform in (training, evaluation):
        out = transform(image)
        assert out.shape == (3, 224, 224)
        assert torch.allclose(out, expected.view(3, 1, 1).expand_as(out), atol=1e-6)


def test_randomness_comes_from_torch_only() -> None:
    transform, image = training_transform(16), gradient(200, 150)
    torch.manual_seed(5)
    first = [transform(image) for _ in range(3)]
    np.random.seed(1)
    torch.manual_seed(5)
    again = [transform(image) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Resize(0), ValueError, "Resize: size must be at least 1, got 0"),
        (
            lambda: Resize((4, 0)),
            ValueError,
            r"Resize: size must be a side or \(height, width\), .* got \(4, 0\)",
        ),
        (lambda: CenterCrop((1, 2, 3)), ValueError, "CenterCrop: size must be a side or"),
        (lambda: RandomResizedCrop(4, scale=(0.5, 1.5)), ValueError, "scale must not exceed 1, got"),
        (
            lambda: RandomResizedCrop(4, scale=(0.0, 1.0)),
            ValueError,
            "scale must be .low, high. with 0 < low <= high",
        ),
        (
            lambda: RandomResizedCrop(4, ratio=(2.0, 1.0)),
            ValueError,
            "ratio must be .low, high. with 0 < low <= high",
        ),
        (lambda: RandomHorizontalFlip(1.5), ValueError, "p must be between 0 and 1, got 1.5"),
        (lambda: Compose([ToTensor(), 3]), TypeError, "every transform must be callable, got int"),
    ],
)
def test_bad_settings_are_refused(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
