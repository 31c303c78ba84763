"""Kernels of the backward of (4)-(6): the radial part, the gradient of the queries, those of the keys and values.

Owns who writes what: queries belong to the blocks of receivers, keys and values to the blocks of senders, so that
nothing is added by two programs. All compute the weights again from the shares of the forward. Launched by
:mod:`gcng.kernels.attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcng.kernels.arithmetic import dot, operand, store
from gcng.kernels.attention_tiles import PER_BATCH, finite, load_rows, negatives, products, weights_again


@triton.jit(**PER_BATCH)
def negative_attention_radial_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr,  # (N, H, h), any strides
    labels_ptr,  # (N,) int64
    shares_ptr,  # (2, H, N)
    radial_ptr,  # (H, N)
    N, H, stride_gn, stride_gh, stride_gd, stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd, stride_vn, stride_vh, stride_vd,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """radial_i = sum_j P_ij dP_ij with dP = dO V^T: what the softmax takes off every dP of a row.

    A program owns BLOCK_I receivers of one head. Summed from the tiles and not from the output (rowsum(dO O)): where
    a weight is near 1, dP - radial must cancel to the last digit. Bytes: reads all four operands of the head once
    for each block of receivers, writes one number a receiver.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    head = tl.program_id(1).to(tl.int64)
    TYPE: tl.constexpr = shares_ptr.dtype.element_ty
    radial = tl.zeros((BLOCK_I,), TYPE)
    for first in range(0, N, BLOCK_J):
        columns = first + tl.arange(0, BLOCK_J).to(tl.int64)
        negative = negatives(labels_ptr, rows, columns, N)
        weights = weights_again(
            q_ptr + head * stride_qh, k_ptr + head * stride_kh, shares_ptr, stride_qn, stride_qd, stride_kn, stride_kd,
            rows, columns, negative, head, N, H, WIDTH, SCALE, BLOCK_K, PRECISION,
        )  # fmt: skip
        grad_weights = products(
            grad_ptr + head * stride_gh, v_ptr + head * stride_vh, stride_gn, stride_gd, stride_vn, stride_vd,
            rows, columns, N, WIDTH, BLOCK_K, TYPE, PRECISION,
        )  # fmt: skip
        radial += tl.sum(weights * tl.where(negative, grad_weights, 0.0), 1)
    tl.store(radial_ptr + head * N + rows, radial, mask=rows < N)


@triton.jit(**PER_BATCH)
def negative_attention_grad_query_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr,  # (N, H, h), any strides
    labels_ptr,  # (N,) int64
    shares_ptr,  # (2, H, N)
    radial_ptr,  # (H, N)
    grad_q_ptr,  # (N, H, h)
    N, H, stride_gn, stride_gh, stride_gd, stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd, stride_vn, stride_vh, stride_vd,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ_i = sum_j dS_ij k_j / sqrt(h) with dS = P (dP - radial).

    A program owns BLOCK_I receivers, one head, BLOCK_D channels; P and dP are computed again. Bytes: reads all
    four operands of the head once for each block of receivers, writes grad_q.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    head = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    TYPE: tl.constexpr = shares_ptr.dtype.element_ty
    radial = tl.load(radial_ptr + head * N + rows, mask=rows < N, other=0.0)
    grad_q = tl.zeros((BLOCK_I, BLOCK_D), TYPE)
    for first in range(0, N, BLOCK_J):
        columns = first + tl.arange(0, BLOCK_J).to(tl.int64)
        negative = negatives(labels_ptr, rows, columns, N)
        weights = weights_again(
            q_ptr + head * stride_qh, k_ptr + head * stride_kh, shares_ptr, stride_qn, stride_qd, stride_kn, stride_kd,
            rows, columns, negative, head, N, H, WIDTH, SCALE, BLOCK_K, PRECISION,
        )  # fmt: skip
        grad_weights = products(
            grad_ptr + head * stride_gh, v_ptr + head * stride_vh, stride_gn, stride_gd, stride_vn, stride_vd,
            rows, columns, N, WIDTH, BLOCK_K, TYPE, PRECISION,
        )  # fmt: skip
        grad_scores = tl.where(negative, weights * (grad_weights - radial[:, None]), 0.0)
        keys = load_rows(k_ptr + head * stride_kh, stride_kn, stride_kd, columns, outputs, N, WIDTH)
        grad_q = dot(operand(grad_scores, WEIGHTED), finite(keys.to(TYPE)), grad_q, WEIGHTED)
    inside = (rows < N)[:, None] & (outputs < WIDTH)[None, :]
    store(grad_q_ptr + (rows[:, None] * H + head) * WIDTH + outputs[None, :], grad_q * SCALE, inside)


