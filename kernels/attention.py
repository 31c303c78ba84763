"""Attention over the samples of other classes, formulas (4)-(6): the forward kernel, and the launchers.

A program has one head and one block of rows (receivers) or columns (senders); it walks over the other axis and keeps
what it owns in registers, so nothing of size N x N exists and no two programs write the same element. The forward
keeps an online softmax; the backward computes every tile again from each row's maximum and denominator
(:mod:`gcng.kernels.attention_gradient`). Heads wider than a block of output channels are split over programs, which
repeat the scores.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import dot, operand, store
from gcng.kernels.attention_gradient import (
    negative_attention_grad_query_kernel,
    negative_attention_grad_sender_kernel,
    negative_attention_radial_kernel,
)
from gcng.kernels.attention_tiles import PER_BATCH, attention_schedules, finite, load_rows, negatives, products
from gcng.kernels.launch import CompilationCase, architecture, input_precision, launch


@triton.jit(**PER_BATCH)
def negative_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr,  # (N, H, h), any strides
    labels_ptr,  # (N,) int64
    spoiled_ptr,  # (N, H) int8: rows of v that are not finite
    out_ptr,  # (N, H, h)
    shares_ptr,  # (2, H, N) maximum and denominator of every receiver
    N, H, stride_qn, stride_qh, stride_qd, stride_kn, stride_kh, stride_kd, stride_vn, stride_vh, stride_vd,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(4)-(6): out_i = sum_j exp(s_ij - m_i) v_j / (exp(-m_i) + sum_j exp(s_ij - m_i)) over the other classes.

    A program owns BLOCK_I receivers, one head, BLOCK_D output channels; the first of the channel blocks also owns
    the shares. The extra zero logit is where the online softmax starts: maximum 0, sum exp(0), no value.
    Bytes: reads q, k of the head and BLOCK_D channels of v once for each block of receivers, writes out and shares.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    head = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    TYPE: tl.constexpr = shares_ptr.dtype.element_ty
    maximum = tl.zeros((BLOCK_I,), TYPE)
    total = tl.full((BLOCK_I,), 1.0, TYPE)
    weighted = tl.zeros((BLOCK_I, BLOCK_D), TYPE)
    poisoned = tl.zeros((BLOCK_I,), tl.int32)
    for first in range(0, N, BLOCK_J):
        columns = first + tl.arange(0, BLOCK_J).to(tl.int64)
        scores = products(
            q_ptr + head * stride_qh, k_ptr + head * stride_kh, stride_qn, stride_qd, stride_kn, stride_kd,
            rows, columns, N, WIDTH, BLOCK_K, TYPE, PRECISION,
        )  # fmt: skip
        negative = negatives(labels_ptr, rows, columns, N)
        scores = tl.where(negative, scores * SCALE, float("-inf"))
        raised = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp(scores - raised[:, None])
        shrink = tl.exp(maximum - raised)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v_ptr + head * stride_vh, stride_vn, stride_vd, columns, outputs, N, WIDTH)
        weighted = dot(operand(weights, WEIGHTED), finite(values.to(TYPE)), weighted * shrink[:, None], WEIGHTED)
        spoiled = tl.load(spoiled_ptr + columns * H + head, mask=columns < N, other=0).to(tl.int32)
        poisoned = tl.maximum(poisoned, tl.max(tl.where(negative, spoiled[None, :], 0), 1))
        maximum = raised
    result = tl.where((poisoned > 0)[:, None], float("nan"), weighted / total[:, None])
    inside = (rows < N)[:, None] & (outputs < WIDTH)[None, :]
    store(out_ptr + (rows[:, None] * H + head) * WIDTH + outputs[None, :], result, inside)
    if tl.program_id(2) == 0:
        tl.store(shares_ptr + head * N + rows, maximum, mask=rows < N)
        tl.store(shares_ptr + (H + head) * N + rows, total, mask=rows < N)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spoiled_rows(x: Tensor) -> Tensor:
    """(N, H) int8: 1 where a row of x (N, H, h) holds a NaN or an infinity."""
    return (~x.isfinite().all(-1)).to(torch.int8).contiguous()


def _constants(width: int, dtype: torch.dtype) -> dict:
    """The constexpr parameters that all kernels share, beside their tiles."""
    return {"WIDTH": width, "SCALE": 1 / math.sqrt(width), "PRECISION": input_precision(dtype)}


def _weighted_precision(dtype: torch.dtype) -> str:
    """How weights meet values: 16-bit values are exact in tf32, which has the range that float16 lacks."""
    return "tf32" if dtype in (torch.float16, torch.bfloat16) else input_precision(dtype)


def negative_attention_forward(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Formulas (4)-(6): the output, and what the backward needs of it.

    Args:
        q, k, v: (N, H, h) float16, bfloat16, float32 or float64, one dtype, any strides.
        labels: (N,) int64 on the same device, any order.

    Returns:
        out (N, H, h) contiguous in the dtype of q, and shares (2, H, N, 1): maximum and denominator of every
        receiver in float32 (float64 for float64). A receiver that attends to a non-finite value is NaN.
    """
    num_nodes, num_heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    shares = q.new_empty((2, num_heads, num_nodes, 1), dtype=_accumulator(q.dtype))
    constants = _constants(width, q.dtype)
    schedule, _ = attention_schedules(width, q.dtype, constants["PRECISION"], architecture(q.device))
    grid = triton.cdiv(num_nodes, schedule.block_i), num_heads, triton.cdiv(width, schedule.block_d)
    launch(
        negative_attention_forward_kernel, grid, q, k, v, labels.contiguous(), _spoiled_rows(v), out, shares,
        num_nodes, num_heads, *q.stride(), *k.stride(), *v.stride(),
        schedule=schedule, WEIGHTED=_weighted_precision(q.dtype), **constants, **schedule.tiles,
    )  # fmt: skip
    return out, shares


