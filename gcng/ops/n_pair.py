"""Op (20): the synthetic N-pair loss of the metric phase, from the edge field to one number.

The gates are constants here: the forward runs over the tiles twice (batch statistics, then gates, synthetic negatives
and a running log-sum-exp per anchor), the backward once more. Nothing larger than a tile is kept but the packed gates,
if the budget allows them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gcng.ops.dispatch import operand_dtype, synthesis_kernels
from gcng.ops.field_op import FIELD, FieldArguments, grouped, keep_field, kept_field, split_arguments
from gcng.ops.gates import GateHead, moments
from gcng.ops.layout import class_boundaries
from gcng.ops.pair_field import PairField, with_smaller_tiles
from gcng.ops.pair_kernels import GateSpread
from gcng.ops.recycled import packed_storage
from gcng.ops.registration import compute_dtype, define_field_autocast, define_gradient, define_op
from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, Synthesis, SyntheticGradients
from gcng.ops.tiles import Tile, pair_count
from gcng.ops.validation import check_mix

HEAD = "Tensor norm_weight, Tensor gate_weight, Tensor gate_bias"
BATCH = "Tensor z, Tensor kappa, Tensor mix, Tensor class_start"


class HeadArguments(NamedTuple):
    """The arguments of ``HEAD``: gain of the batch norm (D,), map (D, D) and its bias (D,) of (14)."""

    norm_weight: Tensor
    gate_weight: Tensor
    gate_bias: Tensor


class BatchArguments(NamedTuple):
    """The arguments of ``BATCH``."""

    z: Tensor  # (N, D) embeddings, class-major
    kappa: Tensor  # 0-dim
    mix: Tensor  # (K, K - 1)
    class_start: Tensor  # (N + 1,) int64

    def synthesis(self, op: str, dtype: torch.dtype) -> Synthesis:
        """The geometry, with the mixing numbers checked against the largest class."""
        boundaries = class_boundaries(self.class_start)
        check_mix(op, self.mix, max((b - a for a, b in itertools.pairwise(boundaries)), default=0))
        z = self.z.to(dtype).contiguous()
        return Synthesis(z, boundaries, self.kappa, self.mix, synthesis_kernels(z))


class Gates(NamedTuple):
    """Where the gates of a tile come from: the field and its head, or the packed stash."""

    field: PairField
    head: GateHead
    kept: Tensor  # (P, D), or (0, D)

    def tile(self, tile: Tile) -> Tensor:
        """Gates (R S, D), evaluated from the edges or read from the stash; valid until the next tile."""
        if not self.kept.shape[0]:
            return self.of(self.field.edges(tile), tile)
        return self.field.kernels.load(self.kept, self.field.n, tile, self.field.take("gates", tile))

    def of(self, e: Tensor, tile: Tile, *, spread: GateSpread | None = None, fill: bool = False) -> Tensor:
        """Gates of the edges (R S, D) of a tile; ``fill`` stashes them, ``spread`` receives their sums."""
        field = self.field
        values = self.head.logits(e, field.take("gates", tile))
        stash = self.kept if fill and self.kept.shape[0] else None
        field.kernels.gates(values, field.n, tile, stash=stash, spread=spread)
        return values


def prepare_gates(field: PairField, head: HeadArguments, pairs: int, stash: bool) -> tuple[Gates, Tensor, Tensor]:
    """First pass of both phases: statistics of the field, and room for its gates."""
    mean, var = moments(field, pairs)
    kept = packed_storage(field.base, field.n if stash else 0, field.width)
    return Gates(field, GateHead(*head, mean, var, field), kept), mean, var


def for_each_side(
    gates: Gates, synthesis: Synthesis, pairs: int, visit: Callable[[Side, Tensor], None], *, fill: bool = False
) -> None:
    """Visit both anchor sides of every tile with its gates; ``fill`` evaluates and stashes them on the way."""
    for tile in gates.field.tiles(pairs, synthesis.boundaries):
        values = gates.of(gates.field.edges(tile), tile, fill=True) if fill else gates.tile(tile)
        for side in synthesis.sides(tile):
            visit(side, side.view(values.view(*tile.shape, -1)))


class _RunningSoftmax:
    """Log-sum-exp of each anchor's logits over the tiles, and the sum of squares of its candidates."""

    def __init__(self, synthesis: Synthesis) -> None:
        n = synthesis.z.shape[0]
        self.zero, self.lowest = synthesis.zero, synthesis.lowest
        self.maximum = synthesis.z.new_full((n,), -math.inf)
        self.total = synthesis.z.new_zeros((n,))
        self.squares = torch.zeros((), dtype=torch.float64, device=synthesis.z.device)

    def visit(self, side: Side, gate: Tensor) -> None:
        syn = side.synthesize(gate, need_values=False)
        kept = side.others
        self.squares += torch.where(kept, syn.squares, self.zero).sum(dtype=torch.float64)
        self.add(side.anchors, torch.where(kept, syn.dots, self.lowest))

    def add(self, anchors: slice, logits: Tensor) -> None:
        before = self.maximum[anchors]
        raised = torch.maximum(before, logits.amax(-1))
        # A floor for rows that have seen nothing yet: exp(-inf - 0) is 0, exp(-inf + inf) is not.
        shift = torch.where(raised == -math.inf, self.zero, raised)
        self.total[anchors] = self.total[anchors] * (before - shift).exp() + (logits - shift[:, None]).exp().sum(-1)
        self.maximum[anchors] = raised

    def lse(self) -> Tensor:
        return self.maximum + self.total.log()


