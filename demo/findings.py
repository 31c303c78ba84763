"""What the pictures show, as numbers: neighbors of some queries, and the most confusable class pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcng.functional import correlation_topk, knn

QUERY_SEED = 5


@dataclass(frozen=True)
class ConfusablePair:
    """Two test classes whose mean embeddings correlate, and how often a sample's nearest neighbor is the other's."""

    first: int
    second: int
    correlation: float
    mistakes: int
    samples: int


def confusable_pairs(embeddings: Tensor, labels: Tensor, count: int, partners: int = 3) -> list[ConfusablePair]:
    """The ``count`` pairs of classes with the largest Pearson correlation (2) of their mean embeddings.

    Args:
        embeddings: (n, D). labels: (n,), 0 to C - 1.
        partners: how many partners of every class are considered.
    """
    num_classes = int(labels.max()) + 1
    means = torch.zeros(num_classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    means /= torch.bincount(labels)[:, None]
    values, indices = correlation_topk(means, min(partners, num_classes - 1))
    found: dict[tuple[int, int], float] = {}
    for first, (row, others) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        for value, second in zip(row, others, strict=True):
            found.setdefault((min(first, second), max(first, second)), value)
    nearest = labels[knn(embeddings, k=1)[1][:, 0]]
    best = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [ConfusablePair(*pair, value, *_mistakes(labels, nearest, *pair)) for pair, value in best]


def choose_queries(nearest_labels: list[Tensor], labels: Tensor, count: int) -> list[int]:
    """Half of the queries drawn from all samples, half from those whose nearest neighbor is wrong in a method.

    Args:
        nearest_labels: for each trained method the label of every sample's nearest neighbor, (n,).
    """
    generator = torch.Generator().manual_seed(QUERY_SEED)
    missed = torch.stack([nearest != labels for nearest in nearest_labels]).any(0).nonzero().flatten()
    hard = missed[torch.randperm(len(missed), generator=generator)][: count // 2].tolist()
    order = torch.randperm(len(labels), generator=generator).tolist()
    return [index for index in order if index not in hard][: count - len(hard)] + hard


def _mistakes(labels: Tensor, nearest: Tensor, first: int, second: int) -> tuple[int, int]:
    """Samples of either class whose nearest neighbor is of the other one, and samples of both classes."""
    crossed = (labels == first) & (nearest == second) | (labels == second) & (nearest == first)
    return int(crossed.sum()), int(((labels == first) | (labels == second)).sum())
