"""Op of (24): linear classifier and cross-entropy in one pass, logits never stored.

Owns schema, autograd and validation; the loops are those of :mod:`gcng.ops.streamed_logits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcng.mode import in_reference_mode
from gcng.ops.blocks import labels_beside
from gcng.ops.registration import compute_dtype, define_gradient, define_op, define_product_autocast
from gcng.ops.streamed_logits import streamed_logit_gradient, streamed_logsumexp
from gcng.ops.validation import (
    check_channels,
    check_float_matrix,
    check_labels,
    check_same_device,
    check_same_dtype,
)
from gcng.reference import class_cross_entropy as reference

REDUCTIONS = ("none", "mean", "sum")


def _check_targets(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Name the first target that is no class. On the CPU only: elsewhere it would wait for the device."""
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: target[{first}] is {int(target[first])}; expected 0 <= target < "
            f"{num_classes}, the number of rows of weight, or ignore_index = {ignore_index}; relabel to "
            f"0..{num_classes - 1} or ignore the row"
        )


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    _check_targets(target, weight.shape[0], ignore_index)
    ignored = target == ignore_index
    # where, not a product: what stands in an ignored row must have no effect, NaN included.
    rows = torch.where(ignored[:, None], 0.0, x)
    lse, target_logit = streamed_logsumexp(rows, weight, bias, torch.where(ignored, 0, target))
    losses = (lse - target_logit.double()).to(target_logit.dtype)
    return losses.masked_fill_(ignored, 0.0), lse


def _linear_cross_entropy_fake(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    length = x.shape[0]
    return x.new_empty((length,), dtype=compute_dtype(x.dtype)), x.new_empty((length,), dtype=torch.float64)


def _linear_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    ignored = target == ignore_index
    rows = torch.where(ignored[:, None], 0.0, x)
    scale = torch.where(ignored, 0.0, grad)
    grad_x, grad_weight, grad_bias = streamed_logit_gradient(
        rows, weight, bias, torch.where(ignored, 0, target), lse, scale,
        need_weight=needed[1], need_rows=needed[0], need_bias=needed[2],
    )  # fmt: skip
    missing = x.new_empty((0,))
    return (
        missing if grad_x is None else grad_x.masked_fill_(ignored[:, None], 0.0).to(x.dtype),
        torch.empty_like(missing) if grad_weight is None else grad_weight,
        torch.empty_like(missing) if grad_bias is None else grad_bias.to(bias.dtype),
    )


def _linear_cross_entropy_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    classes = weight.shape[0]
    shapes = (x.shape, weight.shape, (classes,))
    wanted = (needed[0], needed[1], needed[2] and bias is not None)
    return tuple(x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


_forward = define_op(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index) -> (Tensor, Tensor)",
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
)
_backward = define_op(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor? bias, "
    "Tensor lse, int ignore_index, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy_backward,
    _linear_cross_entropy_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, target, bias, ignore_index = inputs
    ctx.save_for_backward(x, weight, target, bias, output[1])
    ctx.ignore_index = ignore_index
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, target, bias, lse = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    grads = _backward(grad, x, weight, target, bias, lse, ctx.ignore_index, needed)
    grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needed, strict=True))
    return grad_x, grad_weight, None, grad_bias, None


define_gradient("linear_cross_entropy", _gradient, _setup_context)
define_product_autocast(_forward)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the logits ``x @ weight.T + bias``, which are never stored: C may reach millions.

    Equal to ``cross_entropy(linear(x, weight, bias), target)`` of ``torch.nn.functional``, except that a
    batch whose rows are all ignored gives 0 with zero gradients (torch gives NaN).

    Args:
        x: (N, D), float16, bfloat16, float32 or float64; 16-bit is computed and summed in float32.
        weight: (C, D), same dtype and device.
        target: (N,) any integer dtype, on the device of ``x`` or on the CPU.
        bias: (C,) or None.
        ignore_index: rows with this target count for nothing, whatever they hold; it may lie inside [0, C).
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"`` or ``"none"``.

    Returns:
        0-dim, or (N,) for ``"none"``; float32, float64 for float64 inputs. Under autocast x, weight and bias are
        taken in float32 on the CPU, and on a GPU in the dtype autocast was asked for; logits, softmax and sums are
        float32 on both.

    Raises:
        ValueError: wrong shapes or devices, unknown reduction, or, on the CPU, a target that is no class
            (named with its position; on a GPU the loss and gradient of its row are NaN).
        TypeError: wrong or mixed dtypes.

    Memory: N numbers saved for the backward, one tile of logits, and the gradients; nothing of size N x C.

    Example:
        >>> x, weight = torch.randn(8, 16), torch.randn(1000, 16)
        >>> linear_cross_entropy(x, weight, torch.arange(8)).shape
        torch.Size([])
    """
    _check_arguments(x, weight, target, bias, ignore_index, reduction)
    target = labels_beside("linear_cross_entropy", target, x.device, name="target").long()
    if in_reference_mode():
        _check_targets(target, weight.shape[0], ignore_index)
        return reference.linear_cross_entropy(
            x, weight, target, bias=bias, ignore_index=ignore_index, reduction=reduction
        )
    losses = _forward(x, weight, target, bias, ignore_index)[0]
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


def _check_arguments(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> None:
    op = "linear_cross_entropy"
    check_float_matrix(op, "x", x)
    check_channels(op, "x", x)
    check_float_matrix(op, "weight", weight, shape="(C, D)")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)} but x has shape {tuple(x.shape)}; "
            "both must have the same number of channels D"
        )
    if not 1 <= weight.shape[0] < 2**31:
        raise ValueError(f"{op}: weight has {weight.shape[0]} classes; C must be between 1 and 2**31 - 1")
    if bias is not None:
        check_float_matrix(op, "bias", bias, dims=1, shape="(C,)")
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: bias has shape {tuple(bias.shape)} but weight has shape {tuple(weight.shape)}; "
                f"expected ({weight.shape[0]},)"
            )
    check_labels(op, target, x.shape[0], name="target", of="x")
    check_same_dtype(op, x=x, weight=weight, bias=bias)
    check_same_device(op, x=x, weight=weight, bias=bias)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: unknown reduction {reduction!r}; use one of {', '.join(map(repr, REDUCTIONS))}")
