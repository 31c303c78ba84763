"""Op (4)-(6): attention over the samples of other classes, with one extra zero logit.

Owns the blocked path: score tiles of a fixed size, an online softmax, and a backward that computes every tile
again from each row's maximum and denominator. Nothing of size N x N exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcng.mode import in_reference_mode
from gcng.ops.blocks import labels_beside, spans
from gcng.ops.registration import compute_dtype, define_gradient, define_op, define_product_autocast
from gcng.ops.triton_path import runs_triton
from gcng.ops.validation import (
    check_channels,
    check_float_matrix,
    check_labels,
    check_same_device,
    check_same_dtype,
)
from gcng.reference import attention as reference

# Scores per tile, all heads together: 2 MiB in float32, big enough for the GEMMs, small enough for a cache.
TILE_SCORES = 2**19
# A tile is as wide as the batch while it keeps so many rows: the backward then computes its scores once, not twice.
TILE_ROWS = 64


def _tile_shape(num_nodes: int, num_heads: int) -> tuple[int, int]:
    """Rows and columns of a score tile, from the sizes alone: a result never depends on the machine."""
    columns = max(1, min(num_nodes, TILE_SCORES // (num_heads * TILE_ROWS)))
    return max(1, min(num_nodes, TILE_SCORES // (num_heads * columns))), columns


def _finite_rows(x: Tensor) -> Tensor | None:
    """(H, N, 1) bool: the rows of x (H, N, h) without a NaN or infinity; None where all are, if x is on the CPU.

    A GPU is not asked: the answer would have to be waited for.
    """
    finite = x.isfinite().all(-1, keepdim=True)
    return None if x.device.type == "cpu" and bool(finite.all()) else finite


def _zeroed(x: Tensor, finite: Tensor | None) -> Tensor:
    """x (H, N, h) with 0 in the rows that are not finite: in a GEMM, a weight of 0 times NaN is NaN."""
    return x if finite is None else torch.where(finite, x, 0.0)


def _depends_on_non_finite(finite: Tensor, labels: Tensor) -> Tensor:
    """(H, N, 1) bool: whether any row that belongs to another class is not ``finite`` (H, N, 1).

    Counted by class ranges of the sorted labels, O(N H), without a device sync.
    """
    bad = ~finite.squeeze(-1).transpose(0, 1)  # (N, H)
    in_order, order = labels.sort()
    running = torch.nn.functional.pad(bad[order].cumsum(0), (0, 0, 1, 0))  # (N + 1, H)
    wanted = labels.contiguous()
    first, last = torch.searchsorted(in_order, wanted), torch.searchsorted(in_order, wanted, right=True)
    elsewhere = running[-1] - (running[last] - running[first])
    return (elsewhere > 0).transpose(0, 1).unsqueeze(-1)


def _by_head(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)).transpose(0, 1)  # (H, N, h)


def _negative_attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(q):
        from gcng.kernels import attention

        return attention.negative_attention_forward(q, k, v, labels.long())
    num_nodes, num_heads, width = q.shape
    queries, keys, values = _by_head(q) / math.sqrt(width), _by_head(k), _by_head(v)
    finite = _finite_rows(values)
    finite_values = _zeroed(values, finite)
    out = queries.new_empty((num_nodes, num_heads, width))
    shares = queries.new_empty((2, num_heads, num_nodes, 1))
    row_block, column_block = _tile_shape(num_nodes, num_heads)
    for rows in spans(num_nodes, row_block):
        # The extra zero logit is where the online softmax starts: maximum 0, sum exp(0), no value.
        maximum = queries.new_zeros((num_heads, rows.stop - rows.start, 1))
        total = torch.ones_like(maximum)
        weighted = queries.new_zeros((num_heads, rows.stop - rows.start, width))
        for columns in spans(num_nodes, column_block):
            scores = torch.bmm(queries[:, rows], keys[:, columns].transpose(1, 2))
            scores.masked_fill_(labels[rows, None] == labels[None, columns], -math.inf)
            raised = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            weights = scores.sub_(raised).exp_()
            shrink = (maximum - raised).exp_()
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            weighted = weighted.mul_(shrink).baddbmm_(weights, finite_values[:, columns])
            maximum = raised
        out[rows] = (weighted / total).transpose(0, 1)
        # Apart, because their joint logarithm would round away digits of large scores.
        shares[0, :, rows], shares[1, :, rows] = maximum, total
    if finite is not None:
        out.masked_fill_(_depends_on_non_finite(finite, labels).transpose(0, 1), math.nan)
    return out.to(q.dtype), shares


def _negative_attention_fake(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    shares = q.new_empty((2, q.shape[1], q.shape[0], 1), dtype=compute_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), shares


class _Rows(NamedTuple):
    """What the backward needs of every row and sender: operands by head (H, N, h), statistics, labels."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    grads: Tensor
    shares: Tensor  # (2, H, N, 1) maximum and denominator
    labels: Tensor  # (N,)

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """P, dP (H, R, S), both 0 within a class, and the mask of same classes (R, S)."""
        same_class = self.labels[rows, None] == self.labels[None, columns]
        scores = torch.bmm(self.queries[:, rows], self.keys[:, columns].transpose(1, 2))
        weights = scores.sub_(self.shares[0, :, rows]).exp_().div_(self.shares[1, :, rows])
        grad_weights = torch.bmm(self.grads[:, rows], self.values[:, columns].transpose(1, 2))
        return weights.masked_fill_(same_class, 0.0), grad_weights.masked_fill_(same_class, 0.0), same_class

    def tiles(self, rows: slice, columns: list[slice]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns, P and dS of every tile in a block of rows.

        dS = P (dP - rowsum(P dP)) takes two passes over the tiles. The sum comes from the tiles and not from
        the output (rowsum(dO O)): where a weight is near 1, dP - rowsum must cancel to the last digit.
        """
        radial = 0.0
        for part in columns:
            weights, grad_weights, same_class = self.tile(rows, part)
            radial = radial + (weights * grad_weights).sum(-1, keepdim=True)
        for part in columns:
            if len(columns) > 1:
                weights, grad_weights, same_class = self.tile(rows, part)
            # Masked again: a NaN in the sum must not reach the class of its row.
            yield part, weights, grad_weights.sub_(radial).mul_(weights).masked_fill_(same_class, 0.0)


def _negative_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, labels: Tensor, shares: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the weights and dP = dO V^T: dV = P^T dO, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q."""
    if runs_triton(q):
        from gcng.kernels import attention

        return attention.negative_attention_backward(grad, q, k, v, labels.long(), shares, needed)
    num_nodes, num_heads, width = q.shape
    scale = math.sqrt(width)
    queries, keys, values, grads = _by_head(q) / scale, _by_head(k), _by_head(v), _by_head(grad)
    finite_queries, finite_keys = (_zeroed(x, _finite_rows(x)) for x in (queries, keys))
    finite = _finite_rows(grads)
    finite_grads = _zeroed(grads, finite)
    operands = _Rows(queries, keys, values, grads, shares, labels)
    full = (num_heads, num_nodes, width)
    grad_q, grad_k, grad_v = (queries.new_zeros(full if need else (0,)) for need in needed)
    row_block, column_block = _tile_shape(num_nodes, num_heads)
    for rows in spans(num_nodes, row_block):
        for columns, weights, grad_scores in operands.tiles(rows, list(spans(num_nodes, column_block))):
            if needed[0]:
                grad_q[:, rows].baddbmm_(grad_scores, finite_keys[:, columns])
            if needed[1]:
                grad_k[:, columns].baddbmm_(grad_scores.transpose(1, 2), finite_queries[:, rows])
            if needed[2]:
                grad_v[:, columns].baddbmm_(weights.transpose(1, 2), finite_grads[:, rows])
    if needed[0]:
        grad_q.div_(scale)
    if needed[2] and finite is not None:
        grad_v.masked_fill_(_depends_on_non_finite(finite, labels), math.nan)
    return tuple(
        (x.transpose(0, 1) if need else x).to(q.dtype, memory_format=torch.contiguous_format, copy=need)
        for x, need in zip((grad_q, grad_k, grad_v), needed, strict=True)
    )


def _negative_attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, labels: Tensor, shares: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(q.new_empty(q.shape if need else (0,)) for need in needed)


_forward = define_op(
    "negative_attention(Tensor q, Tensor k, Tensor v, Tensor labels) -> (Tensor, Tensor)",
    _negative_attention,
    _negative_attention_fake,
)
_backward = define_op(
    "negative_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor labels, Tensor shares, "
    "bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _negative_attention_backward,
    _negative_attention_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad: Tensor, _grad_shares: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = _backward(grad, *ctx.saved_tensors, needed)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), None


define_gradient("negative_attention", _gradient, _setup_context)
define_product_autocast(_forward)


def negative_attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """Attend to the samples of other classes, formulas (4)-(6) of docs/maths.md before the output map.

    ``out[b] = sum_a w[a, b] v[a]`` with ``w[a, b]`` proportional to ``exp(q[b] . k[a] / sqrt(h))`` over the
    senders ``a`` whose class differs from that of the receiver ``b``, and a denominator with one extra
    ``exp(0)``. So the weights of a row sum to less than 1, and a row without negatives gives exactly 0.

    Args:
        q: (N, H, h) queries of the receivers, float16, bfloat16, float32 or float64; 16-bit is computed in
            float32.
        k: (N, H, h) keys of the senders, same shape, dtype and device.
        v: (N, H, h) values of the senders, same shape, dtype and device.
        labels: (N,) any integer dtype, on the device of ``q`` or on the CPU; classes in any order.

    Returns:
        (N, H, h) in the dtype of ``q``. A NaN or infinity reaches only the receivers that attend to it: samples
        of the same class keep their results bit for bit. Under autocast q, k, v and the result are float32 on the
        CPU, and on a GPU the dtype autocast was asked for; scores, softmax and sums are float32 on both.

    Raises:
        ValueError: wrong shape, different shapes or devices. TypeError: wrong or mixed dtypes.

    Memory: the output, two numbers per row and head saved for the backward, and score tiles whose size does
        not depend on N.

    Example:
        >>> q = k = v = torch.randn(4, 2, 8)
        >>> negative_attention(q, k, v, torch.tensor([0, 0, 1, 1])).shape
        torch.Size([4, 2, 8])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_matrix("negative_attention", name, x, dims=3, shape="(N, H, h)")
        if x.shape != q.shape:
            raise ValueError(
                f"negative_attention: {name} has shape {tuple(x.shape)} but q has shape {tuple(q.shape)}; "
                "q, k and v must have the same (N, H, h)"
            )
    check_channels("negative_attention", "q", q)
    if q.shape[1] == 0:
        raise ValueError(f"negative_attention: q has no heads, got shape {tuple(q.shape)}; H must be at least 1")
    check_labels("negative_attention", labels, q.shape[0], of="q")
    check_same_dtype("negative_attention", q=q, k=k, v=v)
    check_same_device("negative_attention", q=q, k=k, v=v)
    labels = labels_beside("negative_attention", labels, q.device).long()
    if in_reference_mode():
        return reference.negative_attention(q, k, v, labels)
    return _forward(q, k, v, labels)[0]
