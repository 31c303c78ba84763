"""Op (24)-(26): the generator phase's losses on synthetic negatives, from the edge field to three numbers.

The embeddings are constants here, the gates are not. Forward: batch statistics, then per tile gates, synthetic
negatives, classifier log-sum-exp, cosines, and sums of gates for the diversity. Backward: per tile the gradient of the
gates, whose sums give the gradients of the head and the batch norm's two means; then the gradient of the edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcng.ops.class_cross_entropy import streamed_logit_gradient, streamed_logsumexp
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
from gcng.ops.gates import GateGradients, GateHead, edge_weights, packed_chunks
from gcng.ops.n_pair import BATCH, HEAD, BatchArguments, Gates, HeadArguments, prepare_gates
from gcng.ops.pair_field import FieldGradients, with_smaller_tiles
from gcng.ops.pair_kernels import GateSpread
from gcng.ops.registration import compute_dtype, define_field_autocast, define_gradient, define_op
from gcng.ops.synthesis_tiles import Side, Synthesis, Synthetic, SyntheticGradients
from gcng.ops.tiles import Tile, pair_count, pair_weights

COSINE_FLOOR = 1e-8  # as torch.nn.functional.cosine_similarity
CLASSES = "Tensor class_labels, Tensor dropped_class, Tensor classifier_weight, Tensor? classifier_bias"


class ClassArguments(NamedTuple):
    """The arguments of ``CLASSES``: what the generator's losses know about the classes."""

    class_labels: Tensor  # (N,) label of every node, class-major
    dropped_class: Tensor  # (N,) class whose entry (25) counts as 0, for every anchor
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)


def _empty_spread(gates: Gates) -> GateSpread:
    center, base = gates.head.center, gates.field.base
    squares = torch.zeros((), dtype=torch.float64, device=center.device)
    return GateSpread(center, base.new_zeros((gates.field.n, center.shape[0]), dtype=center.dtype), squares)


def _row_means_and_deviation(spread: GateSpread, n: int) -> tuple[Tensor, Tensor]:
    """Row means of the gates (N, D), and their deviation: the square root of (26), 0-dim float64."""
    explained = spread.row_sums.square().sum(dtype=torch.float64) / max(n, 1)
    deviation = ((spread.squares - explained).clamp(min=0) / max(n, 1) ** 2).sqrt()
    return spread.row_sums / max(n, 1) + spread.center, deviation


