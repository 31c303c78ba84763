"""The class structure of a batch, known on the host before anything reaches a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BatchLayout:
    """Labels of a batch, kept on the CPU together with what follows from them.

    Ops that depend on the number of classes read it from here instead of waiting for a GPU. A sampler that knows the
    labels makes one for free.

    Args:
        labels: (N,) class indices in batch order: a sequence of integers or an integer tensor on the CPU.

    Attributes:
        labels: (N,) int64 tensor on the CPU. counts: samples of each class, classes by first appearance.

    Raises:
        ValueError: labels on another device (that would be the wait it is there to spare), or not a vector.
        TypeError: labels that are not integers.

    Example:
        >>> layout = gcng.BatchLayout([3, 3, 7, 7])
        >>> layout.num_classes, layout.samples_per_class
        (2, 2)
    """

    def __init__(self, labels: Sequence[int] | Tensor) -> None:
        import torch

        values = torch.as_tensor(labels)
        if values.device.type != "cpu":
            raise ValueError(f"BatchLayout: labels is on {values.device}; expected labels that are still on the CPU")
        if values.dim() != 1:
            raise ValueError(f"BatchLayout: labels has shape {tuple(values.shape)}; expected (N,)")
        if values.numel() and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
            raise TypeError(f"BatchLayout: labels has dtype {values.dtype}; use an integer dtype")
        with torch.inference_mode(False):  # what is kept here serves evaluation and training
            self.labels = values.long().clone()
        counts: dict[int, int] = {}
        for label in self.labels.tolist():
            counts[label] = counts.get(label, 0) + 1
        self.counts = tuple(counts.values())
        self.on_device: dict[torch.device, Any] = {}  # what the ops have made of it, for each device

    @property
    def num_samples(self) -> int:
        """N."""
        return self.labels.shape[0]

    @property
    def num_classes(self) -> int:
        """M, classes in the batch."""
        return len(self.counts)

    @property
    def samples_per_class(self) -> int:
        """K, the largest number of samples of a class."""
        return max(self.counts, default=0)

    def __repr__(self) -> str:
        return f"BatchLayout(num_samples={self.num_samples}, num_classes={self.num_classes})"
