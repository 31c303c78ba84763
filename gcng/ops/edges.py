"""Op (9)-(13): edge layers on all unordered pairs, written to packed storage.

The materialized form of the lazy field, for budgets that allow it: one packed tensor of N (N + 1) / 2 edges, and, if
they may be kept too, the two tensors that spare the backward its recomputation.
"""

from __future__ import annotations

from torch import Tensor

from gcng.ops.dispatch import operand_dtype
from gcng.ops.field_op import FIELD, FieldArguments, field_needs, grouped, keep_field, kept_field, split_arguments
from gcng.ops.pair_field import FieldGradients, HiddenState, with_smaller_tiles
from gcng.ops.recycled import packed_storage
from gcng.ops.registration import define_field_autocast, define_gradient, define_op
from gcng.ops.tiles import pair_count


@grouped(FieldArguments)
def _edges(arguments: FieldArguments, pairs_per_tile: int, stash: bool) -> tuple[Tensor, Tensor, Tensor]:
    field = arguments.open()
    n, width = field.n, field.width
    if stash and len(field.layers) != 1:
        raise ValueError(f"gcng::edges: stash needs a chain of one layer, got {len(field.layers)}")

    def run(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        out, hidden, before = (
            packed_storage(field.base, n if wanted else 0, channels)
            for channels, wanted in ((width, True), (4 * width, stash), (width, stash))
        )
        for tile in field.tiles(pairs):
            if len(field.layers) == 1:
                kept_tensors = (hidden, before) if stash else None
                field.forward_layer(0, field.initial(), tile, out, keep=False, packed=True, stash=kept_tensors)
            else:
                field.kernels.store(out, n, tile, field.edges(tile))
        return out, hidden, before

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(FieldArguments)
def _edges_fake(arguments: FieldArguments, pairs_per_tile: int, stash: bool) -> tuple[Tensor, Tensor, Tensor]:
    base, width = arguments.base, arguments.base.shape[-1]
    pairs = pair_count(arguments.n)
    kept = pairs if stash else 0
    sizes = ((pairs, width), (kept, 4 * width), (kept, width))
    return tuple(base.new_empty(size, dtype=operand_dtype(base)) for size in sizes)


@grouped(FieldArguments, after=3)
def _edges_backward(
    grad: Tensor,
    hidden: Tensor,
    before: Tensor,
    arguments: FieldArguments,
    pairs_per_tile: int,
    stash: bool,
    need_base: bool,
    need_chain: bool,
) -> list[Tensor]:
    field = arguments.open()
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
        return arguments.gradients(grads)

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(FieldArguments, after=3)
def _edges_backward_fake(
    grad, hidden, before, arguments: FieldArguments, pairs_per_tile, stash, need_base, need_chain
) -> list[Tensor]:
    return arguments.like_gradients(need_base, need_chain)


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
    arguments, ctx.pairs, ctx.stash = split_arguments(inputs, FieldArguments)
    keep_field(ctx, arguments, output[1:])


def _gradient(ctx, grad: Tensor | None, _grad_hidden: Tensor, _grad_before: Tensor):
    arguments, stashes = kept_field(ctx)
    if grad is None:
        return *arguments.spread(), None, None
    needs = field_needs(ctx)
    return *arguments.spread(needs, _backward(grad, *stashes, *arguments, ctx.pairs, ctx.stash, *needs)), None, None


define_gradient("edges", _gradient, _setup_context)
define_field_autocast(edges)
