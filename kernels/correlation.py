"""Centered unit nodes, formula (1): the kernels of ``center_normalize`` and their launchers.

Owns the row statistics in GPU form. A program has a few whole rows and walks over their channels; rows that fit one
block of channels are read once, longer ones once for each statistic (from the cache, as a rule). The search over
correlations (``correlation_topk``) is that of :mod:`gcng.kernels.nearest`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import store
from gcng.kernels.launch import CompilationCase, Schedule, launch


@dataclass(frozen=True)
class RowSchedule(Schedule):
    """Whole rows of a program, and the channels of one step."""

    block_i: int = 4
    block_d: int = 1024

    @staticmethod
    def for_width(width: int) -> RowSchedule:
        """By D alone: 4096 numbers a step, 32 a thread; not timed on a GPU."""
        block_d = min(4096, max(16, triton.next_power_of_2(width)))
        return RowSchedule(4, 1, max(1, min(64, 4096 // block_d)), block_d)

    @property
    def tiles(self) -> dict[str, int]:
        """The constexpr parameters of the kernels."""
        return {"BLOCK_I": self.block_i, "BLOCK_D": self.block_d}


@triton.jit
def load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_I, BLOCK_D) of x from channel ``first`` on, 0 outside, and which of it is inside."""
    channels = first + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (rows < N)[:, None] & (channels < WIDTH)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_n + channels[None, :] * stride_d, mask=inside, other=0.0)
    return x, inside, channels


