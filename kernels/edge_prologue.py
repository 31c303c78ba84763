"""Attend, mix, gelu and norm (9)-(12): what an edge layer does before its first product, and the backward of it.

Owns the two weights of a pair, dropout included, and every gradient that flows from the mix to nodes and edges. The
mix itself is never stored: the backward makes it again from the edges and the two weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.arithmetic import dropout_pairs, gelu, gelu_and_derivative, store
from gcng.kernels.launch import CompilationCase, launch
from gcng.kernels.pair_tiles import (
    PER_TILE,
    TRITON_TYPES,
    PairSchedule,
    Rectangle,
    add_parts,
    blocks,
    channel_schedule,
    is_exact,
    load_edges,
    load_node,
    load_rows,
    normalize,
    normalize_backward,
    own_columns,
    own_rows,
    row_chunks,
    store_column_parts,
    store_part,
    whole_row_schedule,
)


def prologue_schedule(width: int, dtype: torch.dtype, *, backward: bool = False) -> PairSchedule:
    """Of the kernels that hold whole rows."""
    return whole_row_schedule(width, dtype, backward=backward)


def columns_schedule(width: int) -> PairSchedule:
    """Of the kernel that owns columns."""
    return channel_schedule(width)


@triton.jit
def _mixed(e, row_weight, column_weight, value_row, value_column):
    """(12) before its gelu."""
    return e + row_weight[:, None] * value_row[None, :] + column_weight[:, None] * value_column


@triton.jit(**PER_TILE)
def edge_prologue_kernel(
    source_ptr,  # (N, D), (P, D) or (R S, D), see KIND
    key_query_ptr, key_bias_ptr, value_ptr,  # (N, D), (N,), (N, D)
    ln_weight_ptr, ln_bias_ptr,  # (D,)
    identity_ptr,  # (N,) int64, None without dropout
    seed,  # int64 number, or pointer to one
    out_ptr,  # (R S, D)
    gate_ptr, weight_row_ptr, weight_column_ptr,  # (R, S)
    n, r0, c0, columns, layer,
    KIND: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x = LN(gelu(e + m_r g v_r + m_c (1 - g) v_c)), g = sigmoid((e . (kq_r - kq_c) + kb_r - kb_c) / sqrt(D)).

    (9)-(12) with the query folded into the nodes (I2); a two-way softmax is a sigmoid of the difference of logits. A
    program owns BLOCK_J columns of one row, all channels. Bytes for each pair: an edge (none for a product) and an x,
    three numbers; three node rows of its column come from the cache.
    """
    i, first = own_columns(columns, BLOCK_J)
    j = first + tl.arange(0, BLOCK_J)
    row, column, place = r0 + i, c0 + j, i * columns + j
    stored = j < columns
    channel = tl.arange(0, BLOCK_D)
    e = load_edges(source_ptr, row, column, place, channel, stored, n, KIND, WIDTH, TYPE)
    keys = load_node(key_query_ptr, row, channel, WIDTH, TYPE)[None, :]
    keys -= load_rows(key_query_ptr, column, channel, stored, WIDTH, TYPE)
    biases = tl.load(key_bias_ptr + row).to(TYPE) - tl.load(key_bias_ptr + column, mask=stored, other=0.0).to(TYPE)
    gate = 1.0 / (1.0 + tl.exp(-SCALE * (tl.sum(e * keys, 1) + biases)))
    row_weight, column_weight = gate, 1.0 - gate
    if identity_ptr is not None:
        number = tl.load(seed) if SEED_IN_MEMORY else seed
        own = tl.load(identity_ptr + row)
        others = tl.load(identity_ptr + column, mask=stored, other=0)
        # Ones and zeros, scaled here: a float64 scale would reach dropout_pairs in float32.
        row_mask, column_mask = dropout_pairs(number, layer, THRESHOLD, 1.0, own, others)
        row_weight = row_weight * row_mask.to(TYPE) * KEPT
        column_weight = column_weight * column_mask.to(TYPE) * KEPT
    value_row = load_node(value_ptr, row, channel, WIDTH, TYPE)
    value_column = load_rows(value_ptr, column, channel, stored, WIDTH, TYPE)
    w = _mixed(e, row_weight, column_weight, value_row, value_column)
    normalized, _ = normalize(gelu(w, EXACT), channel, WIDTH)
    gain = load_node(ln_weight_ptr, 0, channel, WIDTH, TYPE)
    shift = load_node(ln_bias_ptr, 0, channel, WIDTH, TYPE)
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    store(out_ptr + place[:, None] * WIDTH + channel[None, :], normalized * gain[None, :] + shift[None, :], inside)
    tl.store(gate_ptr + place, gate, mask=stored)
    tl.store(weight_row_ptr + place, row_weight, mask=stored)
    tl.store(weight_column_ptr + place, column_weight, mask=stored)


