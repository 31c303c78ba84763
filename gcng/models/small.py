"""Small extractors: a convolutional network for glyphs, a linear map, and a table of free embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

GRID = 4  # side of the feature map that the head sees


class SmallConvNet(nn.Module):
    """Three 3x3 convolutions, each with batch norm, ReLU and 2x2 max-pooling, and a linear head.

    The head sees a 4 x 4 map, so that where a stroke lies still counts: 32 x 32 inputs reach it as they are,
    other sizes through adaptive average pooling. 172,768 parameters with the default channels,
    ``embedding_size=64`` and one input channel.

    Args:
        embedding_size: D.
        in_channels: channels of the input, 1 for gray images.
        channels: output channels of the three convolutions.

    Shape: (N, in_channels, H, W), float, H and W at least 8 -> (N, D).

    Attributes:
        backbone: all but the last layer.
        head: ``nn.Linear`` to the embedding.

    Example:
        >>> SmallConvNet(64)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self, embedding_size: int, in_channels: int = 1, channels: Sequence[int] = (32, 64, 96)
    ) -> None:
        super().__init__()
        _check_sizes("SmallConvNet", embedding_size=embedding_size, in_channels=in_channels)
        if len(channels) != 3:
            raise ValueError(f"SmallConvNet: channels must hold 3 numbers, got {tuple(channels)}")
        layers: list[nn.Module] = []
        width = in_channels
        for out in channels:
            layers += [
                # Without bias: batch norm would take it away.
                nn.Conv2d(width, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
            width = out
        self.in_channels = in_channels
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(width * GRID * GRID, embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 8:
            raise ValueError(
                f"SmallConvNet: images must be (N, {self.in_channels}, H, W) with H and W at least 8, got "
                f"{tuple(images.shape)}"
            )
        features = self.backbone(images)
        if features.shape[2:] != (GRID, GRID):
            features = functional.adaptive_avg_pool2d(features, GRID)
        return self.head(features.flatten(1))


class LinearExtractor(nn.Module):
    """Flattens each input and maps it linearly: for vectors, and as the smallest baseline.

    Shape: (N, ...) with ``in_features`` numbers per sample -> (N, D).
    """

    def __init__(self, embedding_size: int, in_features: int, *, bias: bool = True) -> None:
        super().__init__()
        _check_sizes("LinearExtractor", embedding_size=embedding_size, in_features=in_features)
        self.head = nn.Linear(in_features, embedding_size, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        if flat.shape[1] != self.head.in_features:
            raise ValueError(
                f"LinearExtractor: inputs have {flat.shape[1]} numbers per sample (shape "
                f"{tuple(inputs.shape)}), expected {self.head.in_features}"
            )
        return self.head(flat)


class EmbeddingTable(nn.Module):
    """One free embedding per sample: what a loss does to points without any network between.

    Shape: int64 indices (N,) -> (N, D).
    """

    def __init__(self, embedding_size: int, num_samples: int, *, scale: float = 1.0) -> None:
        super().__init__()
        _check_sizes("EmbeddingTable", embedding_size=embedding_size, num_samples=num_samples)
        self.table = nn.Embedding(num_samples, embedding_size)
        with torch.no_grad():
            self.table.weight.mul_(scale)

    def forward(self, indices: Tensor) -> Tensor:
        if indices.dim() != 1 or indices.is_floating_point():
            raise ValueError(
                f"EmbeddingTable: indices must be integers of shape (N,), got {indices.dtype} "
                f"{tuple(indices.shape)}"
            )
        return self.table(indices)


def _check_sizes(name: str, **sizes: int) -> None:
    for argument, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {argument} must be an integer of at least 1, got {value!r}")
