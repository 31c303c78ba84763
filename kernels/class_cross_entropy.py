"""Streamed logits (24) on a GPU: log-sum-exp and its gradient, the logits of all rows and classes never stored.

Owns the launchers and launch tables of the kernels in ``logit_tiles``. The gradient goes through panels of
``softmax - target``, rounded to the operands' type, whose two products are matrix products of torch; for narrow rows
there is a form without panels too (``logit_gradients``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from gcng.kernels.launch import CompilationCase, Schedule, input_precision, launch
from gcng.kernels.logit_gradients import gradients_without_panels
from gcng.kernels.logit_tiles import (
    streamed_logit_panel_kernel,
    streamed_logsumexp_combine_kernel,
    streamed_logsumexp_forward_kernel,
)

# Programs wanted at once, about two for each multiprocessor of a large GPU; a constant, so that sums never depend
# on the machine.
PROGRAMS = 264
# Elements of a panel of gradients. Wide rows hide its traffic behind their products; narrow ones want it in the cache.
PANEL = 2**25
NARROW_PANEL, NARROW = 2**23, 256
# A float16 panel holds this much for softmax = 1, so that a softmax of 1e-8 is still a normal number.
HALF_RANGE = 2.0**14
# Whether narrow rows (:func:`takes_no_panel`) do without panels. They save writing a panel and reading it twice, and
# compute every logit once more; not timed on a GPU, so what ships is the form whose products are the library's.
WITHOUT_PANELS = False
TRITON_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32}


@dataclass(frozen=True)
class LogitTile(Schedule):
    """Tile of logits that one program owns, and the channels that it multiplies at a time."""

    block_rows: int = 128
    block_classes: int = 128
    block_channels: int = 64


def logit_tile(dtype: torch.dtype, width: int, tf32: bool) -> LogitTile:
    """The one tile for a dtype and a number of channels; forward and backward must take the same.

    All supported architectures take the same too. Rows whose length is no multiple of 16 are loaded channel by
    channel, with a pointer each: small tiles keep those in registers.
    """
    if dtype == torch.float64:
        return LogitTile(4, 2, 32, 32, 16)
    if width % 16 != 0 or (dtype == torch.float32 and not tf32):
        return LogitTile(8, 2, 64, 64, 32)
    return LogitTile(8, 3, 128, 128, 32 if dtype == torch.float32 else 64)


def takes_no_panel(dtype: torch.dtype, width: int) -> bool:
    """Whether the sums of a tile of rows fit into registers beside a tile of logits, and tensor cores multiply them."""
    return dtype in (torch.float16, torch.bfloat16) and width <= 128 and width % 16 == 0


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _strides(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[int, ...]:
    return (*rows.stride(), *weight.stride(), 1 if bias is None else bias.stride(0), target.stride(0))


def _tile_constants(rows: Tensor, tile: LogitTile, precision: str) -> dict[str, object]:
    return {
        "BLOCK_R": tile.block_rows,
        "BLOCK_C": tile.block_classes,
        "BLOCK_D": tile.block_channels,
        "EVEN_D": rows.shape[1] % tile.block_channels == 0,
        "PRECISION": precision,
        "ACCUMULATOR": TRITON_TYPES[_compute_dtype(rows.dtype)],
    }


def _choose_tile(rows: Tensor) -> tuple[LogitTile, str]:
    precision = input_precision(rows.dtype)
    return logit_tile(rows.dtype, rows.shape[1], precision == "tf32"), precision


def class_splits(num_rows: int, num_classes: int, tile: LogitTile) -> tuple[int, int]:
    """Splits of the classes in the forward, and the tiles in each: enough programs where there are few rows."""
    tiles = -(-num_classes // tile.block_classes)
    wanted = -(-PROGRAMS // max(1, -(-num_rows // tile.block_rows)))
    per_split = max(-(-tiles // wanted), min(tiles, 4))
    return -(-tiles // per_split), per_split


def panel_shape(num_rows: int, num_classes: int, width: int, tile: LogitTile, shrink: int = 1) -> tuple[int, int]:
    """Rows and classes of a panel of gradients in the backward, multiples of the tile unless they are all.

    shrink: by how much smaller than it should be, where memory is short.
    """
    size = (PANEL if width > NARROW else NARROW_PANEL) // shrink
    classes = min(num_classes, max(size // max(num_rows, 1), 2**14) // tile.block_classes * tile.block_classes)
    rows = max(size // classes // tile.block_rows, 1) * tile.block_rows
    return min(num_rows, rows), classes


def streamed_logsumexp_forward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """``gcng.ops.streamed_logits.streamed_logsumexp`` on a GPU: same arguments, same results.

    rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64, all of one device and any strides.

    Returns lse (R,) float64 and target_logit (R,), float32 or, for float64 rows, float64; NaN where the target lies
    outside [0, C). Memory: two numbers for each row and split of the classes.
    """
    dtype = _compute_dtype(rows.dtype)
    (num_rows, width), num_classes = rows.shape, weight.shape[0]
    tile, precision = _choose_tile(rows)
    splits, per_split = class_splits(num_rows, num_classes, tile)
    maximum, total = rows.new_empty((2, splits, num_rows), dtype=dtype).unbind()
    target_logit = rows.new_full((num_rows,), math.nan, dtype=dtype)
    lse = rows.new_empty((num_rows,), dtype=torch.float64)
    launch(
        streamed_logsumexp_forward_kernel, (-(-num_rows // tile.block_rows), splits),
        rows, weight, bias, target, maximum, total, target_logit,
        num_rows, num_classes, width, per_split, *_strides(rows, weight, bias, target),
        schedule=tile, **_tile_constants(rows, tile, precision),
    )  # fmt: skip
    launch(
        streamed_logsumexp_combine_kernel, (-(-num_rows // 128),), maximum, total, lse, num_rows, splits,
        schedule=Schedule(), BLOCK_R=128, ACCUMULATOR=TRITON_TYPES[dtype],
    )  # fmt: skip
    return lse, target_logit


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` summed and returned in ``dtype``."""
    if a.dtype == dtype:
        return a @ b
    # The products of 16-bit numbers that a CPU, in the interpreter, cannot return in float32.
    return torch.mm(a.to(dtype), b.to(dtype)) if a.device.type == "cpu" else torch.mm(a, b, out_dtype=dtype)