class _Terms:
    """What the losses (24) and (25) take of the batch besides the synthetic negatives."""

    def __init__(self, synthesis: Synthesis, classes: ClassArguments) -> None:
        self._targets = classes.class_labels[synthesis.starts[:-1]]  # (M,)
        self._norms = torch.linalg.vector_norm(synthesis.z, dim=-1, keepdim=True).clamp(min=COSINE_FLOOR)
        # (N, M) bool, once for all sides.
        self._counted = synthesis.is_anchor[:, None] & (classes.dropped_class[:, None] != synthesis.class_numbers)

    def targets(self, side: Side) -> Tensor:
        """Target label of each synthetic negative of a side, (A m,)."""
        return self._targets[side.classes].expand(side.shape).reshape(-1)

    def cosines(self, side: Side, syn: Synthetic) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine of every anchor and synthetic negative (A, m), and both norms."""
        anchor_norm, norm = self._norms[side.anchors], syn.squares.sqrt().clamp(min=COSINE_FLOOR)
        return syn.dots / (anchor_norm * norm), anchor_norm, norm

    def counted(self, side: Side) -> Tensor:
        """(A, m) bool: entries that (25) counts."""
        return self._counted[side.anchors, side.classes]


@grouped(BatchArguments, FieldArguments, HeadArguments, ClassArguments)
def _generator_synthesis(
    batch: BatchArguments,
    edges: FieldArguments,
    head: HeadArguments,
    classes: ClassArguments,
    pairs_per_tile: int,
    stash: bool,
) -> tuple[Tensor, ...]:
    field = edges.open()
    n, device = field.n, field.base.device
    synthesis = batch.synthesis("generator_synthesis", field.dtype)
    terms, weight = _Terms(synthesis, classes), classes.weight.to(field.operand)

    def run(pairs: int) -> tuple[Tensor, ...]:
        gates, mean, var = prepare_gates(field, head, pairs, stash)
        spread = _empty_spread(gates)
        lse = torch.zeros((n, synthesis.num_classes), dtype=torch.float64, device=device)
        entropy, distance, zero = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))

        def visit(side: Side, gate: Tensor) -> None:
            nonlocal entropy, distance
            syn = side.synthesize(gate)
            rows = syn.values.flatten(0, 1).to(weight.dtype)
            side_lse, logit = streamed_logsumexp(rows, weight, classes.bias, terms.targets(side))
            lse[side.anchors, side.classes] = side_lse.view(side.shape)
            losses = (side_lse - logit).view(side.shape)
            entropy = entropy + torch.where(side.valid, losses, zero).sum()
            cosine = terms.cosines(side, syn)[0].double()
            distance = distance + torch.where(terms.counted(side), 1 - cosine, zero).sum()

        for tile in field.tiles(pairs, synthesis.cuts):
            values = gates.of(field.edges(tile), tile, spread=spread, fill=True).view(*tile.shape, -1)
            for side in synthesis.sides(tile):
                visit(side, side.view(values))
        row_means, deviation = _row_means_and_deviation(spread, n)
        pair_total = max(synthesis.num_anchors * synthesis.num_classes, 1)
        losses = (entropy / pair_total, distance / pair_total, 0.01 * (1 - deviation))
        return *(x.to(field.dtype) for x in losses), mean, var, lse, row_means, deviation, gates.kept

    return with_smaller_tiles(run, pairs_per_tile, field)


@grouped(BatchArguments, FieldArguments)
def _generator_synthesis_fake(batch: BatchArguments, edges: FieldArguments, *rest) -> tuple[Tensor, ...]:
    z, base, stash = batch.z, edges.base, rest[-1]
    n, width = z.shape
    num_classes = torch.library.get_ctx().new_dynamic_size(min=0)
    sizes = ((), (), (), None, None, None, (n, width), None, None)
    out = [None if size is None else z.new_empty(size, dtype=compute_dtype(base.dtype)) for size in sizes]
    out[3], out[4] = (z.new_empty((width,), dtype=torch.float64) for _ in range(2))
    out[5], out[7] = z.new_empty((n, num_classes), dtype=torch.float64), z.new_empty((), dtype=torch.float64)
    out[8] = z.new_empty((pair_count(n) if stash else 0, width), dtype=operand_dtype(base))
    return tuple(out)


class _GateGradient:
    """Gradient of the gates of a tile, both orders of a pair summed, times the slope of the sigmoid."""

    def __init__(
        self,
        gates: Gates,
        synthesis: Synthesis,
        classes: ClassArguments,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> None:
        self.gates, self.synthesis, self.classes = gates, synthesis, classes
        self._terms = _Terms(synthesis, classes)
        self.lse, self.row_means, deviation = saved
        dtype, n = gates.field.dtype, gates.field.n
        pair_total = max(synthesis.num_anchors * synthesis.num_classes, 1)
        scale_entropy, self.scale_distance = (g.to(dtype) / pair_total for g in grads[:2])
        self.scale_entropy = torch.where(synthesis.is_anchor[:, None], scale_entropy, synthesis.zero)  # (N, 1)
        # A spread of exactly 0 has gradient 0: the square root has none there.
        flat = deviation == 0
        slope = -0.01 * grads[2].double() / (max(n, 1) ** 2 * torch.where(flat, 1.0, deviation))
        self.scale_spread = torch.where(flat, 0.0, slope).to(dtype)
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        self._weight = classes.weight.to(gates.field.operand)

    def logits(self, tile: Tile, values: Tensor, bias: Tensor | None, *, need_classifier: bool) -> Tensor:
        """Gradient of the gate logits of a tile (R S, D), from its gates; its column sum is added to ``bias`` (D,)."""
        field = self.gates.field
        grad = field.take_wide("grad gates", tile)
        field.kernels.spread_gradient(values, self.row_means, self.scale_spread, tile, grad)
        for side in self.synthesis.sides(tile):
            syn = side.synthesize(side.view(values.view(*tile.shape, -1)))
            grads = self._synthetic(side, syn, need_classifier)
            side.add_gate_gradient(syn, grads, side.view(grad.view(*tile.shape, -1)))
        out = grad if field.operand == field.dtype else field.take("grad logits", tile)
        field.kernels.gate_logits_gradient(grad, values, out, bias)
        return out

    def _synthetic(self, side: Side, syn: Synthetic, need_classifier: bool) -> SyntheticGradients:
        """Gradients of the synthetic negatives of a side."""
        grad, grad_weight, grad_bias = streamed_logit_gradient(
            syn.values.flatten(0, 1).to(self._weight.dtype),
            self._weight,
            self.classes.bias,
            self._terms.targets(side),
            self.lse[side.anchors, side.classes].reshape(-1),
            self.scale_entropy[side.anchors].expand(side.shape).reshape(-1),
            need_weight=need_classifier,
            weight_dtype=self.gates.field.dtype,  # a sum over tiles
        )
        if need_classifier:
            self._add_classifier(grad_weight, grad_bias)
        cosine, anchor_norm, norm = self._terms.cosines(side, syn)
        scale = torch.where(self._terms.counted(side), self.scale_distance, self.synthesis.zero)
        return SyntheticGradients(
            grad.view_as(syn.values), -scale / (anchor_norm * norm), 0.5 * scale * cosine / norm.square()
        )

    def _add_classifier(self, grad_weight: Tensor, grad_bias: Tensor | None) -> None:
        if self.grad_weight is None:
            self.grad_weight, self.grad_bias = grad_weight, grad_bias
            return
        self.grad_weight += grad_weight
        if grad_bias is not None:
            self.grad_bias += grad_bias


@grouped(BatchArguments, FieldArguments, HeadArguments, ClassArguments, after=7)
def _generator_synthesis_backward(
    grads: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    lse: Tensor,
    row_means: Tensor,
    deviation: Tensor,
    kept: Tensor,
    batch: BatchArguments,
    edges: FieldArguments,
    head: HeadArguments,
    classes: ClassArguments,
    pairs_per_tile: int,
    need_base: bool,
    need_chain: bool,
    need_classifier: bool,
) -> list[Tensor]:
    field = edges.open()
    synthesis = batch.synthesis("generator_synthesis", field.dtype)
    gates = Gates(field, GateHead(*head, mean, var, field), kept)

    def run(pairs: int) -> list[Tensor]:
        gradient = _GateGradient(gates, synthesis, classes, (lse, row_means, deviation), grads)
        head_grads = GateGradients(gates.head, field)
        field_grads = FieldGradients(field, need_base=need_base, need_chain=need_chain)
        if field.packed and not field.layers:
            out_head = _backward_materialized(gates, gradient, head_grads, field_grads, pairs, need_classifier)
        else:
            out_head = _backward_recomputing(gates, gradient, head_grads, field_grads, pairs, need_classifier)
        out = [g.to(x.dtype) for g, x in zip(out_head, head, strict=True)]
        if need_classifier:
            out += _classifier_gradients(gradient, classes)
        return out + edges.gradients(field_grads)

    return with_smaller_tiles(run, pairs_per_tile, field)


def _classifier_gradients(gradient: _GateGradient, classes: ClassArguments) -> list[Tensor]:
    weight, bias = gradient.grad_weight, gradient.grad_bias
    out = [torch.zeros_like(classes.weight) if weight is None else weight.to(classes.weight.dtype)]
    if classes.bias is not None:
        out.append(torch.zeros_like(classes.bias) if bias is None else bias.to(classes.bias.dtype))
    return out


def _backward_materialized(
    gates: Gates,
    gradient: _GateGradient,
    head_grads: GateGradients,
    field_grads: FieldGradients,
    pairs: int,
    need_classifier: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Edges are in packed storage: one packed buffer first holds the gradient of the gate logits, then of the edges."""
    field = gates.field
    buffer = field_grads.base if field_grads.base is not None else torch.zeros_like(field.base)
    for tile in field.tiles(pairs, gradient.synthesis.cuts):
        logits = gradient.logits(tile, gates.tile(tile), head_grads.bias, need_classifier=need_classifier)
        field.kernels.add_packed(buffer, field.n, tile, logits)
    for chunk in packed_chunks(field.n, pairs):
        head_grads.add(buffer[chunk], field.base[chunk])
    out = head_grads.finish()
    if field_grads.base is not None:
        weights = pair_weights(field.n, field.base)
        for chunk in packed_chunks(field.n, pairs):
            buffer[chunk] = head_grads.edge_gradient(buffer[chunk], field.base[chunk], weights[chunk])
    return out


