"""The product of the edge layer's backward (13) with the pass behind it: the gradient of the hidden layer.

Owns the one kernel that goes from the gradient of the second map's result to that of the first one's, with h0 read, or
made again by a second product on the same tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import gelu_and_derivative, round_to, store
from gcng.kernels.edge_mlp import meta_layer
from gcng.kernels.edge_products import product_constants
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import PER_TILE, STORED_TYPES, Rectangle, add_parts, blocks, packed_place, store_part
from gcng.kernels.product_tiles import ProductSchedule, available_products, multiply, own_tile


@triton.jit(**PER_TILE)
def edge_hidden_gradient_kernel(
    scaled_ptr,  # (R S, D)
    folded_ptr,  # (D, H)
    x_ptr, weight_ptr, ff1_bias_ptr,  # (R S, D), (H, D), (H,) where RECOMPUTE
    h0_ptr,  # (R S, H), or (P, H) where PACKED; None where RECOMPUTE
    mean_ptr, rstd_ptr, mean_grad_ptr, mean_product_ptr,  # (R S,)
    hidden_ptr,  # (R S, H) or None, receives h
    grad_ptr,  # (R S, H), receives the gradient of h0
    parts_ptr,  # (blocks of pairs, H) of the gradient of ff1_bias
    n, r0, c0, columns, pairs,
    RECOMPUTE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, STORED: tl.constexpr,
    PRECISION: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dh0 = (dyS W2g - s m1 - (h - m) s^2 m2) gelu'(h0): the backward's product, and edge_hidden_backward_kernel.

    A program owns BLOCK_M pairs and BLOCK_N channels and their part of sum dh0. RECOMPUTE: h0 = x W1^T + b1 by a
    second product on the same tile, so that h0 was never stored. Bytes for each pair: reads dyS and h0 (or x), writes
    dh0, and h where it is wanted.
    """
    block_m, block_n = own_tile(pairs, HIDDEN, BLOCK_M, BLOCK_N, GROUP)
    place = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = place < pairs
    last, row = tl.minimum(unit, HIDDEN - 1).to(tl.int64), tl.minimum(place, pairs - 1)
    grad = multiply(scaled_ptr, row, folded_ptr, last, WIDTH, 1, HIDDEN, BLOCK_K, PRECISION, TYPE)
    if RECOMPUTE:
        h0 = multiply(x_ptr, row, weight_ptr, last, WIDTH, WIDTH, 1, BLOCK_K, PRECISION, TYPE)
        h0 += tl.load(ff1_bias_ptr + last).to(TYPE)[None, :]
    else:
        source = row
        if PACKED:
            i = row // columns
            source = packed_place(r0 + i, c0 + row - i * columns, n)
        h0 = tl.load(h0_ptr + source[:, None] * HIDDEN + last[None, :]).to(TYPE)
    h, derivative = gelu_and_derivative(h0, EXACT)
    h = round_to(h, STORED)
    inside = stored[:, None] & (unit < HIDDEN)[None, :]
    offsets = place[:, None] * HIDDEN + unit[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offsets, h, mask=inside)
    mean, rstd = tl.load(mean_ptr + row).to(TYPE), tl.load(rstd_ptr + row).to(TYPE)
    slope = rstd * rstd * tl.load(mean_product_ptr + row).to(TYPE)
    constant = slope * mean - rstd * tl.load(mean_grad_ptr + row).to(TYPE)
    grad = (grad - slope[:, None] * h.to(TYPE) + constant[:, None]) * derivative
    grad = tl.where(inside, grad, 0.0)
    store(grad_ptr + offsets, grad, inside)
    store_part(parts_ptr, grad, unit, HIDDEN, block_m)


def edge_hidden_gradient(
    scaled: Tensor,
    x: Tensor,
    h0: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    means: tuple[Tensor, Tensor],
    prepared: Any,
    n: int,
    tile: Rectangle,
    hidden: Tensor | None,
    grad: Tensor,
    bias: Tensor,
    packed: bool,
    schedule: ProductSchedule,
) -> None:
    """The gradient of h0 to ``grad`` (R S, H) from ``scaled`` (R S, D), and its column sum to ``bias`` (H,).

    h0: (R S, H), or (P, H) where ``packed``, or None: made again from x (R S, D). hidden: (R S, H), receives gelu(h0)
    as it is stored, or None. means: the two row means of the hidden norm's backward. The rest as above.
    """
    r0, _, c0, c1 = tile
    pairs, width = scaled.shape
    down = blocks(pairs, schedule.block_m)
    parts = bias.new_empty((1, 1, down, 4 * width))
    launch(
        edge_hidden_gradient_kernel, (down * blocks(4 * width, schedule.block_n),),
        scaled, prepared.folded, x, prepared.ff1_weight, prepared.ff1_bias, h0, mean, rstd, *means, hidden, grad,
        parts, n, r0, c0, c1 - c0, pairs,
        schedule=schedule, RECOMPUTE=h0 is None, PACKED=packed, STORED=STORED_TYPES[grad.dtype],
        GROUP=schedule.group, **product_constants(schedule, scaled.dtype, mean.dtype, width),
    )  # fmt: skip
    add_parts(parts, [bias])


def compilation_cases() -> Iterator[CompilationCase]:
    """h0 packed, and made again, at the width of the published models and at one that leaves blocks unfilled.

    With two accumulators, where h0 is made again, Triton 3.6.0 spills on sm_100. No launch table ships that form.
    """
    n, tile = 2048, (64, 80, 64, 2048)
    pairs = 16 * 1984
    for dtype, width in ((torch.bfloat16, 512), (torch.float16, 200)):

        def call(dtype: torch.dtype = dtype, width: int = width) -> None:
            def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=kind, device="meta")

            layer, schedule = meta_layer(width, dtype), available_products(width, dtype, 90).hidden_gradient
            x, h, kept = empty(pairs, width), empty(pairs, 4 * width), empty(n * (n + 1) // 2, 4 * width)
            mean, bias = empty(pairs, kind=torch.float32), empty(4 * width, kind=torch.float32)
            rest = (mean, mean, (mean, mean), layer, n, tile, h, h, bias)
            edge_hidden_gradient(x, x, kept, *rest, packed=True, schedule=schedule)
            edge_hidden_gradient(x, x, None, *rest, packed=False, schedule=schedule)

        name = f"{str(dtype).removeprefix('torch.')} {width}"
        yield CompilationCase(name, call, spills={"edge_hidden_gradient_kernel": 128})
