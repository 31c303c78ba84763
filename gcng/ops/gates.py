"""Op (14): batch statistics over the field, the gates of a tile, and the backward through both.

The batch norm folds into the gate map once its statistics are known (identity I3), and the two means of its backward
follow from the weight gradient, so that neither costs a pass over the pairs of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gcng.ops.field_op import FIELD, FieldArguments, field_needs, grouped, keep_field, kept_field, split_arguments
from gcng.ops.pair_field import FieldGradients, PairField, with_smaller_tiles
from gcng.ops.products import accumulate, linear, product
from gcng.ops.registration import compute_dtype, define_field_autocast, define_gradient, define_op
from gcng.ops.tiles import Tile, pair_count, pair_weights

EPS = 1e-5


def packed_chunks(n: int, pairs: int) -> Iterator[slice]:
    """Cut packed storage into runs of ``pairs`` vectors."""
    total = pair_count(n)
    for start in range(0, total, max(pairs, 1)):
        yield slice(start, min(start + max(pairs, 1), total))


def edge_weights(tile: Tile, like: Tensor) -> Tensor:
    """How many ordered pairs each pair of a tile stands for, (R S, 1): 2 where its column is mirrored, else 1."""
    weights = torch.full((*tile.shape, 1), 2.0, dtype=compute_dtype(like.dtype), device=like.device)
    weights[:, : tile.mirror] = 1.0
    return weights.flatten(0, 1)


def moments(field: PairField, pairs: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (D,) of the edges over all N² ordered pairs, in float64.

    Sums are taken around the mean of the first tile, so that a common offset does not cancel. The mean stays in
    float64: its rounding is the same for every pair, and N² equal errors do not average out (docs/derivations.md).
    """
    width = field.base.shape[-1]
    shift: Tensor | None = None
    total, squares = (torch.zeros(width, dtype=torch.float64, device=field.base.device) for _ in range(2))
    for values, weights in _weighted_edges(field, pairs):
        if shift is None:
            shift = values.mean(0, dtype=field.dtype)
        field.kernels.moments(values, weights, shift, total, squares)
    if shift is None:
        return total, squares
    mean = total / field.n**2
    return mean + shift.double(), (squares / field.n**2 - mean.square()).clamp(min=0)