@triton.jit
def _root(x):
    """Square root, rounded to nearest; triton's own is an approximation for float32."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _quotient(x, y):
    """x / y, rounded to nearest; triton's own is an approximation for float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def center_normalize_forward_kernel(
    x_ptr,  # (N, D), any strides
    unit_ptr,  # (N, D)
    inverse_norm_ptr,  # (N,)
    N, stride_n, stride_d,
    WIDTH: tl.constexpr, FLOOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(1): u = (x - mean x) / |x - mean x|, 0 where the norm is at most FLOOR max|x| (maths.md S7), and 1 / norm.

    A program owns BLOCK_I rows. Bytes: reads x, writes unit and one number a row.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    TYPE: tl.constexpr = inverse_norm_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_I,), TYPE)
    largest = tl.zeros((BLOCK_I,), TYPE)
    for first in range(0, WIDTH, BLOCK_D):
        x, _, _ = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        total += tl.sum(x.to(TYPE), 1)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(TYPE)), 1))
    mean = _quotient(total, tl.full((BLOCK_I,), WIDTH, TYPE))
    squares = tl.zeros((BLOCK_I,), TYPE)
    for first in range(0, WIDTH, BLOCK_D):
        x, inside, _ = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        centered = tl.where(inside, x.to(TYPE) - mean[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    norm = _root(squares)
    # A NaN is on neither side of the floor: its row stays NaN, and its inverse norm is 0.
    constant = norm <= largest * FLOOR
    one = tl.full((BLOCK_I,), 1.0, TYPE)
    inverse_norm = tl.where(norm > largest * FLOOR, _quotient(one, tl.where(constant, one, norm)), 0.0)
    tl.store(inverse_norm_ptr + rows, inverse_norm, mask=rows < N)
    for first in range(0, WIDTH, BLOCK_D):
        x, inside, channels = load_block(x_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        divisor = tl.broadcast_to(tl.where(constant, one, norm)[:, None], (BLOCK_I, BLOCK_D))
        unit = tl.where(constant[:, None], 0.0, _quotient(x.to(TYPE) - mean[:, None], divisor))
        store(unit_ptr + rows[:, None] * WIDTH + channels[None, :], unit, inside)


@triton.jit
def center_normalize_backward_kernel(
    grad_ptr,  # (N, D), any strides
    unit_ptr,  # (N, D)
    inverse_norm_ptr,  # (N,)
    grad_x_ptr,  # (N, D)
    N, stride_n, stride_d,
    WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(1): dx = (g - mean g - u (g . u)) / norm, 0 for constant rows.

    A program owns BLOCK_I rows. Bytes: reads grad, unit and one number a row, writes grad_x.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    TYPE: tl.constexpr = inverse_norm_ptr.dtype.element_ty
    inverse_norm = tl.load(inverse_norm_ptr + rows, mask=rows < N, other=0.0)
    total = tl.zeros((BLOCK_I,), TYPE)
    radial = tl.zeros((BLOCK_I,), TYPE)
    for first in range(0, WIDTH, BLOCK_D):
        grad, _, _ = load_block(grad_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        unit, _, _ = load_block(unit_ptr, WIDTH, 1, rows, first, N, WIDTH, BLOCK_D)
        total += tl.sum(grad.to(TYPE), 1)
        radial += tl.sum(grad.to(TYPE) * unit.to(TYPE), 1)
    mean = _quotient(total, tl.full((BLOCK_I,), WIDTH, TYPE))
    for first in range(0, WIDTH, BLOCK_D):
        grad, inside, channels = load_block(grad_ptr, stride_n, stride_d, rows, first, N, WIDTH, BLOCK_D)
        unit, _, _ = load_block(unit_ptr, WIDTH, 1, rows, first, N, WIDTH, BLOCK_D)
        tangent = grad.to(TYPE) - mean[:, None] - unit.to(TYPE) * radial[:, None]
        grad_x = tl.where((inverse_norm == 0)[:, None], 0.0, inverse_norm[:, None] * tangent)
        store(grad_x_ptr + rows[:, None] * WIDTH + channels[None, :], grad_x, inside)


def center_normalize_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Formula (1): unit rows, and the inverse norms that the backward needs.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64, any strides.

    Returns:
        unit (N, D) contiguous in the dtype of x, and inverse_norm (N, 1) in float32 (float64 for float64), which is
        0 for rows without direction.
    """
    num_nodes, width = x.shape
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    inverse_norm = x.new_empty((num_nodes, 1), dtype=kind)
    schedule = RowSchedule.for_width(width)
    launch(
        center_normalize_forward_kernel, (triton.cdiv(num_nodes, schedule.block_i),),
        x, unit, inverse_norm, num_nodes, *x.stride(),
        schedule=schedule, WIDTH=width, FLOOR=8 * torch.finfo(x.dtype).eps * math.sqrt(width), **schedule.tiles,
    )  # fmt: skip
    return unit, inverse_norm


def center_normalize_backward(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    """Gradient of formula (1), (N, D) contiguous in the dtype of ``unit``.

    Args:
        grad: (N, D), any floating dtype and strides, stride 0 included. unit, inverse_norm: of the forward.
    """
    num_nodes, width = unit.shape
    grad_x = torch.empty_like(unit, memory_format=torch.contiguous_format)
    schedule = RowSchedule.for_width(width)
    launch(
        center_normalize_backward_kernel, (triton.cdiv(num_nodes, schedule.block_i),),
        grad, unit.contiguous(), inverse_norm.contiguous(), grad_x, num_nodes, *grad.stride(),
        schedule=schedule, WIDTH=width, **schedule.tiles,
    )  # fmt: skip
    return grad_x


def _compilation_call(dtype: torch.dtype, width: int) -> None:
    x = torch.empty((400, width), dtype=dtype, device="meta")
    center_normalize_backward(x, *center_normalize_forward(x))


def compilation_cases() -> list[CompilationCase]:
    """What is compiled ahead of time: every dtype, one block of channels and several."""
    return [
        CompilationCase("float32, D 512", lambda: _compilation_call(torch.float32, 512)),
        CompilationCase("float32, D 6000", lambda: _compilation_call(torch.float32, 6000)),
        CompilationCase("bfloat16, D 384", lambda: _compilation_call(torch.bfloat16, 384)),
        CompilationCase("float16, D 512", lambda: _compilation_call(torch.float16, 512)),
    ]
