"""Definition of exact nearest neighbors and of the retrieval metrics, dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def first_k(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, (Q, R) -> values, indices (Q, k); ties by lower index, missing -inf, -1."""
    values, indices = similarity.sort(dim=-1, descending=True, stable=True)
    missing = max(k - similarity.shape[1], 0)
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-math.inf)
    indices = torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1)
    return values, indices.masked_fill(values == -math.inf, -1)


def knn(query: Tensor, reference: Tensor, k: int, *, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Cosine of all pairs, then the k best; with ``exclude_self`` row i of both is the same sample."""
    similarity = torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(reference, dim=-1).T
    if exclude_self:
        similarity = similarity.clone().fill_diagonal_(-math.inf)
    return first_k(similarity.detach(), k)


def retrieval_metrics(
    query: Tensor,
    query_labels: Tensor,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    k: tuple[int, ...] = (1, 2, 4, 8),
) -> dict[str, float]:
    """The definitions of docs/evaluation.md, one query at a time."""
    exclude_self = reference is None
    reference = query if reference is None else reference
    reference_labels = query_labels if reference_labels is None else reference_labels
    _, indices = knn(query, reference, reference.shape[0], exclude_self=exclude_self)
    names = [f"recall_at_{rank}" for rank in k] + [
        "r_precision",
        "mean_average_precision_at_r",
        "precision_at_1",
    ]
    sums, counted = dict.fromkeys(names, 0.0), 0
    for row, label in enumerate(query_labels.tolist()):
        hits = (reference_labels[indices[row][indices[row] >= 0]] == label).tolist()
        relevant = sum(hits)
        if relevant == 0:
            continue
        counted += 1
        for rank in k:
            sums[f"recall_at_{rank}"] += any(hits[:rank])
        sums["precision_at_1"] += hits[0]
        sums["r_precision"] += sum(hits[:relevant]) / relevant
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(relevant) if hits[i]]
        sums["mean_average_precision_at_r"] += sum(precisions) / relevant
    means = {name: total / counted if counted else math.nan for name, total in sums.items()}
    return means | {"num_queries": query.shape[0], "num_lone_queries": query.shape[0] - counted}
