"""Op (7): what the edges of a node tell it, summed without ever holding the edges.

Forward: one tile of edges, one GEMM, gelu, and the sums over its rows and over its mirrored columns. Backward: the
tile again (unless its pre-activation is stashed), then the chain of edge layers below it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gcng.ops.dispatch import operand_dtype
from gcng.ops.pair_field import FIELD, Dropout, FieldGradients, PairField, with_smaller_tiles
from gcng.ops.products import accumulate, linear, product
from gcng.ops.registration import any_needed, define_field_autocast, define_gradient, define_op
from gcng.ops.tiles import pair_count

_SCHEMA = f"({FIELD}, Tensor weight, Tensor bias, int pairs_per_tile, bool stash) -> (Tensor, Tensor)"


def _messages(
    base: Tensor,
    packed: bool,
    chain: Sequence[Tensor],
    identity: Tensor,
    seed: Tensor,
    p: float,
    first_layer: int,
    weight: Tensor,
    bias: Tensor,
    pairs_per_tile: int,
    stash: bool,
) -> tuple[Tensor, Tensor]:
    n = identity.shape[0]
    field = PairField(base, packed, n, chain, Dropout(identity, seed, p, first_layer))
    operands = weight.to(field.operand), bias.to(field.operand)

    def run(pairs: int) -> tuple[Tensor, Tensor]:
        out = field.base.new_zeros((n, weight.shape[0]), dtype=field.dtype)
        kept = field.base.new_empty((pair_count(n) if stash else 0, weight.shape[0]))
        for tile in field.tiles(pairs):
            kept_here = kept if stash else None
            from_nodes = not packed and not field.layers
            if from_nodes and field.kernels.product_messages(field.base, *operands, n, tile, out, stash=kept_here):
                continue
            before = linear(field.edges(tile), *operands, field.room("messages", tile, weight.shape[0]))
            field.kernels.messages(before, n, tile, out, stash=kept_here)
        return out.to(base.dtype), kept

    return with_smaller_tiles(run, pairs_per_tile)


def _messages_fake(
    base, packed, chain, identity, seed, p, first_layer, weight, bias, pairs_per_tile, stash
):
    n = identity.shape[0]
    kept = base.new_empty((n * (n + 1) // 2 if stash else 0, weight.shape[0]), dtype=operand_dtype(base))
    return base.new_empty((n, weight.shape[0])), kept


def _messages_backward(
    grad: Tensor,
    kept: Tensor,
    base: Tensor,
    packed: bool,
    chain: Sequence[Tensor],
    identity: Tensor,
    seed: Tensor,
    p: float,
    first_layer: int,
    weight: Tensor,
    bias: Tensor,
    pairs_per_tile: int,
    stash: bool,
    need_base: bool,
    need_chain: bool,
) -> list[Tensor]:
    n = identity.shape[0]
    field = PairField(base, packed, n, chain, Dropout(identity, seed, p, first_layer))
    wide_grad, operands = grad.to(field.dtype).contiguous(), (weight.to(field.operand), bias.to(field.operand))

    def run(pairs: int) -> list[Tensor]:
        grads = FieldGradients(field, need_base=need_base, need_chain=need_chain)
        grad_weight, grad_bias = (torch.zeros_like(x, dtype=field.dtype) for x in operands)
        for tile in field.tiles(pairs):
            e, states = field.edges_with_states(tile) if grads.wanted else (field.edges(tile), [])
            before = kept
            if not stash:
                before = linear(e, *operands, field.room("messages", tile, weight.shape[0]))
            grad_before = field.take("grad messages", tile, weight.shape[0])
            field.kernels.messages_backward(wide_grad, before, n, tile, grad_before, grad_bias, packed=stash)
            accumulate(grad_weight, grad_before.T, e)
            if grads.wanted:
                room = functools.partial(field.take_wide, "grad", tile)
                grads.add(tile, product(grad_before, operands[0], room), states)
        out = [grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)]
        out += [grads.base.to(base.dtype)] if need_base else []
        return out + ([g.to(x.dtype) for g, x in zip(grads.chain(), chain, strict=True)] if need_chain else [])

    return with_smaller_tiles(run, pairs_per_tile)


def _messages_backward_fake(
    grad, kept, base, packed, chain, identity, seed, p, first_layer, weight, bias, pairs_per_tile, stash,
    need_base, need_chain,
):  # fmt: skip
    like = [weight, bias] + ([base] if need_base else []) + (list(chain) if need_chain else [])
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


messages = define_op(f"messages{_SCHEMA}", _messages, _messages_fake)
_backward = define_op(
    f"messages_backward(Tensor grad, Tensor kept, {FIELD}, Tensor weight, Tensor bias, int pairs_per_tile, "
    "bool stash, bool need_base, bool need_chain) -> Tensor[]",
    _messages_backward,
    _messages_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    base, ctx.packed, chain, identity, seed, ctx.p, ctx.first_layer, weight, bias, ctx.pairs, ctx.stash = inputs
    ctx.save_for_backward(output[1], base, identity, seed, weight, bias, *chain)
    ctx.mark_non_differentiable(output[1])
    # Or autograd would fill the gradients of stashed outputs with zeros, each as large as its stash.
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad: Tensor | None, _grad_kept: Tensor):
    kept, base, identity, seed, weight, bias, *chain = ctx.saved_tensors
    if grad is None:
        return None, None, [None] * len(chain), *([None] * 8)
    need_base, need_chain = ctx.needs_input_grad[0], any_needed(ctx.needs_input_grad[2])
    grad_weight, grad_bias, *rest = _backward(
        grad, kept, base, ctx.packed, chain, identity, seed, ctx.p, ctx.first_layer, weight, bias, ctx.pairs,
        ctx.stash, need_base, need_chain,
    )  # fmt: skip
    grad_base = rest.pop(0) if need_base else None
    grad_chain = rest if need_chain else [None] * len(chain)
    return grad_base, None, grad_chain, None, None, None, None, grad_weight, grad_bias, None, None


define_gradient("messages", _gradient, _setup_context)
define_field_autocast(messages)
