"""Op (15)-(18): channel-weighted synthetic negatives of a tile of (anchor, class) pairs, and the dense drop-in form.

The chain (18) is a convex combination, so a synthetic negative is ``a + Σ_g w_g (n_g - a) ⊙ t_g`` over the samples g of
its class, with ``t = ρ + κ (1 - ρ) gate``, ``ρ = dp / dn`` (1 where the negative is not farther than the positive).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcng import reference
from gcng.batch_layout import BatchLayout
from gcng.mode import in_reference_mode
from gcng.ops.layout import class_boundaries, class_major, host_labels
from gcng.ops.registration import compute_dtype, define_autocast, define_gradient, define_op
from gcng.ops.tiles import Tile
from gcng.ops.validation import check_channels, check_float_matrix, check_labels, check_same_device, check_same_dtype

DISTANCE_OFFSET = 1e-6  # (15): added to every channel before the norm
DENSE_PAIRS = 4096  # (anchor, negative) pairs of one block of the dense form


def chain_weights(mix: Tensor, boundaries: Sequence[int], ranks: int) -> Tensor:
    """Weight of every node in the chain (18) of its class, for every anchor rank: (K, N).

    ``(1 - lam_g) Π_{t > g} lam_t`` with ``lam_0 = 0``, over the K_j samples of class j.
    """
    out = mix.new_zeros((ranks, boundaries[-1]))
    sizes = {stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)}
    by_size = {size: _weights_of_size(mix, size) for size in sizes}
    for start, stop in zip(boundaries, boundaries[1:], strict=False):
        out[:, start:stop] = by_size[stop - start]
    return out


def _weights_of_size(mix: Tensor, size: int) -> Tensor:
    lam = mix[:, : size - 1]
    kept = torch.cat([torch.zeros_like(mix[:, :1]) if size > 1 else mix.new_zeros((mix.shape[0], 1)), lam], 1)
    tail = torch.cat([lam, torch.ones_like(kept[:, :1])], 1).flip(1).cumprod(1).flip(1)
    return (1 - kept) * tail


class Synthesis:
    """Geometry of the anchors and negatives of a class-major batch; everything that does not depend on the gates.

    Args:
        z: (N, D) embeddings. boundaries: class starts and N. kappa: 0-dim. mix: (K, K - 1).
    """

    def __init__(self, z: Tensor, boundaries: Sequence[int], kappa: Tensor, mix: Tensor) -> None:
        self.z, self.boundaries, self.kappa = z, list(boundaries), kappa.to(z)
        counts = [stop - start for start, stop in zip(self.boundaries, self.boundaries[1:], strict=False)]
        self.counts, self.num_classes = counts, len(counts)
        self.num_anchors = sum(count for count in counts if count > 1)
        device, most = z.device, max(counts, default=0)
        self.weights = chain_weights(mix.to(z), self.boundaries, max(most, 1)) if counts else z.new_zeros((1, 0))
        count = torch.tensor(counts, device=device, dtype=torch.int64)
        self.class_index = torch.repeat_interleave(count)
        start = torch.tensor(self.boundaries[:-1], device=device, dtype=torch.int64)[self.class_index]
        self.rank = torch.arange(z.shape[0], device=device) - start
        self.positive = start + (self.rank + 1) % count[self.class_index].clamp(min=1)
        self.is_anchor = (count > 1)[self.class_index]
        self.positive_distance = torch.linalg.vector_norm(z - z[self.positive] + DISTANCE_OFFSET, dim=-1)

    @property
    def has_negatives(self) -> bool:
        """Whether any anchor has a negative: at least two classes, one of them with two samples."""
        return self.num_classes > 1 and self.num_anchors > 0

    def sides(self, tile: Tile) -> list[Side]:
        """The anchor sides of a tile: its rows against its columns, its mirrored columns against its rows."""
        rows = Side(self, tile.rows, tile.columns, slice(None), mirrored=False)
        if tile.mirrored.start >= tile.mirrored.stop:
            return [rows]
        return [rows, Side(self, tile.mirrored, tile.rows, slice(tile.mirror, None), mirrored=True)]


class Side:
    """A block of anchors (A) against a block of whole classes (m classes, B samples)."""

    def __init__(
        self, synthesis: Synthesis, anchors: slice, negatives: slice, columns: slice, *, mirrored: bool
    ) -> None:
        self.synthesis, self.anchors, self.negatives = synthesis, anchors, negatives
        self.columns, self.mirrored = columns, mirrored
        boundaries = synthesis.boundaries
        first = boundaries.index(negatives.start)
        last = boundaries.index(negatives.stop)
        self.classes = slice(first, last)
        counts = synthesis.counts[first:last]
        self.uniform = counts[0] if len(set(counts)) == 1 else None
        self.local_class = synthesis.class_index[negatives] - first
        z = synthesis.z
        self.a = z[anchors]
        self.difference = z[negatives][None] - self.a[:, None]
        self.distance = torch.linalg.vector_norm(self.difference - DISTANCE_OFFSET, dim=-1)
        reach = synthesis.positive_distance[anchors][:, None]
        self.near = reach >= self.distance
        # A positive in its own column is at distance dp by definition, whatever the rounding of two norms says.
        self.near |= synthesis.positive[anchors][:, None] == _positions(negatives, z)[None]
        self.ratio = torch.where(self.near, torch.ones_like(self.distance), reach / self.distance)
        self.weight = synthesis.weights[synthesis.rank[anchors]][:, negatives]
        self.slope = self.weight * synthesis.kappa * (1 - self.ratio)

    def view(self, tile_values: Tensor) -> Tensor:
        """This side's part of a tile (R, S, ...), as (A, B, ...)."""
        part = tile_values[:, self.columns]
        return part.transpose(0, 1) if self.mirrored else part

    def pull(self, gate: Tensor) -> Tensor:
        """``w t`` of every (anchor, negative, channel), (A, B, D), from the gates as :meth:`view` gives them."""
        return (gate * self.slope[..., None]).add_((self.weight * self.ratio)[..., None])

    def synthesize(self, pull: Tensor) -> Tensor:
        """Synthetic negatives (A, m, D)."""
        return self.class_sums(pull * self.difference) + self.a[:, None]

    def class_sums(self, values: Tensor) -> Tensor:
        """Sum (A, B, ...) over the samples of each class, (A, m, ...)."""
        if self.uniform is not None:
            return values.unflatten(1, (-1, self.uniform)).sum(2)
        out = values.new_zeros((values.shape[0], self.classes.stop - self.classes.start, *values.shape[2:]))
        return out.index_add_(1, self.local_class, values)

    def expand_classes(self, values: Tensor) -> Tensor:
        """Repeat (A, m, ...) for every sample of each class, (A, B, ...)."""
        return values.index_select(1, self.local_class)

    @property
    def valid(self) -> Tensor:
        """(A, 1) bool: rows that are anchors."""
        return self.synthesis.is_anchor[self.anchors][:, None]

    @property
    def own(self) -> Tensor:
        """(A, m) bool: the anchor's own class."""
        first, last = self.classes.start, self.classes.stop
        index = torch.arange(first, last, device=self.a.device)
        return self.synthesis.class_index[self.anchors][:, None] == index

    def backward(self, grad_syn: Tensor, gate: Tensor, grads: EmbeddingGradients) -> None:
        """Add the gradients of anchors, negatives and distances, given that of the synthetic negatives (A, m, D)."""
        synthesis = self.synthesis
        spread = self.expand_classes(grad_syn)
        pull = self.pull(gate)
        grad_pull = spread * self.difference
        grad_difference = spread.mul_(pull)
        # t = rho + kappa (1 - rho) gate, and rho is a constant 1 where the negative is near.
        grad_ratio = self.weight * (grad_pull.sum(-1) - synthesis.kappa * (grad_pull * gate).sum(-1))
        grad_ratio = torch.where(self.near, torch.zeros_like(grad_ratio), grad_ratio / self.distance)
        grads.positive_distance[self.anchors] += grad_ratio.sum(1)
        grad_distance = -grad_ratio * self.ratio / self.distance
        grad_difference += (self.difference - DISTANCE_OFFSET) * grad_distance[..., None]
        grads.z[self.anchors] += grad_syn.sum(1) - grad_difference.sum(1)
        grads.z[self.negatives] += grad_difference.sum(0)


