"""GPU programs of (24) around a tile of logits, which stays in registers; launched by ``class_cross_entropy``.

Forward and backward multiply a tile in the same order, so that the logit of a confident row comes out with the bits
that its log-sum-exp was made from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gcng.kernels.arithmetic import dot, store
from gcng.kernels.launch import unspecialized

# The sizes of a panel are not among them: its aligned rows are written 16 bytes at a time, and a last tile of whole
# rows takes fewer registers.
PER_BATCH = unspecialized(
    ("num_rows", "num_classes", "tiles_per_split", "num_splits"),
    ("target_ptr", "maximum_ptr", "total_ptr", "target_logit_ptr", "lse_ptr", "scale_ptr"),
)


@triton.jit
def tile_of_logits(
    rows_ptr, weight_ptr, bias_ptr, row, column, width,
    stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """A tile of ``rows @ weight.T + bias``, (BLOCK_R, BLOCK_C); row and column: int64 indices within range."""
    channel = tl.arange(0, BLOCK_D)
    rows_ptrs = rows_ptr + row[:, None] * stride_rows_r + channel[None, :].to(tl.int64) * stride_rows_d
    weight_ptrs = weight_ptr + column[None, :] * stride_weight_c + channel[:, None].to(tl.int64) * stride_weight_d
    logits = tl.zeros((BLOCK_R, BLOCK_C), ACCUMULATOR)
    for start in range(0, width, BLOCK_D):
        if EVEN_D:
            x = tl.load(rows_ptrs)
            w = tl.load(weight_ptrs)
        else:
            x = tl.load(rows_ptrs, mask=channel[None, :] < width - start, other=0.0)
            w = tl.load(weight_ptrs, mask=channel[:, None] < width - start, other=0.0)
        logits = dot(x, w, logits, PRECISION)
        # In 64 bits: the channels of a transposed matrix of many classes are far apart.
        rows_ptrs += BLOCK_D * tl.cast(stride_rows_d, tl.int64)
        weight_ptrs += BLOCK_D * tl.cast(stride_weight_d, tl.int64)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + column * stride_bias).to(ACCUMULATOR)[None, :]
    return logits


@triton.jit
def _place_of_target(target_ptr, stride_target, row, start, num_classes, BLOCK_C: tl.constexpr):
    """Column of each row's target in the tile of classes from ``start``, int32, -1 where it lies elsewhere."""
    target = tl.load(target_ptr + row * stride_target)
    inside = (target >= start) & (target < start + BLOCK_C) & (target < num_classes)
    return tl.where(inside, target - start, -1).to(tl.int32)


