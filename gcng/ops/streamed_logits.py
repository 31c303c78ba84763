"""Streamed logits: log-sum-exp and its gradient over tiles of rows x classes, the inner loops of (24).

Plain functions, for ops whose rows never exist all at once. A tile of logits is made in the forward (a
running maximum and sum per row) and made again in the backward; logits are never stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcng.ops.allocation import tried_twice
from gcng.ops.blocks import spans
from gcng.ops.registration import compute_dtype
from gcng.ops.triton_path import runs_triton

# Logits per tile (2 MiB in float32), and the classes of a tile where there are more rows than fit.
TILE_LOGITS = 2**19
TILE_CLASSES = 2048


def _tile_shape(num_rows: int, num_classes: int) -> tuple[int, int]:
    """Rows and classes of a logit tile, from the sizes alone; a small C is one GEMM per block of rows."""
    classes = max(1, min(num_classes, max(TILE_CLASSES, TILE_LOGITS // max(num_rows, 1)), TILE_LOGITS))
    return max(1, min(num_rows, TILE_LOGITS // classes)), classes


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)


def _place_in_block(target: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Column of each row's target in a block of classes, (R, 1), and whether it lies there, (R, 1)."""
    inside = (target >= classes.start) & (target < classes.stop)
    return torch.where(inside, target - classes.start, 0).unsqueeze(1), inside.unsqueeze(1)


def streamed_logsumexp(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the softmax denominator, and the logit of the target, without storing logits.

    Args:
        rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64.

    Returns:
        lse (R,) float64, so that ``lse - target_logit`` keeps the digits of a confident prediction;
        target_logit (R,) float32 (float64 for float64 rows), NaN where the target lies outside [0, C).

    Memory: O(R) and one tile of logits. 16-bit weights are widened one block of classes at a time.
    """
    if runs_triton(rows):
        from gcng.kernels import class_cross_entropy

        return class_cross_entropy.streamed_logsumexp_forward(rows, weight, bias, target)
    dtype = compute_dtype(rows.dtype)
    num_rows, num_classes = rows.shape[0], weight.shape[0]
    maximum = rows.new_full((num_rows, 1), -math.inf, dtype=dtype)
    total = rows.new_zeros((num_rows, 1), dtype=dtype)
    target_logit = rows.new_full((num_rows, 1), math.nan, dtype=dtype)
    row_block, class_block = _tile_shape(num_rows, num_classes)
    for classes in spans(num_classes, class_block):
        block_weight = weight[classes].to(dtype)
        block_bias = None if bias is None else bias[classes].to(dtype)
        for part in spans(num_rows, row_block):
            logits = _logits(rows[part].to(dtype), block_weight, block_bias)
            column, inside = _place_in_block(target[part], classes)
            target_logit[part] = torch.where(inside, logits.gather(1, column), target_logit[part])
            raised = torch.maximum(maximum[part], logits.amax(1, keepdim=True))
            # A row whose logits are all -inf so far keeps the sum 0 instead of exp(-inf + inf).
            shift = torch.where(raised == -math.inf, 0.0, raised)
            summed = logits.sub_(shift).exp_().sum(1, keepdim=True)
            total[part] = total[part] * (maximum[part] - shift).exp_() + summed
            maximum[part] = raised
    lse = maximum.double() + total.double().log()
    return lse.squeeze(1), target_logit.squeeze(1)


def streamed_logit_gradient(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    *,
    need_weight: bool,
    need_rows: bool = True,
    need_bias: bool | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum_r row_scale[r] (lse[r] - logit[r, target[r]])``, every logit computed again.

    Args:
        rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64. lse: (R,) of
            :func:`streamed_logsumexp`. row_scale: (R,) upstream gradient of each row.
        need_weight: whether to return the gradient of weight; need_rows: that of rows; need_bias: that of
            bias, None as need_weight. weight_dtype: of the gradient of weight; None is the dtype of ``weight``.

    Returns:
        grad_rows (R, D), grad_weight (C, D), grad_bias (C,), None where not needed; rows and bias in float32
        (float64 for float64 rows), the weight's, summed over rows in that dtype, in ``weight_dtype``.
        A target outside [0, C) makes the gradient NaN.

    Memory: the results and one tile of logits; on a GPU one panel of gradients, tried once more with half of it.
    """
    if runs_triton(rows):
        from gcng.kernels import class_cross_entropy

        wanted = dict(need_weight=need_weight, need_rows=need_rows, need_bias=need_bias, weight_dtype=weight_dtype)
        arguments = rows, weight, bias, target, lse, row_scale
        gradient = class_cross_entropy.streamed_logit_gradient
        return tried_twice(lambda shrink: gradient(*arguments, **wanted, shrink=shrink), rows.device)
    dtype = compute_dtype(rows.dtype)
    (num_rows, width), num_classes = rows.shape, weight.shape[0]
    wants_bias = bias is not None and (need_weight if need_bias is None else need_bias)
    known = (target >= 0) & (target < num_classes)
    scale = torch.where(known, row_scale.to(dtype), math.nan).unsqueeze(1)
    # exp(logit - lse) with lse in two parts: rounding lse alone would cost as many digits as lse has.
    high = lse.to(dtype).unsqueeze(1)
    scaled_rest = scale * (high - lse.unsqueeze(1)).exp().to(dtype)
    grad_rows = rows.new_zeros((num_rows, width), dtype=dtype) if need_rows else None
    grad_weight = weight.new_empty(weight.shape, dtype=weight_dtype or weight.dtype) if need_weight else None
    grad_bias = rows.new_zeros((num_classes,), dtype=dtype) if wants_bias else None
    row_block, class_block = _tile_shape(num_rows, num_classes)
    for classes in spans(num_classes, class_block):
        block_weight = weight[classes].to(dtype)
        block_bias = None if bias is None else bias[classes].to(dtype)
        block_grad = torch.zeros_like(block_weight) if need_weight else None
        for part in spans(num_rows, row_block):
            block_rows = rows[part].to(dtype)
            grad = _logits(block_rows, block_weight, block_bias)
            column, inside = _place_in_block(target[part], classes)
            # softmax - 1 in float64, before any rounding: near 1 the difference is all there is.
            minus_one = torch.expm1(grad.gather(1, column).double() - lse[part, None]).to(dtype) * scale[part]
            grad.sub_(high[part]).exp_().mul_(scaled_rest[part])
            grad.scatter_(1, column, torch.where(inside, minus_one, grad.gather(1, column)))
            if grad_rows is not None:
                grad_rows[part].addmm_(grad, block_weight)
            if block_grad is not None:
                block_grad.addmm_(grad.T, block_rows)
            if grad_bias is not None:
                grad_bias[classes] += grad.sum(0)
        if grad_weight is not None:
            grad_weight[classes] = block_grad
    return grad_rows, grad_weight, grad_bias
