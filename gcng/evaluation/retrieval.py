"""Retrieval metrics on exact nearest neighbors, as docs/evaluation.md defines them.

Owns which queries count, how many neighbors they need, and the means. Neighbors come from ``knn``; no matrix
of queries x references exists, and no more neighbor lists at once than the memory budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcng.memory import MIB, parse_bytes
from gcng.ops.blocks import labels_beside, spans
from gcng.ops.retrieval import check_pair_of_matrices, nearest_neighbors
from gcng.ops.validation import check_labels

DEFAULT_BUDGET = 256 * MIB
# A neighbor costs its cosine and index, the same again while lists are merged and sorted, and the hit
# statistics.
BYTES_PER_NEIGHBOR = 80
MOST_QUERIES = 4096  # at once: the block's embeddings are copied


def _check_ranks(k: Sequence[int]) -> tuple[int, ...]:
    ranks = tuple(k) if isinstance(k, Sequence) and not isinstance(k, str) else (k,)
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"evaluate_retrieval: k must be whole numbers such as (1, 2, 4, 8), got {rank!r}")
        if rank < 1:
            raise ValueError(f"evaluate_retrieval: k contains {rank}; every rank must be at least 1")
    if not ranks:
        raise ValueError("evaluate_retrieval: k is empty; give at least one rank, e.g. (1,)")
    return ranks


def _check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinity, without a copy: a ranking with them would look like a result."""
    for rows in spans(x.shape[0], 4096):
        smallest, largest = x[rows].aminmax()  # NaN if there is one
        if not bool(smallest.isfinite() & largest.isfinite()):
            first = rows.start + int(x[rows].isfinite().all(-1).logical_not().nonzero()[0])
            raise ValueError(
                f"evaluate_retrieval: {name} has a NaN or an infinity in row {first}; check the "
                "embeddings, e.g. for a diverged training"
            )


def _relevant_counts(query_labels: Tensor, reference_labels: Tensor, self_excluded: bool) -> Tensor:
    """R of every query: the references of its class, itself left out, (Q,)."""
    in_order = reference_labels.sort().values
    first = torch.searchsorted(in_order, query_labels)
    return torch.searchsorted(in_order, query_labels, right=True) - first - int(self_excluded)


def _metric_names(ranks: Sequence[int]) -> list[str]:
    recalls = [f"recall_at_{rank}" for rank in ranks]
    return [*recalls, "r_precision", "mean_average_precision_at_r", "precision_at_1"]


def _per_query(hits: Tensor, relevant: Tensor, ranks: Sequence[int]) -> Tensor:
    """Metrics of every query (Q, metrics) from hits (Q, k) by rank and R (Q,); k covers every R."""
    position = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    within = hits & (position <= relevant[:, None])
    found = within.cumsum(1)
    precision = torch.where(within, found.double() / position, 0.0).sum(1)
    recalls = [hits[:, :rank].any(1).double() for rank in ranks]
    return torch.stack([*recalls, found[:, -1].double() / relevant, precision / relevant, hits[:, 0].double()], dim=1)


def evaluate_retrieval(
    query: Tensor,
    query_labels: Tensor,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    k: Sequence[int] = (1, 2, 4, 8),
    memory_budget: int | str | None = None,
) -> dict[str, float]:
    """Recall@K, R-precision, mAP@R and precision@1 by cosine, over the queries that have anything to find.

    Args:
        query: (N, D) embeddings, any float dtype; need not be normalized.
        query_labels: (N,) any integer dtype.
        reference: (R, D) gallery, same dtype and device. None searches the queries among themselves, each one
            without itself; an equal embedding of another sample stays a valid hit or a valid mistake.
        reference_labels: (R,), given exactly when ``reference`` is.
        k: ranks of Recall@K.
        memory_budget: bytes or a size such as ``"1GiB"`` for neighbor lists, 256 MiB by default. It changes
            memory and never a result.

    Returns:
        ``recall_at_{k}`` for every k, ``r_precision``, ``mean_average_precision_at_r``, ``precision_at_1`` in
        [0, 1] (NaN where no query counts), ``num_queries`` (all of them) and ``num_lone_queries`` (those
        without a reference of their class, which are left out of every mean).

    Raises:
        ValueError: wrong shapes, NaN or infinity (the row is named). TypeError: wrong or mixed dtypes.

    Example:
        >>> scores = evaluate_retrieval(torch.eye(4).repeat(2, 1), torch.arange(8) % 4, k=(1,))
        >>> scores["recall_at_1"]
        1.0
    """
    op, ranks = "evaluate_retrieval", _check_ranks(k)
    budget = DEFAULT_BUDGET if memory_budget is None else parse_bytes(memory_budget)
    if (reference is None) != (reference_labels is None):
        missing, given = ("reference", "reference_labels") if reference is None else ("reference_labels", "reference")
        raise ValueError(f"{op}: {given} is given but {missing} is missing; give both or neither")
    self_excluded = reference is None
    gallery = query if reference is None else reference
    check_pair_of_matrices(op, ("query", "reference"), query, gallery)
    check_labels(op, query_labels, query.shape[0], name="query_labels", of="query")
    query_labels = labels_beside(op, query_labels, query.device, name="query_labels").long()
    gallery_labels = query_labels
    if reference is not None:
        check_labels(op, reference_labels, gallery.shape[0], name="reference_labels", of="reference")
        gallery_labels = labels_beside(op, reference_labels, query.device, name="reference_labels").long()
        _check_finite("reference", gallery)
    _check_finite("query", query)
    values = _all_queries(query, query_labels, gallery, gallery_labels, self_excluded, ranks, budget)
    counted = values.shape[0]
    means = values.mean(0).tolist() if counted else [math.nan] * values.shape[1]
    counts = {"num_queries": query.shape[0], "num_lone_queries": query.shape[0] - counted}
    return dict(zip(_metric_names(ranks), means, strict=True)) | counts