def negative_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, labels: Tensor, shares: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (4)-(6) for q, k and v, each where ``needed`` says so; the others come back with shape (0,).

    Args:
        grad: (N, H, h) in the dtype of q, any strides, stride 0 included. shares: (2, H, N, 1) of the forward.

    Memory: the gradients, one number a receiver and head, one byte a row and head of ``grad``.
    """
    num_nodes, num_heads, width = q.shape
    grad_q, grad_k, grad_v = (q.new_empty(q.shape if need else (0,)) for need in needed)
    constants = _constants(width, q.dtype)
    by_receiver, by_sender = attention_schedules(width, q.dtype, constants["PRECISION"], architecture(q.device))
    weighted = _weighted_precision(q.dtype)
    labels = labels.contiguous()
    sizes = num_nodes, num_heads, *grad.stride(), *q.stride(), *k.stride(), *v.stride()
    grid = triton.cdiv(num_nodes, by_receiver.block_i), num_heads, triton.cdiv(width, by_receiver.block_d)
    radial = None
    if needed[0] or needed[1]:
        radial = torch.empty_like(shares[0])
        scalars = {name: size for name, size in by_receiver.tiles.items() if name != "BLOCK_D"}
        launch(
            negative_attention_radial_kernel, grid[:2], grad, q, k, v, labels, shares, radial, *sizes,
            schedule=by_receiver, **constants, **scalars,
        )  # fmt: skip
    if needed[0]:
        launch(
            negative_attention_grad_query_kernel, grid, grad, q, k, v, labels, shares, radial, grad_q, *sizes,
            schedule=by_receiver, WEIGHTED=weighted, **constants, **by_receiver.tiles,
        )  # fmt: skip
    if needed[1] or needed[2]:
        launch(
            negative_attention_grad_sender_kernel,
            (triton.cdiv(num_nodes, by_sender.block_j), num_heads, triton.cdiv(width, by_sender.block_d)),
            grad, q, k, v, labels, _spoiled_rows(grad) if needed[2] else None, shares, radial if needed[1] else None,
            grad_k if needed[1] else None, grad_v if needed[2] else None, *sizes,
            schedule=by_sender, HAS_K=needed[1], HAS_V=needed[2], WEIGHTED=weighted, **constants, **by_sender.tiles,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _compilation_call(dtype: torch.dtype, width: int, needed: tuple[bool, bool, bool]) -> None:
    q, k, v = torch.empty((3, 160, 2, width), dtype=dtype, device="meta").unbind(0)
    labels = torch.empty(160, dtype=torch.int64, device="meta")
    out, shares = negative_attention_forward(q, k, v, labels)
    negative_attention_backward(out, q, k, v, labels, shares, list(needed))


def compilation_cases() -> list[CompilationCase]:
    """What is compiled ahead of time: every dtype and precision at a common width, and the odd ones once."""
    every = (True, True, True)
    return [
        CompilationCase("float32 ieee, h 128", lambda: _compilation_call(torch.float32, 128, every)),
        CompilationCase("float32 tf32, h 256", lambda: _compilation_call(torch.float32, 256, every), tf32=True),
        CompilationCase("float32 tf32, h 64", lambda: _compilation_call(torch.float32, 64, every), tf32=True),
        # 16-bit operands meet in 16 bits, their weighted sums in tf32.
        CompilationCase("bfloat16, h 256", lambda: _compilation_call(torch.bfloat16, 256, every), tf32=True),
        CompilationCase("float16, h 96", lambda: _compilation_call(torch.float16, 96, every), tf32=True),
    ]
