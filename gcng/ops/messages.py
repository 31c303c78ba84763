"""Op (7): what the edges of a node tell it, summed without ever holding the edges.

Forward: one tile of edges, one GEMM, gelu, and the sums over its rows and over its mirrored columns. Backward: the
tile again (unless its pre-activation is stashed), then the chain of edge layers below it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcng.ops.dispatch import operand_dtype
from gcng.ops.field_op import (
    FIELD,
    FieldArguments,
    empty_like_all,
    field_needs,
    grouped,
    keep_field,
    kept_field,
    split_arguments,
)
from gcng.ops.pair_field import FieldGradients, with_smaller_tiles
from gcng.ops.products import accumulate, linear, product
from gcng.ops.recycled import packed_storage
from gcng.ops.registration import define_field_autocast, define_gradient, define_op
from gcng.ops.tiles import pair_count

_SCHEMA = f"({FIELD}, Tensor weight, Tensor bias, int pairs_per_tile, bool stash) -> (Tensor, Tensor)"


@grouped(FieldArguments)
def _messages(
    arguments: FieldArguments, weight: Tensor, bias: Tensor, pairs_per_tile: int, stash: bool
) -> tuple[Tensor, Tensor]:
    field = arguments.open()
    n, channels = field.n, weight.shape[0]
    operands = weight.to(field.operand), bias.to(field.operand)

    def run(pairs: int) -> tuple[Tensor, Tensor]:
        kept = packed_storage(field.base, n if stash else 0, channels)
        kept_here = kept if stash else None
        from_nodes = not field.packed and not field.layers
        tiles = field.tiles(pairs)
        # A node meets up to hundreds of tiles. Sums of runs of them come first: one running sum over all would be off
        # by more than twice what the dense sum is.
        length = math.isqrt(len(tiles)) + 1
        out, run_sum = (field.base.new_zeros((n, channels), dtype=field.dtype) for _ in range(2))
        for first in range(0, len(tiles), length):
            for tile in tiles[first : first + length]:
                if from_nodes and field.kernels.product_messages(
                    field.base, *operands, n, tile, run_sum, stash=kept_here
                ):
                    continue
                before = linear(field.edges(tile), *operands, field.take("messages", tile, channels))
                field.kernels.messages(before, n, tile, run_sum, stash=kept_here)
            out += run_sum
            run_sum.zero_()
        return out.to(arguments.base.dtype), kept

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(FieldArguments)
def _messages_fake(
    arguments: FieldArguments, weight: Tensor, bias: Tensor, pairs_per_tile: int, stash: bool
) -> tuple[Tensor, Tensor]:
    base, channels = arguments.base, weight.shape[0]
    kept = base.new_empty((pair_count(arguments.n) if stash else 0, channels), dtype=operand_dtype(base))
    return base.new_empty((arguments.n, channels)), kept


@grouped(FieldArguments, after=2)
def _messages_backward(
    grad: Tensor,
    kept: Tensor,
    arguments: FieldArguments,
    weight: Tensor,
    bias: Tensor,
    pairs_per_tile: int,
    stash: bool,
    need_base: bool,
    need_chain: bool,
) -> list[Tensor]:
    field = arguments.open()
    n, channels = field.n, weight.shape[0]
    wide_grad, operands = grad.to(field.dtype).contiguous(), (weight.to(field.operand), bias.to(field.operand))

    def run(pairs: int) -> list[Tensor]:
        grads = FieldGradients(field, need_base=need_base, need_chain=need_chain)
        grad_weight, grad_bias = (torch.zeros_like(x, dtype=field.dtype) for x in operands)
        for tile in field.tiles(pairs):
            e, states = field.edges_with_states(tile) if grads.wanted else (field.edges(tile), [])
            before = kept if stash else linear(e, *operands, field.take("messages", tile, channels))
            grad_before = field.take("grad messages", tile, channels)
            field.kernels.messages_backward(wide_grad, before, n, tile, grad_before, grad_bias, packed=stash)
            accumulate(grad_weight, grad_before.T, e)
            if grads.wanted:
                grads.add(tile, product(grad_before, operands[0], field.take_wide("grad", tile)), states)
        return [grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *arguments.gradients(grads)]

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(FieldArguments, after=2)
def _messages_backward_fake(
    grad, kept, arguments: FieldArguments, weight, bias, pairs_per_tile, stash, need_base, need_chain
) -> list[Tensor]:
    return empty_like_all([weight, bias]) + arguments.like_gradients(need_base, need_chain)


messages = define_op(f"messages{_SCHEMA}", _messages, _messages_fake)
_backward = define_op(
    f"messages_backward(Tensor grad, Tensor kept, {FIELD}, Tensor weight, Tensor bias, int pairs_per_tile, "
    "bool stash, bool need_base, bool need_chain) -> Tensor[]",
    _messages_backward,
    _messages_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    arguments, weight, bias, ctx.pairs, ctx.stash = split_arguments(inputs, FieldArguments)
    keep_field(ctx, arguments, output[1:], weight, bias)


def _gradient(ctx, grad: Tensor | None, _grad_kept: Tensor):
    arguments, (kept, weight, bias) = kept_field(ctx)
    if grad is None:
        return *arguments.spread(), None, None, None, None
    needs = field_needs(ctx)
    grad_weight, grad_bias, *rest = _backward(grad, kept, *arguments, weight, bias, ctx.pairs, ctx.stash, *needs)
    return *arguments.spread(needs, rest), grad_weight, grad_bias, None, None


define_gradient("messages", _gradient, _setup_context)
define_field_autocast(messages)
