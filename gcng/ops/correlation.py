"""Ops (1)-(2): centered unit nodes and the blocked scalar correlation.

Centering and scaling happen once per node, O(N D). The N x N correlation exists in blocks only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcng.mode import in_reference_mode
from gcng.ops.blocks import labels_beside
from gcng.ops.nearest import nearest_rows
from gcng.ops.registration import compute_dtype, define_autocast, define_gradient, define_op
from gcng.ops.retrieval import check_count, check_pair_of_matrices
from gcng.ops.triton_path import runs_triton
from gcng.ops.validation import check_channels, check_float_matrix, check_labels
from gcng.reference import correlation as reference


def _center_normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        from gcng.kernels import correlation

        return correlation.center_normalize_forward(x)
    wide = x.contiguous().to(compute_dtype(x.dtype))  # sums in one order, whatever the strides
    centered = wide - wide.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(centered, dim=-1, keepdim=True)
    # A constant row leaves rounding noise after centering; it counts as no direction at all (maths.md S7).
    floor = 8 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]) * wide.abs().amax(-1, keepdim=True)
    inverse_norm = torch.where(norm > floor, 1.0 / norm, torch.zeros_like(norm))
    # where, not a product: a NaN row must stay NaN, and a constant one must be exactly 0.
    unit = torch.where(norm <= floor, torch.zeros_like(centered), centered / norm)
    return unit.to(x.dtype).contiguous(), inverse_norm.contiguous()


def _center_normalize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (x.shape[0], 1), dtype=compute_dtype(x.dtype)
    )


def _center_normalize_backward(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    if runs_triton(unit):
        from gcng.kernels import correlation

        return correlation.center_normalize_backward(grad, unit, inverse_norm)
    dtype = inverse_norm.dtype
    grad_wide, unit_wide = grad.contiguous().to(dtype), unit.to(dtype)
    radial = (grad_wide * unit_wide).sum(-1, keepdim=True)
    grad_x = inverse_norm * (grad_wide - grad_wide.mean(-1, keepdim=True) - unit_wide * radial)
    return torch.where(inverse_norm == 0, torch.zeros_like(grad_x), grad_x).to(unit.dtype).contiguous()


def _center_normalize_backward_fake(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    return torch.empty_like(unit, memory_format=torch.contiguous_format)


_forward = define_op("center_normalize(Tensor x) -> (Tensor, Tensor)", _center_normalize, _center_normalize_fake)
_backward = define_op(
    "center_normalize_backward(Tensor grad, Tensor unit, Tensor inverse_norm) -> Tensor",
    _center_normalize_backward,
    _center_normalize_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad: Tensor, _grad_inverse_norm: Tensor) -> Tensor:
    return _backward(grad, *ctx.saved_tensors)


define_gradient("center_normalize", _gradient, _setup_context)
define_autocast("center_normalize")


def center_normalize(x: Tensor) -> Tensor:
    """Center every row over its channels and scale it to unit length, formula (1) of docs/maths.md.

    The inner product of two rows of the result is the Pearson correlation of the two embeddings.

    Args:
        x: (N, D), float16, bfloat16, float32 or float64. 16-bit inputs are computed in float32.

    Returns:
        (N, D) in the dtype of ``x`` (float32 under autocast). A row whose norm after centering is at most
        ``8 eps sqrt(D) max|x|`` (a constant or zero row) gives exactly 0, and a zero gradient.

    Raises:
        ValueError: ``x`` is not 2-D, or has no channels. TypeError: not a dense floating tensor.

    Memory: one (N, D) output and (N, 1) saved for the backward.
    """
    check_float_matrix("center_normalize", "x", x)
    check_channels("center_normalize", "x", x)
    if in_reference_mode():
        return reference.center_normalize(x)
    return _forward(x)[0]


def _correlation_topk(
    x: Tensor,
    ref: Tensor,
    k: int,
    self_index: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return nearest_rows(x, ref, k, centered=True, self_index=self_index, labels=labels, reference_labels=ref_labels)


def _correlation_topk_fake(
    x: Tensor,
    ref: Tensor,
    k: int,
    self_index: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=compute_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)


_topk = define_op(
    "correlation_topk(Tensor x, Tensor ref, SymInt k, Tensor? self_index, Tensor? labels, "
    "Tensor? ref_labels) -> (Tensor, Tensor)",
    _correlation_topk,
    _correlation_topk_fake,
)
define_autocast("correlation_topk")


def correlation_topk(
    x: Tensor,
    k: int,
    *,
    labels: Tensor | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest Pearson correlation to every row: with labels, its hardest negatives.

    The correlation is the sum over channels of (2) of docs/maths.md: the inner product of the rows that
    :func:`center_normalize` gives.

    Args:
        x: (N, D), float16, bfloat16, float32 or float64.
        k: number of partners, at least 1; may exceed the number of rows.
        labels: (N,) any integer dtype, on the device of ``x`` or on the CPU; rows of the same class are left
            out.
        ref: (R, D), same dtype and device: search these rows. None searches ``x`` itself without each row's
            self.
        ref_labels: (R,) labels of ``ref``; given exactly when both ``labels`` and ``ref`` are.

    Returns:
        values (N, k), the correlations, falling, float32 (float64 for float64), and indices (N, k) int64.
        Ties go by lower index; where fewer than k rows remain, -inf and -1. A constant row has correlation 0.
        No gradient.

    Raises:
        ValueError: wrong shape, device or k, labels on one side only. TypeError: wrong or mixed dtypes.

    Memory: the results and a tile of fixed size, whatever N and R; the N x R matrix never exists.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.5], [3.0, 2.0, 1.0]])
        >>> correlation_topk(x, 1)[1].squeeze(1).tolist()
        [1, 0, 1]
    """
    op = "correlation_topk"
    check_float_matrix(op, "x", x)
    check_count(op, k)
    others = x if ref is None else ref
    check_pair_of_matrices(op, ("x", "ref"), x, others)
    if (ref_labels is not None) != (labels is not None and ref is not None):
        raise ValueError(
            f"{op}: ref_labels is {'missing' if ref_labels is None else 'given'}; it must come with ref and "
            "labels, one label for each row of ref, and only then"
        )
    if labels is not None:
        check_labels(op, labels, x.shape[0], of="x")
        labels = labels_beside(op, labels, x.device).long()
    if ref_labels is not None:
        check_labels(op, ref_labels, others.shape[0], name="ref_labels", of="ref")
        ref_labels = labels_beside(op, ref_labels, x.device, name="ref_labels").long()
    if in_reference_mode():
        return reference.correlation_topk(x, k, labels=labels, ref=ref, ref_labels=ref_labels)
    self_index = torch.arange(x.shape[0], device=x.device) if ref is None else None
    others_labels = labels if ref is None else ref_labels
    return _topk(x.detach(), others.detach(), k, self_index, labels, others_labels)
