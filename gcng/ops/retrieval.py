"""Op of the evaluation: exact k-nearest neighbors by cosine, for galleries of any size.

Owns schema and validation; the loop is that of :mod:`gcng.ops.nearest`. There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcng.mode import in_reference_mode
from gcng.ops.nearest import nearest_rows
from gcng.ops.registration import compute_dtype, define_autocast, define_op
from gcng.ops.validation import check_channels, check_float_matrix, check_same_device, check_same_dtype
from gcng.reference import retrieval as definition


def _knn(query: Tensor, reference: Tensor, k: int, self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    return nearest_rows(query, reference, k, centered=False, self_index=self_index)


def _knn_fake(query: Tensor, reference: Tensor, k: int, self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=compute_dtype(query.dtype)), query.new_empty(shape, dtype=torch.int64)


_forward = define_op(
    "knn(Tensor query, Tensor reference, SymInt k, Tensor? self_index) -> (Tensor, Tensor)", _knn, _knn_fake
)
define_autocast("knn")


def nearest_neighbors(query: Tensor, reference: Tensor, k: int, self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`knn` on checked arguments; ``self_index`` (N,): the row of ``reference`` left out, or None."""
    return _forward(query.detach(), reference.detach(), k, self_index)


def check_count(op: str, k: int) -> None:
    """Refuse a number of neighbors that is not a positive integer."""
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"{op}: k is {k}; it must be at least 1")


def check_pair_of_matrices(op: str, names: tuple[str, str], x: Tensor, y: Tensor) -> None:
    """Refuse two sets of rows that cannot be compared: kind, dtype, device, or number of channels."""
    for name, matrix in zip(names, (x, y), strict=True):
        check_float_matrix(op, name, matrix)
        check_channels(op, name, matrix)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{op}: {names[1]} has shape {tuple(y.shape)} but {names[0]} has shape {tuple(x.shape)}; "
            "both must have the same number of channels D"
        )
    check_same_dtype(op, **{names[0]: x, names[1]: y})
    check_same_device(op, **{names[0]: x, names[1]: y})


def knn(
    query: Tensor, reference: Tensor | None = None, k: int = 1, *, exclude_self: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Exact k nearest rows by cosine, for every query.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        reference: (R, D), same dtype and device; None searches the queries among themselves.
        k: number of neighbors, at least 1; may exceed the number of rows.
        exclude_self: leave out row i of ``reference`` for query i, by identity: an equal row elsewhere stays.
            None means ``reference is None``. True with a reference says that its first N rows are the
            queries.

    Returns:
        values (N, k), the cosines, falling, float32 (float64 for float64), and indices (N, k) int64. Ties go
        by lower index; where there are fewer than k rows, -inf and -1. A row of zeros has cosine 0 with every
        row. The result is the same for any number of threads and any partition of the queries. No gradient.

    Raises:
        ValueError: wrong shape, device or k. TypeError: wrong or mixed dtypes.

    Memory: the results and a tile of fixed size, whatever N and R; rows are read in blocks and never copied
        whole.

    Example:
        >>> values, indices = knn(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
        >>> indices.squeeze(1).tolist()
        [1, 0, 1]
    """
    exclude_self = reference is None if exclude_self is None else exclude_self
    reference = query if reference is None else reference
    check_pair_of_matrices("knn", ("query", "reference"), query, reference)
    check_count("knn", k)
    if exclude_self and reference.shape[0] < query.shape[0]:
        raise ValueError(
            f"knn: reference has {reference.shape[0]} rows but query has {query.shape[0]}; exclude_self=True "
            "needs the queries as the first rows of reference"
        )
    if in_reference_mode():
        return definition.knn(query, reference, k, exclude_self=exclude_self)
    self_index = torch.arange(query.shape[0], device=query.device) if exclude_self else None
    return nearest_neighbors(query, reference, k, self_index)