@grouped(BatchArguments, FieldArguments, HeadArguments)
def _n_pair_synthesis(
    batch: BatchArguments,
    edges: FieldArguments,
    head: HeadArguments,
    l2_reg: float,
    pairs_per_tile: int,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    field = edges.open()
    synthesis = batch.synthesis("n_pair_synthesis", field.dtype)

    def run(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if not synthesis.has_negatives:
            nothing = field.base.new_zeros((pair_count(field.n) if stash else 0, field.width))
            loss, lse = (field.base.new_zeros(size, dtype=field.dtype) for size in ((), field.n))
            mean, var = (torch.zeros(field.width, dtype=torch.float64, device=lse.device) for _ in range(2))
            return loss, mean, var, lse, nothing
        gates, mean, var = prepare_gates(field, head, pairs, stash)
        softmax = _RunningSoftmax(synthesis)
        for_each_side(gates, synthesis, pairs, softmax.visit, fill=True)
        wide, anchors = synthesis.z, synthesis.is_anchor
        positive_logit = (wide * wide[synthesis.positive]).sum(-1)
        softmax.add(slice(None), torch.where(anchors, positive_logit, 0.0)[:, None])
        lse = softmax.lse()
        count, pair_total = synthesis.num_anchors, synthesis.num_anchors * synthesis.num_classes
        own = torch.where(anchors, lse - positive_logit, 0.0).sum() / count
        norms = torch.where(anchors, wide.square().sum(-1), 0.0).sum()
        positives = torch.where(anchors, wide[synthesis.positive].square().sum(-1), 0.0).sum()
        squares = norms / count + (softmax.squares + positives) / pair_total
        return (own + 0.25 * l2_reg * squares).to(field.dtype), mean, var, lse, gates.kept

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(BatchArguments, FieldArguments, HeadArguments)
def _n_pair_synthesis_fake(
    batch: BatchArguments, edges: FieldArguments, head: HeadArguments, l2_reg, pairs_per_tile, stash
) -> tuple[Tensor, ...]:
    z, base = batch.z, edges.base
    n, width = z.shape
    loss, lse = (z.new_empty(size, dtype=compute_dtype(base.dtype)) for size in ((), (n,)))
    mean, var = (z.new_empty((width,), dtype=torch.float64) for _ in range(2))
    return loss, mean, var, lse, z.new_empty((pair_count(n) if stash else 0, width), dtype=operand_dtype(base))


@grouped(BatchArguments, FieldArguments, HeadArguments, after=5)
def _n_pair_synthesis_backward(
    grad: Tensor,
    mean: Tensor,
    var: Tensor,
    lse: Tensor,
    kept: Tensor,
    batch: BatchArguments,
    edges: FieldArguments,
    head: HeadArguments,
    l2_reg: float,
    pairs_per_tile: int,
) -> Tensor:
    field = edges.open()
    synthesis = batch.synthesis("n_pair_synthesis", field.dtype)
    if not synthesis.has_negatives:
        return torch.zeros_like(batch.z, memory_format=torch.contiguous_format)
    gates = Gates(field, GateHead(*head, mean, var, field), kept)
    upstream = grad.to(field.dtype)
    count, pair_total = synthesis.num_anchors, synthesis.num_anchors * synthesis.num_classes
    decay, scale = 0.5 * l2_reg * upstream, upstream / count
    penalty_of_one = 0.5 * decay / pair_total

    def run(pairs: int) -> Tensor:
        grads = EmbeddingGradients(synthesis)

        def visit(side: Side, gate: Tensor) -> None:
            kept_rows = side.others
            logits = side.synthesize(gate, need_values=False).dots
            probability = (logits - lse[side.anchors][:, None]).exp() * scale
            probability = torch.where(kept_rows, probability, synthesis.zero)
            penalty = torch.where(kept_rows, penalty_of_one, synthesis.zero)
            side.backward(gate, SyntheticGradients(None, probability, penalty), grads)

        for_each_side(gates, synthesis, pairs, visit)
        _add_positive_column(grads, lse, scale, decay / count, decay / pair_total)
        return grads.finish().to(batch.z.dtype)

    return with_smaller_tiles(run, pairs_per_tile, field)


def _add_positive_column(
    grads: EmbeddingGradients, lse: Tensor, scale: Tensor, anchor_decay: Tensor, positive_decay: Tensor
) -> None:
    """The own column of (20) holds the positive: its softmax gradient and the two penalties."""
    synthesis = grads.synthesis
    z, positive = synthesis.z, synthesis.positive
    logit = (z * z[positive]).sum(-1)
    # softmax minus one of a confident row: expm1 keeps the digits that a difference of two numbers near 1 would lose.
    slope = torch.where(synthesis.is_anchor, torch.expm1(logit - lse) * scale, 0.0)[:, None]
    valid = synthesis.is_anchor[:, None].to(z.dtype)
    grads.z += slope * z[positive] + valid * anchor_decay * z
    grads.z.index_add_(0, positive, slope * z + valid * positive_decay * z[positive])


def _n_pair_synthesis_backward_fake(grad, mean, var, lse, kept, z, *arguments):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


n_pair_synthesis = define_op(
    f"n_pair_synthesis({BATCH}, {FIELD}, {HEAD}, float l2_reg, int pairs_per_tile, bool stash) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _n_pair_synthesis,
    _n_pair_synthesis_fake,
)
_backward = define_op(
    f"n_pair_synthesis_backward(Tensor grad, Tensor mean, Tensor var, Tensor lse, Tensor kept, {BATCH}, {FIELD}, "
    f"{HEAD}, float l2_reg, int pairs_per_tile) -> Tensor",
    _n_pair_synthesis_backward,
    _n_pair_synthesis_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    batch, edges, head, ctx.l2_reg, ctx.pairs, _stash = split_arguments(
        inputs, BatchArguments, FieldArguments, HeadArguments
    )
    keep_field(ctx, edges, output[1:], *batch, *head)


def _gradient(ctx, grad: Tensor | None, *_unused):
    edges, kept = kept_field(ctx)
    grad_z = None
    if grad is not None and ctx.needs_input_grad[0]:
        stashes, batch, head = kept[:4], kept[4:8], kept[8:]
        grad_z = _backward(grad, *stashes, *batch, *edges, *head, ctx.l2_reg, ctx.pairs)
    return grad_z, None, None, None, *edges.spread(), *([None] * 6)


define_gradient("n_pair_synthesis", _gradient, _setup_context)
define_field_autocast(n_pair_synthesis)
