"""Op (9)-(13): edge layers on all unordered pairs, written to packed storage.

The materialized form of the lazy field, for budgets that allow it: one packed tensor of N (N + 1) / 2 edges, and, if
they may be kept too, the two tensors that spare the backward its recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcng.ops.dispatch import operand_dtype
from gcng.ops.pair_field import (
    CHAIN_WIDTH,
    FIELD,
    Dropout,
    FieldGradients,
    HiddenState,
    PairField,
    with_smaller_tiles,
)
from gcng.ops.registration import any_needed, define_field_autocast, define_gradient, define_op
from gcng.ops.tiles import pair_count


def _edges(
    base: Tensor,
    packed: bool,
    chain: Sequence[Tensor],
    identity: Tensor,
    seed: Tensor,
    p: float,
    first_layer: int,
    pairs_per_tile: int,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, width = identity.shape[0], base.shape[-1]
    field = PairField(base, packed, n, chain, Dropout(identity, seed, p, first_layer))
    if stash and len(chain) != CHAIN_WIDTH:
        raise ValueError(f"gcng::edges: stash needs a chain of one layer, got {len(chain) // CHAIN_WIDTH}")

    def run(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        out = field.base.new_empty((pair_count(n), width))
        kept = pair_count(n) if stash else 0
        hidden, before = field.base.new_empty((kept, 4 * width)), field.base.new_empty((kept, width))
        for tile in field.tiles(pairs):
            if len(field.layers) == 1:
                kept_tensors = (hidden, before) if stash else None
                field.forward_layer(0, field.initial(), tile, out, keep=False, packed=True, stash=kept_tensors)
            else:
                field.kernels.store(out, n, tile, field.edges(tile))
        return out, hidden, before

    return with_smaller_tiles(run, pairs_per_tile)


def _edges_fake(base, packed, chain, identity, seed, p, first_layer, pairs_per_tile, stash):
    n, width, dtype = identity.shape[0], base.shape[-1], operand_dtype(base)
    kept = n * (n + 1) // 2 if stash else 0
    sizes = ((n * (n + 1) // 2, width), (kept, 4 * width), (kept, width))
    return tuple(base.new_empty(size, dtype=dtype) for size in sizes)


def _edges_backward(
    grad: Tensor,
    hidden: Tensor,
    before: Tensor,
    base: Tensor,
    packed: bool,
    chain: Sequence[Tensor],
    identity: Tensor,
    seed: Tensor,
    p: float,
    first_layer: int,
    pairs_per_tile: int,
    stash: bool,
    need_base: bool,
    need_chain: bool,
) -> list[Tensor]:
    n = identity.shape[0]
    field = PairField(base, packed, n, chain, Dropout(identity, seed, p, first_layer))
    # As wide as the edges that it belongs to: there are as many of them.
    grad = grad.to(field.operand).contiguous()

    def run(pairs: int) -> list[Tensor]:
        grads = FieldGradients(field, need_base=need_base, need_chain=need_chain)
        for tile in field.tiles(pairs):
            if stash:
                states = [field.restored_state(0, field.initial(), tile, HiddenState(hidden, before, True))]
            else:
                states = field.edges_with_states(tile)[1]
            grads.add(tile, grad, states, packed=True)
        out = [grads.base.to(base.dtype)] if need_base else []
        return out + ([g.to(x.dtype) for g, x in zip(grads.chain(), chain, strict=True)] if need_chain else [])

    return with_smaller_tiles(run, pairs_per_tile)


def _edges_backward_fake(
    grad, hidden, before, base, packed, chain, identity, seed, p, first_layer, pairs_per_tile, stash,
    need_base, need_chain,
):  # fmt: skip
    like = ([base] if need_base else []) + (list(chain) if need_chain else [])
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


edges = define_op(
    f"edges({FIELD}, int pairs_per_tile, bool stash) -> (Tensor, Tensor, Tensor)", _edges, _edges_fake
)
_backward = define_op(
    f"edges_backward(Tensor grad, Tensor hidden, Tensor before, {FIELD}, int pairs_per_tile, bool stash, "
    "bool need_base, bool need_chain) -> Tensor[]",
    _edges_backward,
    _edges_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    base, ctx.packed, chain, identity, seed, ctx.p, ctx.first_layer, ctx.pairs, ctx.stash = inputs
    ctx.save_for_backward(*output[1:], base, identity, seed, *chain)
    ctx.mark_non_differentiable(*output[1:])
    # Or autograd would fill the gradients of stashed outputs with zeros, each as large as its stash.
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad: Tensor | None, _grad_hidden: Tensor, _grad_before: Tensor):
    hidden, before, base, identity, seed, *chain = ctx.saved_tensors
    if grad is None:
        return None, None, [None] * len(chain), *([None] * 6)
    need_base, need_chain = ctx.needs_input_grad[0], any_needed(ctx.needs_input_grad[2])
    grads = _backward(
        grad, hidden, before, base, ctx.packed, chain, identity, seed, ctx.p, ctx.first_layer, ctx.pairs, ctx.stash,
        need_base, need_chain,
    )  # fmt: skip
    grad_base = grads.pop(0) if need_base else None
    return grad_base, None, grads if need_chain else [None] * len(chain), None, None, None, None, None, None


define_gradient("edges", _gradient, _setup_context)
define_field_autocast(edges)
