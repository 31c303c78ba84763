"""What the row-blocked ops share: spans of a long axis, and labels that may wait on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gcng.ops.transfers import sent


def spans(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` that cover ``length``; the last one may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def labels_beside(op: str, labels: Tensor, device: torch.device, *, name: str = "labels") -> Tensor:
    """Labels on the device of their samples: they may come from the CPU, any other device is a mistake."""
    if labels.device != device and labels.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} is on {labels.device} but its samples are on {device}; "
            f"move it with {name}.to({str(device)!r})"
        )
    return sent(labels, device)
