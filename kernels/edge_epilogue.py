"""What an edge layer does behind its second product (13): hidden norm, residual, gelu and norm, and the backward."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import gelu, gelu_and_derivative, round_to, store
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import (
    PER_TILE,
    TRITON_TYPES,
    PairSchedule,
    Rectangle,
    add_parts,
    blocks,
    is_exact,
    load_node,
    load_rows,
    normalize,
    normalize_backward,
    own_columns,
    packed_place,
    store_part,
    whole_row_schedule,
)


def epilogue_schedule(width: int, dtype: torch.dtype, *, backward: bool = False) -> PairSchedule:
    """Of both kernels."""
    return whole_row_schedule(width, dtype, backward=backward)


@triton.jit(**PER_TILE)
def edge_epilogue_kernel(
    y_ptr,  # (R S, D) product of the folded map and the hidden layer, becomes w2 where KEEP
    x_ptr,  # (R S, D)
    mean_ptr, rstd_ptr,  # (R S,) of the hidden layer
    row_sums_ptr, shift_ptr, ln_weight_ptr, ln_bias_ptr,  # (D,)
    stash_ptr,  # (P, D) or None, receives w2
    out_ptr,  # (R S, D), or (P, D) where PACKED
    n, r0, c0, columns,
    KEEP: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w2 = s (y - m c1) + c2 + x with the hidden norm folded (I4), and LN(gelu(w2)): (13).

    A program owns BLOCK_J columns of one row, all channels. Bytes for each pair: reads y and x, writes the edge, w2
    where it is kept and, above the diagonal, the stash.
    """
    i, first = own_columns(columns, BLOCK_J)
    j = first + tl.arange(0, BLOCK_J)
    row, column, place, stored = r0 + i, c0 + j, i * columns + j, j < columns
    channel = tl.arange(0, BLOCK_D)
    within = (channel < WIDTH)[None, :]
    packed = packed_place(row, column, n)
    upper = (stored & (column >= row))[:, None] & within
    mean = tl.load(mean_ptr + place, mask=stored, other=0.0).to(TYPE)
    rstd = tl.load(rstd_ptr + place, mask=stored, other=0.0).to(TYPE)
    y = load_rows(y_ptr, place, channel, stored, WIDTH, TYPE)
    y = (y - mean[:, None] * load_node(row_sums_ptr, 0, channel, WIDTH, TYPE)[None, :]) * rstd[:, None]
    y += load_node(shift_ptr, 0, channel, WIDTH, TYPE)[None, :] + load_rows(x_ptr, place, channel, stored, WIDTH, TYPE)
    if KEEP:
        store(y_ptr + place[:, None] * WIDTH + channel[None, :], y, stored[:, None] & within)
    if stash_ptr is not None:
        store(stash_ptr + packed[:, None] * WIDTH + channel[None, :], y, upper)
    normalized, _ = normalize(gelu(y, EXACT), channel, WIDTH)
    gain = load_node(ln_weight_ptr, 0, channel, WIDTH, TYPE)[None, :]
    value = normalized * gain + load_node(ln_bias_ptr, 0, channel, WIDTH, TYPE)[None, :]
    if PACKED:
        store(out_ptr + packed[:, None] * WIDTH + channel[None, :], value, upper)
    else:
        store(out_ptr + place[:, None] * WIDTH + channel[None, :], value, stored[:, None] & within)


