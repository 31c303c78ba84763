"""Augmentation of glyph batches: what it does, and randomness from the generator given."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from gcng.data import GlyphAugmentation

STILL = {"degrees": 0, "shear": 0, "scale": 0, "shift": 0, "blur": 0, "noise": 0}


def spot(side: int = 33, row: int = 16, column: int = 16, count: int = 64) -> torch.Tensor:
    """Images with one bright square of 3 x 3."""
    images = torch.zeros(count, 1, side, side)
    images[:, :, row - 1 : row + 2, column - 1 : column + 2] = 1
    return images


def centers(images: torch.Tensor) -> torch.Tensor:
    """(N, 2) centers of mass, row and column."""
    places = torch.arange(images.shape[-1], dtype=images.dtype)
    mass = images.sum((1, 2, 3))
    return torch.stack(
        [(images.sum((1, 3)) * places).sum(1) / mass, (images.sum((1, 2)) * places).sum(1) / mass], 1
    )


def test_without_strength_nothing_changes() -> None:
    images = torch.rand(5, 2, 9, 12)
    assert torch.allclose(GlyphAugmentation(**STILL)(images), images, atol=1e-5)


def test_the_default_changes_every_image_and_stays_in_range() -> None:
    images = spot()
    before = images.clone()
    out = GlyphAugmentation()(images)
    assert torch.equal(images, before)
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    assert 0 <= out.min() <= out.max() <= 1
    assert (out != images).flatten(1).any(1).all()
    assert len(out.flatten(1).unique(dim=0)) == len(out)


def test_the_generator_fixes_the_batch() -> None:
    images, augment = spot(), GlyphAugmentation()
    first = augment(images, Generator().manual_seed(3))
    before = torch.get_rng_state()
    assert torch.equal(augment(images, generator=Generator().manual_seed(3)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(augment(images, Generator().manual_seed(4)), first)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)


def test_the_shift_moves_up_to_its_share_of_the_side() -> None:
    moved = centers(GlyphAugmentation(**STILL | {"shift": 0.1})(spot(count=400))) - 16
    assert moved.abs().max() <= 3.3 + 1e-3
    assert moved.abs().max(0).values.min() > 3.0
    assert moved.mean(0).abs().max() < 4 * 1.9 / 20


def test_the_rotation_keeps_the_distance_from_the_middle() -> None:
    moved = centers(GlyphAugmentation(**STILL | {"degrees": 45})(spot(column=26, count=200))) - 16
    assert torch.allclose(moved.norm(dim=1), torch.full((200,), 10.0), atol=0.15)
    angle = torch.rad2deg(torch.atan2(moved[:, 0], moved[:, 1]))
    assert angle.abs().max() <= 46
    assert angle.min() < -40
    assert angle.max() > 40


def test_the_scale_moves_along_the_axes() -> None:
    moved = centers(GlyphAugmentation(**STILL | {"scale": 0.2})(spot(row=26, column=26, count=200))) - 16
    assert moved.min() > 10 / 1.2 - 0.4
    assert moved.max() < 10 / 0.8 + 0.4
    assert moved.std(0).min() > 0.5
    assert (moved[:, 0] - moved[:, 1]).abs().max() > 1  # drawn apart for both axes


def test_the_shear_slants() -> None:
    moved = centers(GlyphAugmentation(**STILL | {"shear": 0.3})(spot(row=26, count=200))) - 16
    assert torch.allclose(moved[:, 0], torch.full((200,), 10.0), atol=0.3)
    assert 2.5 < moved[:, 1].abs().max() <= 3.3


def test_blur_keeps_the_mass_and_lowers_the_peak() -> None:
    images = spot()
    out = GlyphAugmentation(**STILL | {"blur": 1.0})(images)
    assert torch.allclose(out.sum((1, 2, 3)), images.sum((1, 2, 3)), atol=1e-3)
    assert out[:, 0, 16, 15].max() < 1
    assert out[:, 0, 16, 18].max() > 0.2


def test_noise_has_up_to_its_level() -> None:
    images = torch.full((300, 1, 16, 16), 0.5)
    levels = GlyphAugmentation(**STILL | {"noise": 0.1})(images).flatten(1).std(1)
    assert levels.max() < 0.115
    assert levels.max() > 0.09
    assert levels.min() < 0.01


def test_bfloat16_and_float64_batches_keep_their_type() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert GlyphAugmentation()(spot(count=2).to(dtype)).dtype == dtype


def test_an_empty_batch_stays_empty() -> None:
    assert GlyphAugmentation()(torch.zeros(0, 1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, "noise must be finite and not negative, got -0.1"),
        ({"degrees": float("nan")}, "degrees must be finite and not negative, got nan"),
        ({"scale": 1.0}, "scale must be below 1 and blur at most 1, got 1.0"),
        ({"blur": 1.5}, "scale must be below 1 and blur at most 1"),
    ],
)
def test_bad_strengths_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlyphAugmentation(**options)


@pytest.mark.parametrize("images", [torch.zeros(1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_other_batches_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\) floats in \[0, 1\], got"):
        GlyphAugmentation()(images)