def _backward_recomputing(
    gates: Gates,
    gradient: _GateGradient,
    head_grads: GateGradients,
    field_grads: FieldGradients,
    pairs: int,
    need_classifier: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is stored: every tile is evaluated once for the sums over all pairs, and once more for its gradient."""
    field = gates.field
    tiles = field.tiles(pairs, gradient.synthesis.cuts)
    for tile in tiles:
        e = field.edges(tile)
        logits = gradient.logits(tile, gates.of(e, tile), head_grads.bias, need_classifier=need_classifier)
        head_grads.add(logits, e)
    out = head_grads.finish()
    for tile in tiles if field_grads.wanted else ():
        e, states = field.edges_with_states(tile)
        logits = gradient.logits(tile, gates.of(e, tile), None, need_classifier=False)
        field_grads.add(tile, head_grads.edge_gradient(logits, e, edge_weights(tile, e)), states)
    return out


@grouped(BatchArguments, FieldArguments, HeadArguments, ClassArguments, after=7)
def _generator_synthesis_backward_fake(
    grads, mean, var, lse, row_means, deviation, kept, batch: BatchArguments, edges: FieldArguments,
    head: HeadArguments, classes: ClassArguments, pairs_per_tile, need_base, need_chain, need_classifier,
) -> list[Tensor]:  # fmt: skip
    like = [*head]
    if need_classifier:
        like += [classes.weight] + ([] if classes.bias is None else [classes.bias])
    return empty_like_all(like) + edges.like_gradients(need_base, need_chain)


_ARGUMENTS = f"{BATCH}, {FIELD}, {HEAD}, {CLASSES}, int pairs_per_tile"
generator_synthesis = define_op(
    f"generator_synthesis({_ARGUMENTS}, bool stash) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _generator_synthesis,
    _generator_synthesis_fake,
)
_backward = define_op(
    "generator_synthesis_backward(Tensor[] grads, Tensor mean, Tensor var, Tensor lse, Tensor row_means, "
    f"Tensor deviation, Tensor kept, {_ARGUMENTS}, bool need_base, bool need_chain, bool need_classifier) -> Tensor[]",
    _generator_synthesis_backward,
    _generator_synthesis_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    batch, edges, head, classes, ctx.pairs, _stash = split_arguments(
        inputs, BatchArguments, FieldArguments, HeadArguments, ClassArguments
    )
    ctx.has_bias = classes.bias is not None
    keep_field(ctx, edges, output[3:], *batch, *head, *(x for x in classes if x is not None))


def _gradient(ctx, *upstream):
    edges, kept = kept_field(ctx)
    stashes, batch, head, classes = kept[:6], kept[6:10], kept[10:13], kept[13:]
    needs, at = field_needs(ctx, len(batch)), len(batch) + len(edges) + len(head)
    need_classifier = any(ctx.needs_input_grad[at + 2 : at + 4])
    terms = [stashes[0].new_zeros(()) if grad is None else grad for grad in upstream[:3]]
    bias = [] if ctx.has_bias else [None]
    grads = _backward(
        terms, *stashes, *batch, *edges, *head, *classes, *bias, ctx.pairs, *needs, need_classifier
    )
    grad_head, rest = grads[:3], list(grads[3:])
    grad_weight = rest.pop(0) if need_classifier else None
    grad_bias = rest.pop(0) if need_classifier and ctx.has_bias else None
    return (
        *([None] * len(batch)), *edges.spread(needs, rest), *grad_head, None, None, grad_weight, grad_bias, None, None,
    )  # fmt: skip


define_gradient("generator_synthesis", _gradient, _setup_context)
define_field_autocast(generator_synthesis)
