"""Gradients of (24) without a panel of logits in memory: a tile of them goes from registers into the next product.

Owns two kernels for narrow rows, whose sums fit into registers beside a tile of logits, and their launcher. Every logit
is computed once more than with panels, which cost more than that where a row has few channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import dot, round_to
from gcng.kernels.launch import Schedule, launch
from gcng.kernels.logit_tiles import PER_BATCH, tile_of_gradient


@triton.jit(**PER_BATCH)
def logit_rows_gradient_kernel(
    rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr,
    parts_ptr,  # (S, R, D)
    num_rows, num_classes, width, tiles_per_split,
    stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """sum_c g_rc w_c over a split of the classes, g = scale (softmax - [class = target]) rounded to an operand: (24).

    A program owns BLOCK_R rows and all of their channels, and walks over tiles_per_split tiles of classes. Reads rows
    and weight from the cache for each tile, writes one row a split.
    rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64. lse: (R,) float64. scale: (R,).
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    row = tl.minimum(place, num_rows - 1)
    column = tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_W).to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_W), ACCUMULATOR)
    for tile in range(tiles_per_split):
        start = (split.to(tl.int64) * tiles_per_split + tile) * BLOCK_C
        known = start + column < num_classes
        classes = tl.minimum(start + column, num_classes - 1)
        gradient = tile_of_gradient(
            rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr, row, start, num_classes, width,
            stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
            BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, PRECISION, ACCUMULATOR,
        )  # fmt: skip
        gradient = tl.where(known[None, :], gradient, 0.0)
        ptrs = weight_ptr + classes[:, None] * stride_weight_c + channel[None, :] * stride_weight_d
        weight = tl.load(ptrs, mask=known[:, None] & (channel < WIDTH)[None, :], other=0.0)
        total = dot(round_to(gradient, weight_ptr.dtype.element_ty), weight, total, PRECISION)
    target = parts_ptr + (split.to(tl.int64) * num_rows + place)[:, None] * WIDTH + channel[None, :]
    tl.store(target, total, mask=(place < num_rows)[:, None] & (channel < WIDTH)[None, :])


@triton.jit(**PER_BATCH)
def logit_weight_gradient_kernel(
    rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr,
    parts_ptr,  # (S, C, D)
    bias_parts_ptr,  # (S, C) or None
    num_rows, num_classes, width, tiles_per_split,
    stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """sum_r g_rc x_r over a split of the rows, and sum_r g_rc, with g of logit_rows_gradient_kernel: (24).

    A program owns BLOCK_C classes and all of their channels, and walks over tiles_per_split tiles of rows.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_C
    split = tl.program_id(1)
    column = tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_W).to(tl.int64)
    total = tl.zeros((BLOCK_C, BLOCK_W), ACCUMULATOR)
    summed = tl.zeros((BLOCK_C,), ACCUMULATOR)
    for tile in range(tiles_per_split):
        first = (split.to(tl.int64) * tiles_per_split + tile) * BLOCK_R
        known = first + tl.arange(0, BLOCK_R) < num_rows
        row = tl.minimum(first + tl.arange(0, BLOCK_R), num_rows - 1)
        gradient = tile_of_gradient(
            rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr, row, place, num_classes, width,
            stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
            BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, PRECISION, ACCUMULATOR,
        )  # fmt: skip
        gradient = tl.where(known[:, None], gradient, 0.0)
        summed += tl.sum(gradient, 0)
        ptrs = rows_ptr + row[:, None] * stride_rows_r + channel[None, :] * stride_rows_d
        x = tl.load(ptrs, mask=known[:, None] & (channel < WIDTH)[None, :], other=0.0)
        total = dot(tl.trans(round_to(gradient, rows_ptr.dtype.element_ty)), x, total, PRECISION)
    inside = place + column < num_classes
    part = split.to(tl.int64) * num_classes + place + column
    target = parts_ptr + part[:, None] * WIDTH + channel[None, :]
    tl.store(target, total, mask=inside[:, None] & (channel < WIDTH)[None, :])
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part, summed, mask=inside)


def _splits(blocks: int, steps: int, programs: int) -> tuple[int, int]:
    """Splits of a walk over ``steps`` tiles beside ``blocks`` programs, and the tiles of each."""
    per_split = triton.cdiv(max(steps, 1), max(1, programs // max(blocks, 1)))
    return triton.cdiv(max(steps, 1), per_split), per_split


Tile = tuple[Schedule, dict[str, object]]  # schedule and constants of a tile of logits


def gradients_without_panels(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor],
    strides: tuple[int, ...],
    by_rows: Tile,
    by_classes: Tile,
    programs: int,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of rows (R, D), weight (C, D) and bias (C,) in the dtype of ``scale``, None where not ``needed``.

    operands: rows (R, D), weight (C, D), bias (C,) or None, target (R,) int64, lse (R,) float64 and scale (R,), the
    last two contiguous; R > 0. strides: of the first four. by_rows, by_classes: tiles of the two kernels, with the
    channels of a step of the forward. programs: wanted at once.

    Memory: results once for each split of the classes, or of the rows.
    """
    rows, weight, *_, scale = operands
    sizes = num_rows, num_classes, width = rows.shape[0], weight.shape[0], rows.shape[1]
    whole = {"WIDTH": width, "BLOCK_W": max(16, triton.next_power_of_2(width))}
    grads: list[Tensor | None] = [None, None, None]
    if needed[0]:
        schedule, tile = by_rows
        count = triton.cdiv(num_rows, tile["BLOCK_R"])
        splits, per_split = _splits(count, triton.cdiv(num_classes, tile["BLOCK_C"]), programs)
        parts = scale.new_empty((splits, num_rows, width))
        launch(
            logit_rows_gradient_kernel, (count, splits), *operands, parts, *sizes, per_split, *strides,
            schedule=schedule, **tile, **whole,
        )  # fmt: skip
        grads[0] = parts.sum(0)
    if needed[1] or needed[2]:
        schedule, tile = by_classes
        count = triton.cdiv(num_classes, tile["BLOCK_C"])
        splits, per_split = _splits(count, triton.cdiv(num_rows, tile["BLOCK_R"]), programs)
        parts = scale.new_empty((splits, num_classes, width))
        bias_parts = scale.new_empty((splits, num_classes)) if needed[2] else None
        launch(
            logit_weight_gradient_kernel, (count, splits), *operands, parts, bias_parts, *sizes, per_split, *strides,
            schedule=schedule, **tile, **whole,
        )  # fmt: skip
        grads[1] = parts.sum(0) if needed[1] else None
        grads[2] = None if bias_parts is None else bias_parts.sum(0)
    return grads
