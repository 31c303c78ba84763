"""Gradients of embeddings through synthetic negatives (15)-(18), the gates held constant.

Owns four kernels around one launcher. With dv the whole gradient of a synthetic negative v, P = sum_d dv (n - a) and
Q = sum_d dv (n - a) gate of a pair, everything that comes through the distances is one number a pair, ``dn'``:

    rho' = w (P - kappa Q) / dn, 0 where near     dp' = sum of rho' over an anchor's negatives     dn' = -rho' rho / dn
    anchor'   = sum_classes dv (1 - sum_g w t) + v dots'   - sum_negatives dn' (n - a - 1e-6)
    negative' = sum_anchors dv w t + dn' (n - a - 1e-6)

Anchors first (they also write P and Q of their block of channels), then the distances, then the negatives, which
compute v again from the gates of their class. Each walk is cut into spans whose sums are added in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcng.kernels.launch import CompilationCase, Schedule, launch, unspecialized
from gcng.kernels.synthesis import (
    SynthesisTile,
    Upstream,
    class_span,
    grad_of_values,
    load_differences,
    load_rows,
    load_samples,
    spans,
    synthesis_tile,
    walk_over_classes,
)
from gcng.kernels.synthesis_geometry import DISTANCE_OFFSET, KINDS, PER_BLOCK, Block, Geometry, meta_block, quotient


@triton.jit(**PER_BLOCK)
def anchor_gradient_kernel(
    a_ptr, n_ptr, starts_ptr, gate_ptr, offset_ptr, slope_ptr, grad_values_ptr, grad_dots_ptr, grad_squares_ptr,
    plain_ptr, gated_ptr, grad_a_ptr,
    A, B, M, per_span, stride_gate_a, stride_gate_b, stride_gate_d,
    WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum over classes of dv (1 - sum_g w t) + v dots', and P and Q of every pair.

    A program owns BLOCK_A anchors, BLOCK_D channels and per_span classes: its span's grad_a, (spans, A, D), and its
    block's part of P and Q, plain and gated, (channel blocks, A, B). Reads every gate once, and again from the cache.
    a: (A, D). n: (B, D). starts: (m + 1,) int64. gate: (A, B, D), any strides. offset, slope: (A, B). M: m.
    grad_values: (A, m, D), grad_dots, grad_squares: (A, m), each may be None.
    """
    anchors = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    channels = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = anchors < A
    anchors = tl.minimum(anchors, A - 1)
    a = load_rows(a_ptr, anchors, channels, WIDTH)
    grad_a = tl.zeros_like(a)
    part = tl.program_id(2).to(tl.int64) * A * B
    begin = tl.program_id(1).to(tl.int64) * per_span
    for index in range(begin, tl.minimum(begin + per_span, M)):
        start, stop = class_span(starts_ptr, index)
        values, total_pull = a, tl.zeros_like(a)
        for first in range(start, stop, BLOCK_G):
            _, difference, pull = load_samples(
                n_ptr, gate_ptr, offset_ptr, slope_ptr, a, anchors, first, stop, channels, B,
                stride_gate_a, stride_gate_b, stride_gate_d, WIDTH, BLOCK_G,
            )  # fmt: skip
            values += tl.sum(pull * difference, 0)
            total_pull += tl.sum(pull, 0)
        places = anchors * M + index
        grad = grad_of_values(grad_values_ptr, grad_dots_ptr, grad_squares_ptr, values, a, places, channels, WIDTH)
        grad_a += grad * (1.0 - total_pull)
        if grad_dots_ptr is not None:
            grad_a += tl.load(grad_dots_ptr + places)[:, None] * values
        for first in range(start, stop, BLOCK_G):
            gate, difference, _ = load_samples(
                n_ptr, gate_ptr, offset_ptr, slope_ptr, a, anchors, first, stop, channels, B,
                stride_gate_a, stride_gate_b, stride_gate_d, WIDTH, BLOCK_G,
            )  # fmt: skip
            product = grad[None, :, :] * difference
            samples = first + tl.arange(0, BLOCK_G)
            live = (samples < stop)[:, None] & stored[None, :]
            pairs = part + anchors[None, :] * B + samples[:, None]
            tl.store(plain_ptr + pairs, tl.sum(product, 2), mask=live)
            tl.store(gated_ptr + pairs, tl.sum(product * gate, 2), mask=live)
    place = (tl.program_id(1).to(tl.int64) * A + anchors)[:, None] * WIDTH + channels[None, :]
    tl.store(grad_a_ptr + place, grad_a, mask=stored[:, None] & (channels < WIDTH)[None, :])