@triton.jit(**PER_TILE)
def edge_prologue_backward_kernel(
    grad_ptr,  # (R S, D) of x, becomes that of the mix
    source_ptr, value_ptr, ln_weight_ptr,  # as in the forward
    gate_ptr, weight_row_ptr, weight_column_ptr,  # (R, S)
    kappa_ptr,  # (R, S)
    sums_ptr,  # (4, R, runs, D) parts of the gradients of value, key_query, ln_weight, ln_bias
    bias_ptr,  # (R, runs) parts of the gradient of key_bias
    n, r0, c0, rows, columns,
    KIND: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dw, the backward of LN(gelu(w)), and kappa = (m_r g (1 - g) dw . v_r - m_c g (1 - g) dw . v_c) / sqrt(D).

    A program owns STEPS runs of BLOCK_J columns of one row, all channels, and their part of what the row's node and
    the norm receive: sum m_r g dw, sum kappa e, sum dx xhat, sum dx, sum kappa. Computed again: e of a product, the
    mix, its gelu and statistics. Bytes for each pair: reads dx and e, writes dw and kappa; value rows are cached.
    """
    i, first = own_columns(columns, BLOCK_J * STEPS)
    row = r0 + i
    channel = tl.arange(0, BLOCK_D)
    value_row = load_node(value_ptr, row, channel, WIDTH, TYPE)
    gain = load_node(ln_weight_ptr, 0, channel, WIDTH, TYPE)
    value_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    key_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    gain_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    shift_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    bias_sum = tl.zeros((BLOCK_J,), TYPE)
    for step in range(STEPS):
        j = first + step * BLOCK_J + tl.arange(0, BLOCK_J)
        column, place, stored = c0 + j, i * columns + j, j < columns
        e = load_edges(source_ptr, row, column, place, channel, stored, n, KIND, WIDTH, TYPE)
        gate = tl.load(gate_ptr + place, mask=stored, other=0.0).to(TYPE)
        row_weight = tl.load(weight_row_ptr + place, mask=stored, other=0.0).to(TYPE)
        column_weight = tl.load(weight_column_ptr + place, mask=stored, other=0.0).to(TYPE)
        value_column = load_rows(value_ptr, column, channel, stored, WIDTH, TYPE)
        w = _mixed(e, row_weight, column_weight, value_row, value_column)
        u, slope = gelu_and_derivative(w, EXACT)
        normalized, rstd = normalize(u, channel, WIDTH)
        grad = load_rows(grad_ptr, place, channel, stored, WIDTH, TYPE)
        gain_sum += grad * normalized
        shift_sum += grad
        grad_w = normalize_backward(grad * gain[None, :], normalized, rstd, channel, WIDTH) * slope
        along_row = tl.sum(grad_w * value_row[None, :], 1)
        along_column = tl.sum(grad_w * value_column, 1)
        kappa = (row_weight * (1.0 - gate) * along_row - column_weight * gate * along_column) * SCALE
        value_sum += row_weight[:, None] * grad_w
        key_sum += kappa[:, None] * e
        bias_sum += kappa
        inside = stored[:, None] & (channel < WIDTH)[None, :]
        store(grad_ptr + place[:, None] * WIDTH + channel[None, :], grad_w, inside)
        tl.store(kappa_ptr + place, kappa, mask=stored)
    programs = tl.num_programs(0)
    program = tl.program_id(0).to(tl.int64)
    store_part(sums_ptr, value_sum, channel, WIDTH, program)
    store_part(sums_ptr, key_sum, channel, WIDTH, programs + program)
    store_part(sums_ptr, gain_sum, channel, WIDTH, 2 * programs.to(tl.int64) + program)
    store_part(sums_ptr, shift_sum, channel, WIDTH, 3 * programs.to(tl.int64) + program)
    tl.store(bias_ptr + program, tl.sum(bias_sum, 0))


@triton.jit(**PER_TILE)
def edge_prologue_columns_kernel(
    grad_ptr,  # (R S, D) of the mix, becomes that of the edges
    source_ptr, key_query_ptr,  # as in the forward
    weight_column_ptr, kappa_ptr,  # (R, S)
    value_parts_ptr, key_query_parts_ptr, key_bias_parts_ptr,  # (S, chunks, D), (S, chunks, D), (S, chunks)
    n, r0, c0, rows, columns, chunk,
    KIND: tl.constexpr, NEED_INPUT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """de = dw + kappa (kq_r - kq_c), and parts of what a column's node receives, sum_r m_c (1 - g) dw, -sum_r kappa e.

    A program owns BLOCK_J columns and BLOCK_D channels and walks down a chunk of rows. Bytes for each pair: reads dw, e
    and two numbers, writes de.
    """
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column, stored = c0 + j, j < columns
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    keys = load_rows(key_query_ptr, column, channel, stored, WIDTH, TYPE)
    value_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    key_sum = tl.zeros((BLOCK_J, BLOCK_D), TYPE)
    bias_sum = tl.zeros((BLOCK_J,), TYPE)
    start, end = own_rows(rows, chunk)
    for i in range(start, end):
        row, place = tl.cast(r0 + i, tl.int64), tl.cast(i, tl.int64) * columns + j
        e = load_edges(source_ptr, row, column, place, channel, stored, n, KIND, WIDTH, TYPE)
        grad_w = load_rows(grad_ptr, place, channel, stored, WIDTH, TYPE)
        kappa = tl.load(kappa_ptr + place, mask=stored, other=0.0).to(TYPE)
        value_sum += tl.load(weight_column_ptr + place, mask=stored, other=0.0).to(TYPE)[:, None] * grad_w
        key_sum -= kappa[:, None] * e
        bias_sum -= kappa
        if NEED_INPUT:
            direction = load_node(key_query_ptr, row, channel, WIDTH, TYPE)[None, :] - keys
            target = grad_ptr + place[:, None] * WIDTH + channel[None, :]
            store(target, grad_w + kappa[:, None] * direction, inside)
    store_column_parts(value_parts_ptr, j, stored, channel, value_sum, WIDTH)
    store_column_parts(key_query_parts_ptr, j, stored, channel, key_sum, WIDTH)
    if tl.program_id(1) == 0:
        store_column_parts(key_bias_parts_ptr, j, stored, tl.arange(0, 1), bias_sum[:, None], 1)


def seed_argument(seed: Tensor | int) -> Tensor | int:
    """A seed on the host as a number, one on a GPU as it is: neither waits for the GPU."""
    return seed.item() if isinstance(seed, Tensor) and seed.device.type == "cpu" else seed


def edge_prologue(
    layer: Any, values: Tensor, kind: str, n: int, tile: Rectangle, dropout: Any, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write x of a tile to ``out``.

    layer, dropout: the fields of ``EdgeLayer`` and ``LayerDropout``, or None, of gcng/ops/pair_kernels.py.
    values: (N, D) for kind "product", (P, D) for "packed", (R S, D) for "tile". out: (R S, D).

    Returns gate, weight_row, weight_column, each (R, S) in the layer's dtype.
    """
    r0, r1, c0, c1 = tile
    rows, columns, width, dtype = r1 - r0, c1 - c0, out.shape[-1], layer.value.dtype
    schedule = prologue_schedule(width, dtype)
    gate, weight_row, weight_column = layer.value.new_empty((3, rows, columns)).unbind()
    identity, seed, index, p = (None, 0, 0, 0.0) if dropout is None else dropout
    seed = seed_argument(seed)
    launch(
        edge_prologue_kernel, (rows * blocks(columns, schedule.block_j),),
        values, layer.key_query, layer.key_bias, layer.value, layer.ln_weight, layer.ln_bias, identity, seed,
        out, gate, weight_row, weight_column, n, r0, c0, columns, index,
        schedule=schedule, KIND=kind, SEED_IN_MEMORY=isinstance(seed, Tensor), THRESHOLD=round(p * 2**32),
        KEPT=1 / (1 - p), SCALE=1 / math.sqrt(width), EXACT=is_exact(out.dtype), TYPE=TRITON_TYPES[dtype],
        WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
    )  # fmt: skip
    return gate, weight_row, weight_column


def edge_prologue_backward(
    grad: Tensor, values: Tensor, kind: str, n: int, tile: Rectangle, mix: Any, layer: Any, sums: Any, need_input: bool
) -> None:
    """From the gradient of x, ``grad`` (R S, D), to that of the edges, in place; without ``need_input`` it is scratch.

    mix: gate, weight_row and weight_column of :func:`edge_prologue`. sums: gains the gradients of value, key_query,
    key_bias, ln_weight and ln_bias. The rest as there. Memory: 4 D + 1 numbers for each run of 8 blocks,
    and 2 D + 1 for each column and chunk of rows.
    """
    r0, r1, c0, c1 = tile
    rows, columns, width, dtype = r1 - r0, c1 - c0, grad.shape[-1], layer.value.dtype
    schedule, by_column = prologue_schedule(width, dtype, backward=True), columns_schedule(width)
    runs = blocks(columns, schedule.block_j * schedule.steps)
    kappa, bias_parts = torch.empty_like(mix.gate), grad.new_empty((1, rows, runs, 1))
    parts = grad.new_empty((4, rows, runs, width))
    launch(
        edge_prologue_backward_kernel, (rows * runs,),
        grad, values, layer.value, layer.ln_weight, mix.gate, mix.weight_row, mix.weight_column, kappa, parts,
        bias_parts, n, r0, c0, rows, columns,
        schedule=schedule, KIND=kind, SCALE=1 / math.sqrt(width), EXACT=is_exact(values.dtype),
        TYPE=TRITON_TYPES[dtype], WIDTH=width, BLOCK_J=schedule.block_j, BLOCK_D=schedule.block_d,
        STEPS=schedule.steps,
    )  # fmt: skip
    add_parts(parts[:2], [sums.value[r0:r1], sums.key_query[r0:r1]])
    add_parts(parts[2:].view(2, 1, rows * runs, width), [sums.ln_weight, sums.ln_bias])
    add_parts(bias_parts, [sums.key_bias[r0:r1]])
    # Behind the sums of the rows, which read dw: it becomes de in place.
    column_runs, channel_runs = blocks(columns, by_column.block_j), blocks(width, by_column.block_d)
    chunk, chunks = row_chunks(rows, column_runs * channel_runs)
    column_parts = sums.value.new_empty((2, columns, chunks, width))
    column_bias = sums.key_bias.new_empty((1, columns, chunks, 1))
    launch(
        edge_prologue_columns_kernel, (column_runs, channel_runs, chunks),
        grad, values, layer.key_query, mix.weight_column, kappa, *column_parts, column_bias,
        n, r0, c0, rows, columns, chunk,
        schedule=by_column, KIND=kind, NEED_INPUT=need_input, TYPE=TRITON_TYPES[dtype],
        WIDTH=width, BLOCK_J=by_column.block_j, BLOCK_D=by_column.block_d,
    )  # fmt: skip
    add_parts(column_parts, [sums.value[c0:c1], sums.key_query[c0:c1]])
    add_parts(column_bias, [sums.key_bias[c0:c1]])


def compilation_cases() -> Iterator[CompilationCase]:
    """Products with a seed on the GPU, packed edges with one on the host, edges of a tile without dropout."""
    n, tile = 2048, (64, 80, 64, 2048)
    pairs = 16 * 1984
    shapes = [(torch.float32, 512, "product"), (torch.bfloat16, 512, "product")]
    for dtype, width, kind in [*shapes, (torch.bfloat16, 192, "tile"), (torch.float16, 512, "packed")]:

        def call(dtype: torch.dtype = dtype, width: int = width, kind: str = kind) -> None:
            def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
                return torch.empty(shape, dtype=kind, device="meta")

            layer = SimpleNamespace(key_query=empty(n, width), value=empty(n, width), key_bias=empty(n))
            layer.ln_weight, layer.ln_bias = empty(width), empty(width)
            rows = {"product": n, "packed": n * (n + 1) // 2, "tile": pairs}[kind]
            values, x = empty(rows, width, kind=dtype), empty(pairs, width, kind=dtype)
            seed = empty(kind=torch.int64) if kind == "product" else torch.tensor(-7_777_777_777_777)
            dropout = None if kind == "tile" else (empty(n, kind=torch.int64), seed, 0, 0.1)
            gate, row, column = edge_prologue(layer, values, kind, n, tile, dropout, x)
            mix = SimpleNamespace(gate=gate, weight_row=row, weight_column=column)
            grad = empty(pairs, width)
            edge_prologue_backward(grad, values, kind, n, tile, mix, layer, layer, need_input=True)

        yield CompilationCase(f"{str(dtype).removeprefix('torch.')} {width} {kind}", call)