@triton.jit(**PER_BATCH)
def negative_attention_grad_sender_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr,  # (N, H, h), any strides
    labels_ptr,  # (N,) int64
    spoiled_ptr,  # (N, H) int8: rows of grad that are not finite
    shares_ptr,  # (2, H, N)
    radial_ptr,  # (H, N), None without grad_k
    grad_k_ptr, grad_v_ptr,  # (N, H, h), None where not wanted
    N, H, stride_gn, stride_gh, stride_gd, stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd, stride_vn, stride_vh, stride_vd,
    HAS_K: tl.constexpr, HAS_V: tl.constexpr,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK_j = sum_i dS_ij q_i / sqrt(h) with dS = P (dP - radial), and dV_j = sum_i P_ij dO_i.

    A program owns BLOCK_J senders, one head, BLOCK_D channels; P and dP are computed again. Bytes: reads all four
    operands of the head once for each block of senders, writes grad_k and grad_v.
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    head = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    TYPE: tl.constexpr = shares_ptr.dtype.element_ty
    grad_k = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    grad_v = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    poisoned = tl.zeros((BLOCK_J,), tl.int32)
    for first in range(0, N, BLOCK_I):
        rows = first + tl.arange(0, BLOCK_I).to(tl.int64)
        negative = negatives(labels_ptr, rows, columns, N)
        weights = weights_again(
            q_ptr + head * stride_qh, k_ptr + head * stride_kh, shares_ptr, stride_qn, stride_qd, stride_kn, stride_kd,
            rows, columns, negative, head, N, H, WIDTH, SCALE, BLOCK_K, PRECISION,
        )  # fmt: skip
        if HAS_V:
            grads = load_rows(grad_ptr + head * stride_gh, stride_gn, stride_gd, rows, outputs, N, WIDTH)
            grad_v = dot(tl.trans(operand(weights, WEIGHTED)), finite(grads.to(TYPE)), grad_v, WEIGHTED)
            spoiled = tl.load(spoiled_ptr + rows * H + head, mask=rows < N, other=0).to(tl.int32)
            poisoned = tl.maximum(poisoned, tl.max(tl.where(negative, spoiled[:, None], 0), 0))
        if HAS_K:
            grad_weights = products(
                grad_ptr + head * stride_gh, v_ptr + head * stride_vh, stride_gn, stride_gd, stride_vn, stride_vd,
                rows, columns, N, WIDTH, BLOCK_K, TYPE, PRECISION,
            )  # fmt: skip
            radial = tl.load(radial_ptr + head * N + rows, mask=rows < N, other=0.0)
            grad_scores = tl.where(negative, weights * (grad_weights - radial[:, None]), 0.0)
            queries = load_rows(q_ptr + head * stride_qh, stride_qn, stride_qd, rows, outputs, N, WIDTH)
            grad_k = dot(tl.trans(operand(grad_scores, WEIGHTED)), finite(queries.to(TYPE)), grad_k, WEIGHTED)
    inside = (columns < N)[:, None] & (outputs < WIDTH)[None, :]
    place = (columns[:, None] * H + head) * WIDTH + outputs[None, :]
    if HAS_K:
        store(grad_k_ptr + place, grad_k * SCALE, inside)
    if HAS_V:
        store(grad_v_ptr + place, tl.where((poisoned > 0)[:, None], float("nan"), grad_v), inside)