def _panel_unit(rows: Tensor, row_scale: Tensor) -> Tensor | None:
    """0-dim: what a 1 in a panel of 16 bits stands for, None for the wider types.

    With the largest row scale taken out, equal scales leave ``softmax - target`` itself to be rounded. Rounding it
    times 1 / N would shift all saturated rows, which hold the same number, to the same side.
    """
    if rows.element_size() > 2:
        return None
    # A `torch.where` with a number would fill a tensor with it first, one more kernel.
    largest = row_scale.abs().nan_to_num_(0.0, 0.0, 0.0).amax().float()
    unit = largest.masked_fill_(largest == 0, 1.0)
    return unit.div_(HALF_RANGE) if rows.dtype == torch.float16 else unit


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
    shrink: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gcng.ops.streamed_logits.streamed_logit_gradient`` on a GPU: same arguments, same results.

    rows: (R, D). weight: (C, D). bias: (C,) or None. target: (R,) int64. lse: (R,) float64. row_scale: (R,).
    shrink: of :func:`panel_shape`.

    Returns grad_rows (R, D), grad_weight (C, D), grad_bias (C,), None where not needed. Sums run over panels in
    their order, in float32 (float64 for float64 rows). Memory: the results and one panel (:func:`panel_shape`).
    """
    dtype = _compute_dtype(rows.dtype)
    (num_rows, width), num_classes = rows.shape, weight.shape[0]
    wants_bias = bias is not None and (need_weight if need_bias is None else need_bias)
    if num_rows == 0:
        of_weight, of_bias = (weight.shape, weight_dtype or weight.dtype), ((num_classes,), dtype)
        wanted = ((need_rows, ((0, width), dtype)), (need_weight, of_weight), (wants_bias, of_bias))
        return tuple(rows.new_zeros(shape, dtype=kind) if need else None for need, (shape, kind) in wanted)
    unit = _panel_unit(rows, row_scale)
    scale = row_scale.to(dtype, copy=True) if unit is None else row_scale.to(dtype) / unit
    scale.masked_fill_((target < 0) | (target >= num_classes), math.nan)
    if WITHOUT_PANELS and takes_no_panel(rows.dtype, width):
        grads = _gradients_without_panels(
            (rows, weight, bias, target, lse.contiguous(), scale), [need_rows, need_weight, wants_bias]
        )
        grad_rows, grad_weight, grad_bias = (None if x is None else x.mul_(unit) for x in grads)
        return grad_rows, None if grad_weight is None else grad_weight.to(weight_dtype or weight.dtype), grad_bias
    panel_of = _panel_maker(rows, weight, bias, target, lse.contiguous(), scale, wants_bias)
    row_block, class_block = panel_shape(num_rows, num_classes, width, _choose_tile(rows)[0], shrink)
    by_row, by_class = list(_spans(num_rows, row_block)), list(_spans(num_classes, class_block))
    # Of one panel the products are the results: no zeros to add them to, and nothing to copy.
    grad_rows = rows.new_zeros((num_rows, width), dtype=dtype) if need_rows and len(by_row) > 1 else None
    grad_weight = grad_bias = None
    if len(by_class) > 1:
        grad_weight = weight.new_empty(weight.shape, dtype=weight_dtype or weight.dtype) if need_weight else None
        grad_bias = rows.new_empty((num_classes,), dtype=dtype) if wants_bias else None
    for classes in by_class:
        block_grad = block_bias = None
        for part in by_row:
            panel, bias_parts = panel_of(part, classes)
            if need_rows:
                product = _product(panel, weight[classes], dtype)
                grad_rows = _plus(grad_rows, None if len(by_row) == 1 else part, product)
            if need_weight:
                block_grad = _plus(block_grad, None, _product(panel.T, rows[part], dtype))
            if wants_bias:
                block_bias = _plus(block_bias, None, bias_parts.sum(0))
        if need_weight:
            block_grad = block_grad if unit is None else block_grad.mul_(unit)
            grad_weight = _placed(grad_weight, classes, block_grad, weight_dtype or weight.dtype)
        if wants_bias:
            grad_bias = _placed(grad_bias, classes, block_bias, dtype)
    if unit is not None:
        grad_rows, grad_bias = (None if x is None else x.mul_(unit) for x in (grad_rows, grad_bias))
    return grad_rows, grad_weight, grad_bias


def _plus(total: Tensor | None, part: slice | None, value: Tensor) -> Tensor:
    """Add ``value`` to ``total``, or to a ``part`` of it; the first value is the sum so far."""
    if total is None:
        return value
    (total if part is None else total[part]).add_(value)
    return total


def _placed(whole: Tensor | None, part: slice, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Write ``value`` to a ``part`` of ``whole``; alone it is the whole, in ``dtype``."""
    if whole is None:
        return value.to(dtype)
    whole[part] = value
    return whole


