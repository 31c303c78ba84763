"""Augmentation of whole batches of glyphs: random affine map, blur and noise on tensors."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional


class GlyphAugmentation:
    """Random affine map, blur and noise for a batch of gray images.

    Per image: a rotation, shear, two scales and a shift, all uniform; a 3 x 3 binomial blur mixed in with a
    uniform weight; Gaussian noise of a uniform level. All random numbers are drawn on the CPU, and their
    number depends on the batch's shape only, so a seed gives the same batch on every device up to rounding.
    The default strengths were chosen on 200 of the train classes of the matplotlib letters.

    Args:
        degrees: largest rotation, in degrees.
        shear: largest shear (tangent).
        scale: largest change of scale, as a share.
        shift: largest shift, as a share of the side.
        blur: largest weight of the blurred image, in [0, 1].
        noise: largest standard deviation of the noise, in units of the white level.

    Example:
        >>> augment = GlyphAugmentation()
        >>> augment(torch.rand(8, 1, 32, 32), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([8, 1, 32, 32])
    """

    def __init__(
        self,
        *,
        degrees: float = 15.0,
        shear: float = 0.25,
        scale: float = 0.2,
        shift: float = 0.08,
        blur: float = 0.7,
        noise: float = 0.1,
    ) -> None:
        settings = {
            "degrees": degrees,
            "shear": shear,
            "scale": scale,
            "shift": shift,
            "blur": blur,
            "noise": noise,
        }
        for name, value in settings.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"GlyphAugmentation: {name} must be finite and not negative, got {value}")
        if scale >= 1 or blur > 1:
            raise ValueError(
                f"GlyphAugmentation: scale must be below 1 and blur at most 1, got {scale} and {blur}"
            )
        self.degrees, self.shear, self.scale = degrees, shear, scale
        self.shift, self.blur, self.noise = shift, blur, noise

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Augment (N, C, H, W) float images in [0, 1]; returns new ones, clamped to [0, 1].

        Args:
            images: the batch; not changed.
            generator: CPU generator; None is torch's default generator.
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                f"GlyphAugmentation: images must be (N, C, H, W) floats in [0, 1], got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if images.numel() == 0:
            return images.clone()
        draws = torch.rand(len(images), 8, generator=generator).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        grid = functional.affine_grid(self._maps(draws), list(images.shape), align_corners=False)
        moved = functional.grid_sample(
            images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weight = (draws[:, 6] * self.blur).view(-1, 1, 1, 1)
        moved = torch.lerp(moved, _blurred(moved), weight)
        level = (draws[:, 7] * self.noise).view(-1, 1, 1, 1)
        return (moved + level * noise).clamp_(0, 1)

    def _maps(self, draws: Tensor) -> Tensor:
        """(N, 8) uniform draws -> (N, 2, 3) maps from output to input places."""
        angle, shear, scale_x, scale_y, shift_x, shift_y = (2 * draws[:, :6] - 1).unbind(1)
        angle = angle * math.radians(self.degrees)
        cos, sin = angle.cos(), angle.sin()
        shear = shear * self.shear
        wide, tall = 1 + scale_x * self.scale, 1 + scale_y * self.scale
        # Rotation times shear times scale. Places run from -1 to 1, so a share of the side counts twice.
        first = torch.stack([wide * cos, tall * (shear * cos - sin), 2 * self.shift * shift_x], 1)
        second = torch.stack([wide * sin, tall * (shear * sin + cos), 2 * self.shift * shift_y], 1)
        return torch.stack([first, second], 1)


def _blurred(images: Tensor) -> Tensor:
    """3 x 3 binomial blur of every channel."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    channels = images.shape[1]
    kernel = (line[:, None] * line[None, :]).expand(channels, 1, 3, 3)
    return functional.conv2d(images, kernel, padding=1, groups=channels)
