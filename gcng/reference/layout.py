"""Definition of the class structure of a batch (docs/maths.md 9b): classes, ranks, anchors, positives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassLayout(NamedTuple):
    """Class structure of a batch in batch order; all int64 on the labels' device."""

    class_index: Tensor  # (N,) class of each sample, classes numbered by first appearance
    rank: Tensor  # (N,) rank of each sample in its class, by order of appearance
    members: list[Tensor]  # M vectors: the samples of each class by rank
    class_labels: Tensor  # (M,) the label of each class
    positive: Tensor  # (N,) rank (k + 1) mod K_i of the same class; a singleton points at itself
    is_anchor: Tensor  # (N,) bool: classes with at least two samples


def class_layout(labels: Tensor) -> ClassLayout:
    """Work out classes and ranks from labels in any order, (N,) -> :class:`ClassLayout`."""
    seen: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        seen.setdefault(label, []).append(position)
    n, device = labels.shape[0], labels.device
    class_index, rank, positive = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(3))
    is_anchor = torch.zeros(n, dtype=torch.bool, device=device)
    members = []
    for index, positions in enumerate(seen.values()):
        here = torch.tensor(positions, device=device)
        members.append(here)
        class_index[here] = index
        rank[here] = torch.arange(len(positions), device=device)
        positive[here] = here.roll(-1)
        is_anchor[here] = len(positions) > 1
    return ClassLayout(
        class_index, rank, members, torch.tensor(list(seen), device=device, dtype=torch.int64), positive, is_anchor
    )