@triton.jit(**PER_TILE)
def edge_epilogue_backward_kernel(
    grad_ptr,  # (R S, D) of the edge, or (P, D) where GRAD_PACKED; may be out
    w2_ptr,  # (R S, D), or (P, D) where PACKED
    x_ptr,  # (R S, D)
    mean_ptr, rstd_ptr,  # (R S,) of the hidden layer
    row_sums_ptr, shift_ptr, ln_weight_ptr,  # (D,)
    out_ptr, scaled_ptr,  # (R S, D)
    mean_grad_ptr, mean_product_ptr,  # (R S,)
    sums_ptr,  # (4, R runs, D) parts of the gradients of ln_weight, ln_bias, shift, folded_mean
    n, r0, c0, columns,
    GRAD_PACKED: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dy, the backward of LN(gelu(w2)), the product's gradient s dy, and the hidden norm's two row means.

    The means (dy . c1) / H and (dy . (y - c2)) / H of the norm's backward are sums over D channels, known before any
    product of width H (docs/derivations.md). A program owns STEPS runs of BLOCK_J columns of one row, all channels,
    and their part of sum de xhat, sum de, sum dy and sum s m dy. Bytes for each pair: reads de, w2 and x, writes dy,
    s dy and two numbers. A packed gradient belongs to its evaluation above the diagonal.
    """
    i, first = own_columns(columns, BLOCK_J * STEPS)
    row = r0 + i
    channel = tl.arange(0, BLOCK_D)
    gain = load_node(ln_weight_ptr, 0, channel, WIDTH, TYPE)[None, :]
    row_sums = load_node(row_sums_ptr, 0, channel, WIDTH, TYPE)[None, :]
    shift = load_node(shift_ptr, 0, channel, WIDTH, TYPE)[None, :]
    gain_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    bias_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    shift_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    mean_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    for step in range(STEPS):
        j = first + step * BLOCK_J + tl.arange(0, BLOCK_J)
        column, place, stored = c0 + j, i * columns + j, j < columns
        packed = packed_place(row, column, n)
        if GRAD_PACKED:
            grad = load_rows(grad_ptr, packed, channel, stored & (column >= row), WIDTH, TYPE)
        else:
            grad = load_rows(grad_ptr, place, channel, stored, WIDTH, TYPE)
        w2 = load_rows(w2_ptr, packed if PACKED else place, channel, stored, WIDTH, TYPE)
        u, slope = gelu_and_derivative(w2, EXACT)
        normalized, deviation = normalize(u, channel, WIDTH)
        gain_sum += grad * normalized
        bias_sum += grad
        grad = normalize_backward(grad * gain, normalized, deviation, channel, WIDTH) * slope
        shift_sum += grad
        mean = tl.load(mean_ptr + place, mask=stored, other=0.0).to(TYPE)
        rstd = tl.load(rstd_ptr + place, mask=stored, other=0.0).to(TYPE)
        # Rounded first: the same numbers go into the product that this sum is taken off.
        scaled = round_to(grad * rstd[:, None], scaled_ptr.dtype.element_ty)
        mean_sum += scaled.to(TYPE) * mean[:, None]
        mapped = w2 - load_rows(x_ptr, place, channel, stored, WIDTH, TYPE) - shift
        inside = stored[:, None] & (channel < WIDTH)[None, :]
        offsets = place[:, None] * WIDTH + channel[None, :]
        store(out_ptr + offsets, grad, inside)
        tl.store(scaled_ptr + offsets, scaled, mask=inside)
        tl.store(mean_grad_ptr + place, tl.sum(grad * row_sums, 1) / (4 * WIDTH), mask=stored)
        tl.store(mean_product_ptr + place, tl.sum(grad * mapped, 1) / (4 * WIDTH), mask=stored)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    store_part(sums_ptr, gain_sum, channel, WIDTH, program)
    store_part(sums_ptr, bias_sum, channel, WIDTH, programs + program)
    store_part(sums_ptr, shift_sum, channel, WIDTH, 2 * programs + program)
    store_part(sums_ptr, mean_sum, channel, WIDTH, 3 * programs + program)


def edge_epilogue(
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    prepared: Any,
    n: int,
    tile: Rectangle,
    out: Tensor,
    packed: bool,
    stash: Tensor | None,
    keep: bool = True,
) -> None:
    """The hidden norm on ``y`` (R S, D), residual, gelu and norm, to ``out``: (R S, D), or (P, D) where ``packed``.

    ``y`` becomes w2, what the gelu is taken of, where a backward is to come (``keep``); ``stash`` (P, D) receives it.
    x: (R S, D). mean, rstd: (R S,). prepared: the fields of ``Prepared`` of gcng/ops/pair_kernels.py.
    """
    r0, r1, c0, c1 = tile
    columns, width, layer = c1 - c0, y.shape[-1], prepared.layer
    schedule = epilogue_schedule(width, mean.dtype)
    launch(
        edge_epilogue_kernel, ((r1 - r0) * blocks(columns, schedule.block_j),),
        y, x, mean, rstd, prepared.row_sums, prepared.shift, layer.ln_weight, layer.ln_bias, stash, out,
        n, r0, c0, columns,
        schedule=schedule, KEEP=keep, PACKED=packed, EXACT=is_exact(x.dtype), TYPE=TRITON_TYPES[mean.dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip


def edge_epilogue_backward(
    grad: Tensor,
    w2: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    prepared: Any,
    n: int,
    tile: Rectangle,
    sums: Any,
    out: Tensor,
    scaled: Tensor,
    grad_packed: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of w2 to ``out``, times 1 / deviation to ``scaled``, both (R S, D), from that of the edges.

    grad: (R S, D), may be ``out``, or (P, D) where ``grad_packed``. w2: (R S, D), or (P, D) where ``packed``.
    sums: gains the gradients of ln_weight, ln_bias, shift and folded_mean. The rest as in :func:`edge_epilogue`.

    Returns the two row means (R S,) of the hidden norm's backward. Memory: 4 D numbers for each run of 8 blocks.
    """
    r0, r1, c0, c1 = tile
    columns, width, dtype = c1 - c0, out.shape[-1], mean.dtype
    schedule = epilogue_schedule(width, dtype, backward=True)
    programs = (r1 - r0) * blocks(columns, schedule.block_j * schedule.steps)
    mean_grad, mean_product = mean.new_empty((2, out.shape[0])).unbind()
    parts = mean.new_empty((4, 1, programs, width))
    launch(
        edge_epilogue_backward_kernel, (programs,),
        grad, w2, x, mean, rstd, prepared.row_sums, prepared.shift, prepared.layer.ln_weight, out, scaled,
        mean_grad, mean_product, parts, n, r0, c0, columns,
        schedule=schedule, GRAD_PACKED=grad_packed, PACKED=packed, EXACT=is_exact(scaled.dtype),
        TYPE=TRITON_TYPES[dtype], WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
        STEPS=schedule.steps,
    )  # fmt: skip
    add_parts(parts, [sums.ln_weight, sums.ln_bias, sums.shift, sums.folded_mean])
    return mean_grad, mean_product


def compilation_cases() -> Iterator[CompilationCase]:
    """Both kernels on tiles and on packed storage, at widths that fill a block and that do not."""
    n, tile = 2048, (64, 80, 64, 2048)
    pairs, total = 16 * 1984, n * (n + 1) // 2
    for dtype, width, packed in ((torch.float32, 512, False), (torch.bfloat16, 512, False), (torch.float16, 192, True)):

        def call(dtype: torch.dtype = dtype, width: int = width, packed: bool = packed) -> None:
            def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
                return torch.empty(shape, dtype=kind, device="meta")

            names = ("row_sums", "shift", "ln_weight", "ln_bias", "folded_mean")
            prepared = SimpleNamespace(**{name: empty(width) for name in names})
            prepared.layer = prepared
            x, kept = empty(pairs, width, kind=dtype), empty(total, width, kind=dtype)
            y, mean, rstd = empty(pairs, width), empty(pairs), empty(pairs)
            edge_epilogue(y, x, mean, rstd, prepared, n, tile, kept if packed else x, packed, kept if packed else None)
            grad, w2 = (empty(total, width), kept) if packed else (y, y)
            edge_epilogue_backward(
                grad, w2, x, mean, rstd, prepared, n, tile, prepared, empty(pairs, width), x, packed, packed
            )

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width}{' packed' * packed}", call)