def _gradients_without_panels(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor], needed: list[bool]
) -> list[Tensor | None]:
    """:func:`gcng.kernels.logit_gradients.gradients_without_panels` on the tiles that belong to the forward's."""
    tile, precision = _choose_tile(operands[0])
    # Half as many logits at a time leave registers for the sums; channels of a step stay those of the forward.
    by_rows = replace(tile, num_stages=2, block_classes=max(16, tile.block_classes // 2))
    by_classes = replace(tile, num_stages=2, block_rows=max(16, tile.block_rows // 2))
    tiles = [(each, _tile_constants(operands[0], each, precision)) for each in (by_rows, by_classes)]
    return gradients_without_panels(operands, _strides(*operands[:4]), *tiles, PROGRAMS, needed)


def _panel_maker(
    rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, scale: Tensor, wants_bias: bool
) -> Callable[[slice, slice], tuple[Tensor, Tensor | None]]:
    """A function from spans of rows and classes to the panel and to its sums over tiles of rows."""
    tile, precision = _choose_tile(rows)
    constants = _tile_constants(rows, tile, precision)

    def make(part: slice, classes: slice) -> tuple[Tensor, Tensor | None]:
        shape = part.stop - part.start, classes.stop - classes.start
        row_tiles, class_tiles = -(-shape[0] // tile.block_rows), -(-shape[1] // tile.block_classes)
        panel = rows.new_empty(shape)
        bias_parts = rows.new_empty((row_tiles, shape[1]), dtype=scale.dtype) if wants_bias else None
        launch(
            streamed_logit_panel_kernel, (row_tiles * class_tiles,),
            rows, weight, bias, target, lse, scale, panel, bias_parts,
            rows.shape[0], weight.shape[0], rows.shape[1], part.start, classes.start, *shape,
            *_strides(rows, weight, bias, target), schedule=tile, **constants,
        )  # fmt: skip
        return panel, bias_parts

    return make


def _both_passes_on_meta(dtype: torch.dtype, width: int, with_bias: bool) -> None:
    rows, weight = (torch.empty(count, width, dtype=dtype, device="meta") for count in (4096, 11318))
    bias = torch.empty(11318, dtype=dtype, device="meta") if with_bias else None
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    lse, _ = streamed_logsumexp_forward(rows, weight, bias, target)
    scale = torch.empty(4096, device="meta")
    streamed_logit_gradient(rows, weight, bias, target, lse, scale, need_weight=True)


def _gradients_without_panels_on_meta(dtype: torch.dtype, width: int) -> None:
    rows, weight = (torch.empty(count, width, dtype=dtype, device="meta") for count in (4096, 11318))
    bias = torch.empty(11318, dtype=dtype, device="meta")
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    lse, scale = torch.empty(4096, dtype=torch.float64, device="meta"), torch.empty(4096, device="meta")
    _gradients_without_panels((rows, weight, bias, target, lse, scale), [True] * 3)


def compilation_cases() -> Iterator[CompilationCase]:
    """Both passes for every operand type, with everything that they can be asked for, and with the least."""
    kinds = [(dtype, False) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    for dtype, tf32 in [*kinds, (torch.float32, True)]:
        name = str(dtype).removeprefix("torch.") + (" tf32" if tf32 else "")
        # On sm_100 a tile beside a bias of 16 bits spills behind its loop.
        yield CompilationCase(
            name, partial(_both_passes_on_meta, dtype, 512, True), tf32=tf32, spills={"streamed_logit_panel_kernel": 96}
        )
    # Rows of 100 bytes cannot be copied asynchronously on sm_80.
    yield CompilationCase(
        "bfloat16, odd width", partial(_both_passes_on_meta, torch.bfloat16, 50, False),
        without_tensor_cores=frozenset({"streamed_logsumexp_forward_kernel", "streamed_logit_panel_kernel"}),
    )  # fmt: skip
    for dtype, width in ((torch.bfloat16, 128), (torch.float16, 64)):
        name = f"{str(dtype).removeprefix('torch.')} {width}, no panels"
        yield CompilationCase(name, partial(_gradients_without_panels_on_meta, dtype, width))