class EmbeddingGradients:
    """Gradients with respect to the embeddings, accumulated over sides in order."""

    def __init__(self, synthesis: Synthesis) -> None:
        self.synthesis = synthesis
        self.z = torch.zeros_like(synthesis.z)
        self.positive_distance = torch.zeros_like(synthesis.positive_distance)

    def finish(self) -> Tensor:
        """Add what came through the distances to the positives; (N, D)."""
        synthesis = self.synthesis
        distance = synthesis.positive_distance
        scale = torch.where(distance > 0, self.positive_distance / distance, torch.zeros_like(distance))[:, None]
        grad = (synthesis.z - synthesis.z[synthesis.positive] + DISTANCE_OFFSET) * scale
        self.z += grad
        return self.z.index_add_(0, synthesis.positive, grad, alpha=-1)


def _positions(nodes: slice, like: Tensor) -> Tensor:
    return torch.arange(nodes.start, nodes.stop, device=like.device)


def check_mix(op: str, mix: Tensor, most: int) -> None:
    """Refuse mixing numbers that do not fit the largest class of the batch."""
    if mix.dim() != 2 or mix.shape[0] < most or mix.shape[1] < most - 1:
        raise ValueError(
            f"{op}: mix has shape {tuple(mix.shape)}; expected (K, K - 1) = ({most}, {most - 1}) for K = {most}, the "
            f"largest number of samples of a class in this batch; draw it with torch.rand({most}, {most - 1})"
        )