@triton.jit(**PER_BLOCK)
def distance_gradient_kernel(
    a_ptr, n_ptr, distance_ptr, near_ptr, ratio_ptr, weight_ptr, kappa_ptr, plain_ptr, gated_ptr,
    grad_distance_ptr, grad_reach_ptr, grad_a_ptr,
    A, B, channel_blocks, per_span,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dn' = -rho' rho / dn of every pair, and what it and rho' = w (P - kappa Q) / dn send to the anchors.

    A program owns BLOCK_A anchors, BLOCK_D channels and per_span blocks of BLOCK_B negatives: its span's grad_a,
    (spans, A, D). Those of the first channel block own grad_distance (A, B) and grad_reach (spans, A). Reads n from
    the cache, 2 channel_blocks + 4 numbers a pair. a: (A, D). n: (B, D). distance, near (uint8), ratio, weight: (A, B).
    plain, gated: (channel blocks, A, B). kappa: 0-dim.
    """
    anchors = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    channels = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = anchors < A
    anchors = tl.minimum(anchors, A - 1)
    a = load_rows(a_ptr, anchors, channels, WIDTH)
    grad_a = tl.zeros_like(a)
    grad_reach = tl.zeros((BLOCK_A,), a.dtype)
    kappa = tl.load(kappa_ptr)
    begin = tl.program_id(1).to(tl.int64) * per_span * BLOCK_B
    for first in range(begin, tl.minimum(begin + per_span * BLOCK_B, B), BLOCK_B):
        samples = first + tl.arange(0, BLOCK_B)
        owned, outside = (samples < B)[:, None] & stored[None, :], (samples >= B)[:, None]
        samples = tl.minimum(samples, B - 1)
        pairs = anchors[None, :] * B + samples[:, None]
        plain = tl.zeros((BLOCK_B, BLOCK_A), a.dtype)
        gated = tl.zeros((BLOCK_B, BLOCK_A), a.dtype)
        for block in range(channel_blocks):
            part = tl.cast(block, tl.int64) * A * B
            plain += tl.load(plain_ptr + part + pairs)
            gated += tl.load(gated_ptr + part + pairs)
        near = (tl.load(near_ptr + pairs) != 0) | outside
        distance = tl.where(near, 1.0, tl.load(distance_ptr + pairs))
        grad_ratio = tl.load(weight_ptr + pairs) * (plain - kappa * gated)
        grad_ratio = tl.where(near, 0.0, quotient(grad_ratio, distance))
        grad_distance = tl.where(near, 0.0, -quotient(grad_ratio * tl.load(ratio_ptr + pairs), distance))
        difference = load_differences(n_ptr, a, samples, channels, WIDTH) - OFFSET
        grad_a -= tl.sum(grad_distance[:, :, None] * difference, 0)
        grad_reach += tl.sum(grad_ratio, 0)
        if tl.program_id(2) == 0:
            tl.store(grad_distance_ptr + pairs, grad_distance, mask=owned)
    span = tl.program_id(1).to(tl.int64) * A + anchors
    if tl.program_id(2) == 0:
        tl.store(grad_reach_ptr + span, grad_reach, mask=stored)
    live = stored[:, None] & (channels < WIDTH)[None, :]
    tl.store(grad_a_ptr + span[:, None] * WIDTH + channels[None, :], grad_a, mask=live)


@triton.jit(**PER_BLOCK)
def negative_gradient_kernel(
    a_ptr, n_ptr, starts_ptr, gate_ptr, offset_ptr, slope_ptr, grad_values_ptr, grad_dots_ptr, grad_squares_ptr,
    grad_distance_ptr, grad_n_ptr,
    A, B, M, sample_blocks, per_span, stride_gate_a, stride_gate_b, stride_gate_d,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum over anchors of dv w t + dn' (n - a - OFFSET), for every negative.

    A program owns BLOCK_G samples of one class, BLOCK_D channels and per_span blocks of BLOCK_A anchors: its span's
    grad_n, (spans, B, D). It computes v from all samples of the class; WHOLE: they are all its own. Reads every gate
    once (again for every block of samples of a class that is not whole), a and n from the cache.
    Arguments as of anchor_gradient_kernel; grad_distance: (A, B).
    """
    index = (tl.program_id(0) // sample_blocks).to(tl.int64)
    channels = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, stop = class_span(starts_ptr, index)
    own = start + (tl.program_id(0) % sample_blocks).to(tl.int64) * BLOCK_G
    if own >= stop:
        return
    samples = own + tl.arange(0, BLOCK_G)
    total = tl.zeros((BLOCK_G, BLOCK_A, BLOCK_D), n_ptr.dtype.element_ty)
    begin = tl.program_id(1).to(tl.int64) * per_span * BLOCK_A
    for anchor in range(begin, tl.minimum(begin + per_span * BLOCK_A, A), BLOCK_A):
        anchors = anchor + tl.arange(0, BLOCK_A)
        inside = anchors < A
        anchors = tl.minimum(anchors, A - 1)
        a = load_rows(a_ptr, anchors, channels, WIDTH)
        _, difference, pull = load_samples(
            n_ptr, gate_ptr, offset_ptr, slope_ptr, a, anchors, own, stop, channels, B,
            stride_gate_a, stride_gate_b, stride_gate_d, WIDTH, BLOCK_G,
        )  # fmt: skip
        values = a
        if grad_squares_ptr is not None:
            if WHOLE:
                values += tl.sum(pull * difference, 0)
            else:
                for first in range(start, stop, BLOCK_G):
                    _, other_difference, other_pull = load_samples(
                        n_ptr, gate_ptr, offset_ptr, slope_ptr, a, anchors, first, stop, channels, B,
                        stride_gate_a, stride_gate_b, stride_gate_d, WIDTH, BLOCK_G,
                    )  # fmt: skip
                    values += tl.sum(other_pull * other_difference, 0)
        places = anchors * M + index
        grad = grad_of_values(grad_values_ptr, grad_dots_ptr, grad_squares_ptr, values, a, places, channels, WIDTH)
        pairs = anchors[None, :] * B + tl.minimum(samples, stop - 1)[:, None]
        grad_distance = tl.load(grad_distance_ptr + pairs)[:, :, None]
        sent = grad[None, :, :] * pull + grad_distance * (difference - OFFSET)
        total += tl.where(inside[None, :, None], sent, 0.0)
    place = (tl.program_id(1).to(tl.int64) * B + samples)[:, None] * WIDTH + channels[None, :]
    tl.store(grad_n_ptr + place, tl.sum(total, 1), mask=(samples < stop)[:, None] & (channels < WIDTH)[None, :])


@triton.jit(**unspecialized(("size", "count"), ("out_ptr",)))
def add_parts_kernel(parts_ptr, out_ptr, size, count, BLOCK: tl.constexpr):
    """out += sum of parts, in their order. A program owns BLOCK elements. parts: (count, size). out: (size,)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(out_ptr + place, mask=place < size, other=0.0)
    for part in range(count):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(out_ptr + place, total, mask=place < size)


def _add_parts(parts: Tensor, out: Tensor) -> None:
    """Add ``parts`` (count, ...) to ``out`` (...), both contiguous."""
    launch(
        add_parts_kernel, (triton.cdiv(out.numel(), 512),), parts, out, out.numel(), parts.shape[0],
        schedule=Schedule(4, 2), BLOCK=512,
    )  # fmt: skip


def add_embedding_gradient(
    block: Block,
    geometry: Geometry,
    kappa: Tensor,
    gate: Tensor,
    upstream: Upstream,
    grad_z: Tensor,
    grad_reach: Tensor,
) -> None:
    """Add a block's gradients to ``grad_z`` (N, D) and to that of the distances to positives, ``grad_reach`` (N,).

    gate: (A, B, D), any floating dtype and strides. kappa: 0-dim. All others in the dtype of z. Memory: three numbers
    a pair, two more for each further block of channels, and the parts of about a thousand programs.
    """
    (a, m, b), width, like = block.shape, block.z.shape[1], block.z
    tile, upstream = synthesis_tile(block.most, width, like.dtype), upstream.contiguous()
    grid, per_span = walk_over_classes(block, tile)
    pair_sums = like.new_empty((2, grid[2], a, b))
    # Distances walk in steps of the same blocks, so that both parts of an anchor lie side by side.
    steps = spans(triton.cdiv(b, tile.block_g), grid[0] * grid[2])
    parts = like.new_empty((grid[1] + steps[0], a, width))
    common = gate, geometry.offset, geometry.slope, *upstream
    launch(
        anchor_gradient_kernel, grid, *block.operands, *common, *pair_sums.unbind(), parts,
        a, b, m, per_span, *gate.stride(), schedule=tile, WIDTH=width, **tile.tiles,
    )  # fmt: skip
    grad_distance, reach_parts = like.new_empty((a, b)), like.new_empty((steps[0], a))
    launch(
        distance_gradient_kernel, (grid[0], steps[0], grid[2]), *block.operands[:2],
        geometry.distance, geometry.near.view(torch.uint8), geometry.ratio, geometry.weight, kappa, *pair_sums.unbind(),
        grad_distance, reach_parts, parts[grid[1] :], a, b, grid[2], steps[1],
        schedule=tile, WIDTH=width, OFFSET=DISTANCE_OFFSET,
        BLOCK_B=tile.block_g, BLOCK_A=tile.block_a, BLOCK_D=tile.block_d,
    )  # fmt: skip
    _add_parts(parts, grad_z[block.anchors])
    _add_parts(reach_parts, grad_reach[block.anchors])
    _add_parts(_negative_parts(block, tile, gate, common, grad_distance), grad_z[block.negatives])


def _negative_parts(
    block: Block, tile: SynthesisTile, gate: Tensor, common: tuple[Tensor | None, ...], grad_distance: Tensor
) -> Tensor:
    """Gradients of the negatives (spans, B, D), one for each span of anchors."""
    (a, m, b), width = block.shape, block.z.shape[1]
    sample_blocks, channel_blocks = triton.cdiv(block.most, tile.block_g), triton.cdiv(width, tile.block_d)
    count, per_span = spans(triton.cdiv(a, tile.block_a), m * sample_blocks * channel_blocks)
    parts = block.z.new_empty((count, b, width))
    launch(
        negative_gradient_kernel, (m * sample_blocks, count, channel_blocks), *block.operands, *common,
        grad_distance, parts, a, b, m, sample_blocks, per_span, *gate.stride(),
        schedule=tile, WIDTH=width, OFFSET=DISTANCE_OFFSET, WHOLE=sample_blocks == 1, **tile.tiles,
    )  # fmt: skip
    return parts


def compilation_cases() -> Iterator[CompilationCase]:
    """What both losses ask for: all gradients, or those of inner products and squared norms alone.

    ptxas prefers a handful of spills outside the loops to one block less on a multiprocessor.
    """
    for stored, wide, width, samples in KINDS:

        def gradient(stored=stored, wide=wide, width=width, samples=samples) -> None:
            block, geometry = meta_block(wide, width, samples)
            a, m, b = block.shape
            gate = torch.empty((a, b, width), dtype=stored, device="meta")
            number = torch.empty((a, m), dtype=wide, device="meta")
            values = torch.empty((a, m, width), dtype=wide, device="meta") if samples > 3 else None
            kappa, reach = (torch.empty(shape, dtype=wide, device="meta") for shape in ((), (block.z.shape[0],)))
            upstream = Upstream(values, number, number)
            add_embedding_gradient(block, geometry, kappa, gate, upstream, torch.empty_like(block.z), reach)

        name = f"{stored} gates, D {width}, K {samples}".removeprefix("torch.")
        yield CompilationCase(name, gradient, spills={"anchor_gradient_kernel": 8, "negative_gradient_kernel": 8})