def _weighted_edges(field: PairField, pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
    if field.packed and not field.layers:
        weights = pair_weights(field.n, field.base)
        for chunk in packed_chunks(field.n, pairs):
            yield field.base[chunk], weights[chunk]
        return
    for tile in field.tiles(pairs):
        e = field.edges(tile)
        yield e, edge_weights(tile, e)


class GateHead:
    """Gates as a function of a tile of edges, with the batch norm folded into the map.

    Args:
        norm_weight: (D,) gain. weight: (D, D). bias: (D,). mean, var: (D,) of :func:`moments`, float64.
        field: gives the dtypes of statistics and of the operands of products over pairs.
    """

    def __init__(
        self, norm_weight: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, field: PairField
    ) -> None:
        dtype = field.dtype
        self.gain, self.weight = norm_weight.to(dtype), weight.to(dtype)
        # The mean in two parts, what a tile can subtract and the rest of it.
        self.mean = mean.to(dtype)
        self.rest = (mean - self.mean.double()).to(dtype)
        self.rstd = torch.rsqrt(var + EPS).to(dtype)
        # Rounded to the operand's dtype first: the mean is taken away of what is really multiplied.
        self.folded = (self.weight * (self.gain * self.rstd)).to(field.operand)
        self.shift = (bias.double() - self.folded.double() @ mean).to(dtype)
        self._operands = self.folded, self.shift.to(field.operand)
        # The gate of an average edge: sums of gates are taken around it.
        self.center = torch.sigmoid(bias.to(dtype))

    def logits(self, e: Tensor, out: Tensor) -> Tensor:
        """(B, D) edges to the logits of their gates, written to ``out`` (B, D)."""
        return linear(e, *self._operands, out)


class GateGradients:
    """Backward of :class:`GateHead` and of the batch statistics below it.

    Two passes: :meth:`add` over all pairs, :meth:`finish`, then :meth:`edge_gradient` for every pair.
    """

    def __init__(self, head: GateHead, field: PairField) -> None:
        self.head, self.field, self.n = head, field, field.n
        self.map = torch.zeros_like(head.weight)
        self.bias = torch.zeros_like(head.shift)

    def add(self, grad_logits: Tensor, e: Tensor) -> None:
        """Add pairs: gradients of the gate logits (B, D), both orders summed, and their edges (B, D).

        ``bias`` is added to where the gradients of the logits are made.
        """
        centered = self.field.workspace.take("centered", *e.shape)
        self.field.kernels.center(e, self.head.mean, centered)
        accumulate(self.map, grad_logits.T, centered)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the norm's gain, the map and its bias."""
        head = self.head
        self.map.addr_(self.bias, head.rest, alpha=-1)
        normalized = self.map * head.rstd
        grad_gain = (head.weight * normalized).sum(0)
        scale = head.gain * head.rstd
        self.linear = scale * head.rstd * grad_gain / self.n**2
        self.constant = scale * (head.weight.T @ self.bias) / self.n**2 - self.linear * head.rest
        return grad_gain, normalized * head.gain, self.bias

    def edge_gradient(self, grad_logits: Tensor, e: Tensor, weights: Tensor) -> Tensor:
        """Gradient of the edges (B, D), for pairs that stand for ``weights`` (B, 1) ordered pairs each."""
        out = self.field.workspace.take("grad", *e.shape, self.field.dtype)
        product(grad_logits, self.head.folded, out)
        self.field.kernels.norm_gradient(out, e, weights, self.head.mean, self.constant, self.linear)
        return out


@grouped(FieldArguments)
def _edge_moments(arguments: FieldArguments, pairs_per_tile: int) -> tuple[Tensor, Tensor]:
    field = arguments.open()
    return with_smaller_tiles(lambda pairs: moments(field, pairs), pairs_per_tile, field)


@grouped(FieldArguments)
def _edge_moments_fake(arguments: FieldArguments, pairs_per_tile: int) -> tuple[Tensor, Tensor]:
    base = arguments.base
    mean, var = (base.new_empty((base.shape[-1],), dtype=torch.float64) for _ in range(2))
    return mean, var


@grouped(FieldArguments, after=3)
def _edge_moments_backward(
    grad_mean: Tensor,
    grad_var: Tensor,
    mean: Tensor,
    arguments: FieldArguments,
    pairs_per_tile: int,
    need_base: bool,
    need_chain: bool,
) -> list[Tensor]:
    field = arguments.open()
    n = field.n

    def run(pairs: int) -> list[Tensor]:
        grads = FieldGradients(field, need_base=need_base, need_chain=need_chain)
        rounded = mean.to(field.dtype)
        linear = -2 * grad_var / n**2
        constant = -grad_mean / n**2 - linear * (mean - rounded.double())
        for tile in field.tiles(pairs):
            e, states = field.edges_with_states(tile)
            grad = field.take_wide("grad", tile).zero_()
            field.kernels.norm_gradient(
                grad, e, edge_weights(tile, e), rounded, constant.to(field.dtype), linear.to(field.dtype)
            )
            grads.add(tile, grad, states)
        return arguments.gradients(grads)

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(FieldArguments, after=3)
def _edge_moments_backward_fake(
    grad_mean, grad_var, mean, arguments: FieldArguments, pairs_per_tile, need_base, need_chain
) -> list[Tensor]:
    return arguments.like_gradients(need_base, need_chain)


edge_moments = define_op(
    f"edge_moments({FIELD}, int pairs_per_tile) -> (Tensor, Tensor)", _edge_moments, _edge_moments_fake
)
_backward = define_op(
    f"edge_moments_backward(Tensor grad_mean, Tensor grad_var, Tensor mean, {FIELD}, int pairs_per_tile, "
    "bool need_base, bool need_chain) -> Tensor[]",
    _edge_moments_backward,
    _edge_moments_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    arguments, ctx.pairs = split_arguments(inputs, FieldArguments)
    keep_field(ctx, arguments, (), output[0])


def _gradient(ctx, grad_mean: Tensor | None, grad_var: Tensor | None):
    arguments, (mean,) = kept_field(ctx)
    if grad_mean is None and grad_var is None:
        return *arguments.spread(), None
    needs = field_needs(ctx)
    grads = [torch.zeros_like(mean) if grad is None else grad for grad in (grad_mean, grad_var)]
    return *arguments.spread(needs, _backward(*grads, mean, *arguments, ctx.pairs, *needs)), None


define_gradient("edge_moments", _gradient, _setup_context)
define_field_autocast(edge_moments)