def _all_queries(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    self_excluded: bool,
    ranks: Sequence[int],
    budget: int,
) -> Tensor:
    """Metrics of every query that counts, (queries, metrics) float64, in an order that no budget changes."""
    relevant = _relevant_counts(query_labels, gallery_labels, self_excluded)
    # Queries with similar R share a block, so that one large class does not lengthen every neighbor list.
    order = relevant.argsort(stable=True)
    order = order[relevant[order] > 0]
    blocks = [torch.empty((0, len(_metric_names(ranks))), dtype=torch.float64, device=query.device)]
    start = 0
    while start < len(order):
        rows = order[start : start + _block_size(relevant, order, start, ranks, budget, query.shape[1])]
        neighbors = min(max(*ranks, int(relevant[rows[-1]])), gallery.shape[0])
        indices = nearest_neighbors(query[rows], gallery, neighbors, rows if self_excluded else None)[1]
        hits = (gallery_labels[indices.clamp(min=0)] == query_labels[rows, None]) & (indices >= 0)
        blocks.append(_per_query(hits, relevant[rows], ranks))
        start += len(rows)
    return torch.cat(blocks)


def _block_size(relevant: Tensor, order: Tensor, start: int, ranks: Sequence[int], budget: int, width: int) -> int:
    """How many queries from ``start`` on fit the budget; R rises along ``order``, so the last one decides.

    A query needs its list of neighbors and the copy of its ``width`` channels, in up to 8 bytes each.
    """
    size = min(len(order) - start, MOST_QUERIES)
    while size > 1:
        neighbors = max(*ranks, int(relevant[order[start + size - 1]]))
        fitting = max(1, budget // (neighbors * BYTES_PER_NEIGHBOR + 8 * width))
        if fitting >= size:
            break
        size = max(fitting, size // 2)
    return size


class RetrievalMetrics:
    """Collects embeddings batch by batch, then evaluates them as :func:`evaluate_retrieval` does.

    Args:
        k: ranks of Recall@K. memory_budget: as in :func:`evaluate_retrieval`.

    Memory: all embeddings, on the CPU.

    Example:
        >>> metrics = RetrievalMetrics(k=(1,))
        >>> for batch in (torch.eye(4), torch.eye(4)):
        ...     metrics.update(batch, torch.arange(4))
        >>> metrics.compute()["recall_at_1"]
        1.0
    """

    def __init__(self, k: Sequence[int] = (1, 2, 4, 8), *, memory_budget: int | str | None = None) -> None:
        self.k = _check_ranks(k)
        self.memory_budget = memory_budget
        if memory_budget is not None:
            parse_bytes(memory_budget)
        self._embeddings: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch: embeddings (N, D) and labels (N,); both are copied to the CPU, without a gradient."""
        check_pair_of_matrices("RetrievalMetrics", ("embeddings", "embeddings"), embeddings, embeddings)
        check_labels("RetrievalMetrics", labels, embeddings.shape[0])
        if self._embeddings:
            check_pair_of_matrices(
                "RetrievalMetrics", ("the first batch", "embeddings"), self._embeddings[0], embeddings.cpu()
            )
        self._embeddings.append(embeddings.detach().cpu().clone())
        self._labels.append(labels.detach().cpu().long().clone())

    def reset(self) -> None:
        """Forget every batch."""
        self._embeddings.clear()
        self._labels.clear()

    def compute(self, reference: Tensor | None = None, reference_labels: Tensor | None = None) -> dict[str, float]:
        """Evaluate all batches so far as queries, among themselves or against a gallery.

        Raises:
            RuntimeError: no batch was added.
        """
        if not self._embeddings:
            raise RuntimeError("RetrievalMetrics: nothing to evaluate; call update(embeddings, labels) first")
        return evaluate_retrieval(
            torch.cat(self._embeddings),
            torch.cat(self._labels),
            None if reference is None else reference.detach().cpu(),
            reference_labels,
            k=self.k,
            memory_budget=self.memory_budget,
        )