@triton.jit(**PER_BATCH)
def streamed_logsumexp_forward_kernel(
    rows_ptr, weight_ptr, bias_ptr, target_ptr, maximum_ptr, total_ptr, target_logit_ptr,
    num_rows, num_classes, width, tiles_per_split,
    stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Running maximum m and sum of exp(logit - m) over one split of the classes, for (24).

    A program owns BLOCK_R rows and tiles_per_split tiles of classes: its entries of maximum and total, (S, R), and
    the target logits, (R,), of the rows whose target lies in its split. Reads rows D/BLOCK_D times per tile of
    classes, from the cache, and BLOCK_C D of weight; writes two numbers per row.
    rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    stored = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    column = tl.arange(0, BLOCK_C)
    maximum = tl.full((BLOCK_R,), -float("inf"), ACCUMULATOR)
    total = tl.zeros((BLOCK_R,), ACCUMULATOR)
    for tile in range(tiles_per_split):
        start = (split.to(tl.int64) * tiles_per_split + tile) * BLOCK_C
        logits = tile_of_logits(
            rows_ptr, weight_ptr, bias_ptr, row, tl.minimum(start + column, num_classes - 1), width,
            stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias,
            BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, PRECISION, ACCUMULATOR,
        )  # fmt: skip
        place = _place_of_target(target_ptr, stride_target, row, start, num_classes, BLOCK_C)
        chosen = tl.sum(tl.where(column[None, :] == place[:, None], logits, 0.0), axis=1)
        tl.store(target_logit_ptr + row, chosen, mask=stored & (place >= 0))
        logits = tl.where((start + column < num_classes)[None, :], logits, -float("inf"))
        raised = tl.maximum(maximum, tl.max(logits, axis=1))
        # A row whose logits are all -inf so far keeps the sum 0 instead of exp(-inf + inf).
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        maximum = raised
    place = split.to(tl.int64) * num_rows + row
    tl.store(maximum_ptr + place, maximum, mask=stored)
    tl.store(total_ptr + place, total, mask=stored)


@triton.jit(**PER_BATCH)
def streamed_logsumexp_combine_kernel(
    maximum_ptr, total_ptr, lse_ptr, num_rows, num_splits, BLOCK_R: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """Log-sum-exp (R,) float64 from the maxima and sums (S, R) of the splits, in their order.

    A program owns BLOCK_R rows; it reads two numbers per row and split.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored = row < num_rows
    maximum = tl.full((BLOCK_R,), -float("inf"), ACCUMULATOR)
    for split in range(num_splits):
        place = tl.cast(split, tl.int64) * num_rows + row
        part = tl.load(maximum_ptr + place, mask=stored, other=0.0)
        # A NaN must survive, which tl.maximum does not promise.
        maximum = tl.where((part > maximum) | (part != part), part, maximum)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.zeros((BLOCK_R,), tl.float64)
    for split in range(num_splits):
        place = tl.cast(split, tl.int64) * num_rows + row
        part = tl.load(maximum_ptr + place, mask=stored, other=0.0)
        summed = tl.load(total_ptr + place, mask=stored, other=1.0)
        total += summed.to(tl.float64) * tl.exp((part - shift).to(tl.float64))
    tl.store(lse_ptr + row, maximum.to(tl.float64) + tl.log(total), mask=stored)


@triton.jit
def _exp_minus_one(x):
    """exp(x) - 1 for x <= 1/2, as accurate as its type near 0; sixteen terms are enough for float64."""
    series = 1.0 + x * 0.0
    for term in tl.static_range(15):
        series = 1.0 + series * x * (1.0 / (16 - term))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def tile_of_gradient(
    rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr, row, start, num_classes, width,
    stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """``scale (softmax - [class = target])``, (BLOCK_R, BLOCK_C), classes from ``start`` on; logits computed again.

    row: int64 indices within range. Classes beyond the last are those of the last: the caller leaves them out.
    """
    column = tl.arange(0, BLOCK_C)
    logits = tile_of_logits(
        rows_ptr, weight_ptr, bias_ptr, row, tl.minimum(start + column, num_classes - 1), width,
        stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias,
        BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, PRECISION, ACCUMULATOR,
    )  # fmt: skip
    lse = tl.load(lse_ptr + row)
    # lse in two parts: rounding it alone would cost as many digits as it has.
    high = lse.to(ACCUMULATOR)
    low = (lse - high.to(tl.float64)).to(ACCUMULATOR)
    scale = tl.load(scale_ptr + row).to(ACCUMULATOR)
    place = _place_of_target(target_ptr, stride_target, row, start, num_classes, BLOCK_C)
    is_target = column[None, :] == place[:, None]
    shifted = logits - high[:, None]
    # softmax - 1 from the exponent, before any rounding: near 1 the difference is all there is.
    exponent = tl.sum(tl.where(is_target, shifted, 0.0), axis=1) - low
    minus_one = _exp_minus_one(tl.where(place >= 0, exponent, 0.0)) * scale
    gradient = tl.exp(shifted) * (scale * tl.exp(-low))[:, None]
    return tl.where(is_target, minus_one[:, None], gradient)


@triton.jit(**PER_BATCH)
def streamed_logit_panel_kernel(
    rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr, panel_ptr, bias_parts_ptr,
    num_rows, num_classes, width, first_row, first_class, panel_rows, panel_classes,
    stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Gradient of (24) with respect to a panel of logits: ``scale (softmax - [class = target])``.

    A program owns one tile of the panel and, for the bias, its sum over rows; the logits are computed again, in the
    order of the forward. Reads D (BLOCK_R + BLOCK_C) operands for each tile, writes the panel once.
    rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64. lse: (R,) float64. scale: (R,).
    panel: (panel_rows, panel_classes), contiguous. bias_parts: (tiles of rows, panel_classes) or None.
    """
    class_tiles = tl.cdiv(panel_classes, BLOCK_C)
    row_tile, class_tile = tl.program_id(0) // class_tiles, tl.program_id(0) % class_tiles
    place_row = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored_row = place_row < panel_rows
    row = tl.minimum(first_row + place_row, num_rows - 1)
    column = tl.arange(0, BLOCK_C)
    place_class = class_tile.to(tl.int64) * BLOCK_C + column
    stored_class = place_class < panel_classes
    start = first_class + class_tile.to(tl.int64) * BLOCK_C
    gradient = tile_of_gradient(
        rows_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, scale_ptr, row, start, num_classes, width,
        stride_rows_r, stride_rows_d, stride_weight_c, stride_weight_d, stride_bias, stride_target,
        BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, PRECISION, ACCUMULATOR,
    )  # fmt: skip
    places = place_row[:, None] * panel_classes + place_class[None, :]
    store(panel_ptr + places, gradient, stored_row[:, None] & stored_class[None, :])
    if bias_parts_ptr is not None:
        summed = tl.sum(tl.where(stored_row[:, None], gradient, 0.0), axis=0)
        tl.store(bias_parts_ptr + row_tile.to(tl.int64) * panel_classes + place_class, summed, mask=stored_class)