class _Dense:
    """The dense form: class-major geometry, gates gathered block by block from the caller's (N, N, D)."""

    def __init__(self, z: Tensor, labels: Tensor, gate: Tensor, kappa: Tensor, mix: Tensor, pairs: int) -> None:
        dtype = compute_dtype(z.dtype)
        layout = class_major(labels)
        self.order = layout.order.to(z.device)
        boundaries = class_boundaries(layout.class_start) if labels.shape[0] else [0]
        most = max((b - a for a, b in zip(boundaries, boundaries[1:], strict=False)), default=0)
        check_mix("synthesize_negatives", mix, most)
        self.synthesis = Synthesis(z.to(dtype)[self.order], boundaries, kappa, mix)
        self.gate, self.dtype, n = gate, dtype, z.shape[0]
        rows = max(1, pairs // max(n, 1))
        everyone = slice(0, n)
        self.blocks = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.side = lambda block: Side(self.synthesis, block, everyone, slice(None), mirrored=False)

    def gates(self, block: slice) -> Tensor:
        """Gates (A, N, D) of a block of class-major anchors against all class-major negatives."""
        return self.gate[self.order[block][:, None], self.order[None, :]].to(self.dtype)


def _synthesize_negatives(
    z: Tensor, labels: Tensor, gate: Tensor, kappa: Tensor, mix: Tensor, pairs_per_tile: int
) -> Tensor:
    dense = _Dense(z, labels, gate, kappa, mix, pairs_per_tile)
    out = z.new_empty((z.shape[0], dense.synthesis.num_classes, z.shape[1]))
    for block in dense.blocks:
        side = dense.side(block)
        syn = side.synthesize(side.pull(dense.gates(block)))
        out[dense.order[block]] = torch.where(side.valid[..., None], syn, torch.zeros_like(syn)).to(z.dtype)
    return out


def _synthesize_negatives_fake(z, labels, gate, kappa, mix, pairs_per_tile):
    # The number of classes of a batch is data.
    num_classes = torch.library.get_ctx().new_dynamic_size(min=0)
    return z.new_empty((z.shape[0], num_classes, z.shape[1]))


def _synthesize_negatives_backward(
    grad: Tensor,
    z: Tensor,
    labels: Tensor,
    gate: Tensor,
    kappa: Tensor,
    mix: Tensor,
    pairs_per_tile: int,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:
    dense = _Dense(z, labels, gate, kappa, mix, pairs_per_tile)
    grads = EmbeddingGradients(dense.synthesis)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_gate else gate.new_empty(0)
    for block in dense.blocks:
        side, gates = dense.side(block), dense.gates(block)
        wide = grad[dense.order[block]].to(dense.dtype)
        wide = torch.where(side.valid[..., None], wide, torch.zeros_like(wide))
        if need_gate:
            value = side.expand_classes(wide) * side.difference * side.slope[..., None]
            grad_gate[dense.order[block][:, None], dense.order[None, :]] = value.to(gate.dtype)
        side.backward(wide, gates, grads)
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    grad_z[dense.order] = grads.finish().to(z.dtype)
    return grad_z, grad_gate


def _synthesize_negatives_backward_fake(grad, z, labels, gate, kappa, mix, pairs_per_tile, need_gate):
    like = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_gate else gate.new_empty(0)
    return torch.empty_like(z, memory_format=torch.contiguous_format), like


_ARGUMENTS = "Tensor z, Tensor labels, Tensor gate, Tensor kappa, Tensor mix, int pairs_per_tile"
_forward = define_op(
    f"synthesize_negatives({_ARGUMENTS}) -> Tensor", _synthesize_negatives, _synthesize_negatives_fake
)
_backward = define_op(
    f"synthesize_negatives_backward(Tensor grad, {_ARGUMENTS}, bool need_gate) -> (Tensor, Tensor)",
    _synthesize_negatives_backward,
    _synthesize_negatives_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.pairs = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad: Tensor):
    grad_z, grad_gate = _backward(grad, *ctx.saved_tensors, ctx.pairs, ctx.needs_input_grad[2])
    needs = ctx.needs_input_grad
    return grad_z if needs[0] else None, None, grad_gate if needs[2] else None, None, None, None


define_gradient("synthesize_negatives", _gradient, _setup_context)
define_autocast("synthesize_negatives")


def synthesize_negatives(
    embeddings: Tensor,
    labels: Tensor,
    gate: Tensor,
    *,
    kappa: float | Tensor,
    mix: Tensor,
    layout: BatchLayout | None = None,
) -> Tensor:
    """Synthetic hard negatives of every sample and class from given channel gates, (15)-(18) of docs/maths.md.

    The dense drop-in form: the gates are the caller's. Inside the losses the same formulas run on tiles.

    Args:
        embeddings: (N, D) floating. labels: (N,) integers in any order, on the same device or on the CPU.
        gate: (N, N, D) weights in [0, 1], anchor first, same dtype as the embeddings.
        kappa: hardness of (16): 0 keeps a negative at the positive's distance, 1 leaves it to the gate.
        mix: (K, K - 1) numbers in [0, 1] of (18), K the largest number of samples of a class in the batch.
        layout: the batch's classes, known on the host: spares waiting for labels on a GPU.

    Returns:
        (N, M, D) in the embeddings' dtype: for each sample and each of the M classes, by first appearance, one
        synthetic negative; the own column as (17) gives it. Rows of samples that are alone in their class are 0.
        Differentiable in embeddings and gate; kappa and mix are constants.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, each with the argument's name.

    Memory: the result, and in the backward the gradient of the gate, O(tile) beside them.
    """
    op = "synthesize_negatives"
    check_float_matrix(op, "embeddings", embeddings)
    check_channels(op, "embeddings", embeddings)
    n, width = embeddings.shape
    check_labels(op, labels, n)
    check_float_matrix(op, "gate", gate, dims=3, shape="(N, N, D)")
    if tuple(gate.shape) != (n, n, width):
        raise ValueError(f"{op}: gate has shape {tuple(gate.shape)}; expected (N, N, D) = ({n}, {n}, {width})")
    check_same_dtype(op, embeddings=embeddings, gate=gate)
    check_same_device(op, embeddings=embeddings, gate=gate)
    labels = host_labels(op, labels, layout)
    kappa, mix = torch.as_tensor(kappa, dtype=torch.float64), torch.as_tensor(mix)
    if in_reference_mode():
        check_mix(op, mix, int(torch.unique(labels, return_counts=True)[1].max()) if n else 0)
        return reference.synthesize_negatives(embeddings, labels, gate, kappa=kappa, mix=mix)
    return _forward(embeddings, labels, gate, kappa, mix, DENSE_PAIRS)
