"""Ops (1)-(2): centered unit nodes and the blocked scalar correlation.

Centering and scaling happen once per node, O(N D). The N x N correlation exists in blocks only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcng import reference
from gcng.mode import in_reference_mode
from gcng.ops.registration import compute_dtype, define_autocast, define_gradient, define_op
from gcng.ops.validation import check_channels, check_float_matrix


def _center_normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(compute_dtype(x.dtype))
    centered = wide - wide.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(centered, dim=-1, keepdim=True)
    # A constant row leaves rounding noise after centering; it counts as no direction at all (maths.md S7).
    floor = 8 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]) * wide.abs().amax(-1, keepdim=True)
    inverse_norm = torch.where(norm > floor, 1.0 / norm, torch.zeros_like(norm))
    # where, not a product: a NaN row must stay NaN, and a constant one must be exactly 0.
    unit = torch.where(norm <= floor, torch.zeros_like(centered), centered / norm)
    return unit.to(x.dtype), inverse_norm


def _center_normalize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (x.shape[0], 1), dtype=compute_dtype(x.dtype)
    )


def _center_normalize_backward(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    dtype = inverse_norm.dtype
    grad_wide, unit_wide = grad.to(dtype), unit.to(dtype)
    radial = (grad_wide * unit_wide).sum(-1, keepdim=True)
    grad_x = inverse_norm * (grad_wide - grad_wide.mean(-1, keepdim=True) - unit_wide * radial)
    return torch.where(inverse_norm == 0, torch.zeros_like(grad_x), grad_x).to(unit.dtype)


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
