"""Channel-weighted synthetic negatives (15)-(18) of a tile of pairs: geometry, values, and gradients.

The chain (18) is a convex combination, so a synthetic negative is ``a + Σ_g w_g (n_g - a) ⊙ t_g`` over the samples g of
its class, with ``t = ρ + κ (1 - ρ) gate``, ``ρ = dp / dn`` (1 where the negative is not farther than the positive).
Per pair that is two numbers, ``offset = w ρ`` and ``slope = w κ (1 - ρ)``: what a gate is multiplied by and added to.

Losses read a synthetic negative through its inner product with the anchor, its squared norm, and, for the classifier,
its values; gradients come back through the same three. :class:`TorchSynthesisKernels` is the plain torch form of the
passes, :func:`gcng.ops.dispatch.synthesis_kernels` picks by device.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gcng.ops.tiles import Tile
from gcng.ops.transfers import kept_on_device, sent

DISTANCE_OFFSET = 1e-6  # (15): added to every channel before the norm


class ClassTensors(NamedTuple):
    """The class structure of a class-major batch on a device; int64 (N,) unless noted."""

    starts: Tensor  # (M + 1,) class starts, then N
    class_index: Tensor
    rank: Tensor  # rank in the class
    positive: Tensor  # slot of the positive; a singleton points at itself
    is_anchor: Tensor  # bool: classes of at least two samples
    size_index: Tensor  # place of the class's size among the distinct sizes
    numbers: Tensor  # (M,) 0 .. M - 1
    sizes: tuple[int, ...]  # distinct sizes of classes, ascending


@kept_on_device
def class_tensors(boundaries: tuple[int, ...], device: torch.device) -> ClassTensors:
    """Index tensors of the classes that start at ``boundaries``, whose last entry is N."""
    starts = torch.tensor(boundaries, dtype=torch.int64)
    count = starts.diff()
    class_index = torch.repeat_interleave(count)
    first = starts[:-1][class_index]
    rank = torch.arange(boundaries[-1]) - first
    counts = [stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)]
    sizes = sorted(set(counts))
    size_of_class = torch.tensor([sizes.index(c) for c in counts], dtype=torch.int64)
    positive = first + (rank + 1) % count[class_index].clamp(min=1)
    is_anchor, numbers = (count > 1)[class_index].long(), torch.arange(len(counts))
    made = (starts, class_index, rank, positive, is_anchor, size_of_class[class_index], numbers)
    moved = ClassTensors(*sent(torch.cat(made), device).split([x.shape[0] for x in made]), tuple(sizes))
    return moved._replace(is_anchor=moved.is_anchor.bool())


def chain_weights(mix: Tensor, classes: ClassTensors) -> Tensor:
    """Weight of every node in the chain (18) of its class, for every anchor rank: (K, N).

    ``(1 - lam_g) Π_{t > g} lam_t`` with ``lam_0 = 0``, over the K_j samples of class j.
    """
    ranks = max(classes.sizes, default=1)
    table = mix.new_zeros((max(len(classes.sizes), 1), ranks, ranks))  # (sizes, anchor rank, rank)
    for index, size in enumerate(classes.sizes):
        table[index, :, :size] = _weights_of_size(mix[:ranks], size)
    return table[classes.size_index, :, classes.rank].T.contiguous()


def _weights_of_size(mix: Tensor, size: int) -> Tensor:
    lam = mix[:, : size - 1]
    edge = mix.new_zeros((mix.shape[0], 1))
    kept = torch.cat([edge, lam], 1)
    tail = torch.cat([lam, edge + 1], 1).flip(1).cumprod(1).flip(1)
    return (1 - kept) * tail


class Geometry(NamedTuple):
    """What a synthetic negative takes of each of A anchors and B negatives, (A, B)."""

    distance: Tensor  # dn of (15)
    near: Tensor  # bool: the negative is not farther than the positive, and is taken as it is
    ratio: Tensor  # ρ = dp / dn, 1 where near
    weight: Tensor  # w of (18)
    offset: Tensor  # w ρ
    slope: Tensor  # w κ (1 - ρ)


class Synthetic(NamedTuple):
    """Synthetic negatives of A anchors and m classes, and what the losses read of them; None where not asked for."""

    values: Tensor | None  # (A, m, D)
    dots: Tensor | None  # (A, m) inner products with the anchor
    squares: Tensor | None  # (A, m) squared norms


class SyntheticGradients(NamedTuple):
    """Gradients with respect to the fields of :class:`Synthetic`; None counts as 0."""

    values: Tensor | None  # (A, m, D)
    dots: Tensor | None  # (A, m)
    squares: Tensor | None  # (A, m)


class Synthesis:
    """Geometry of the anchors and negatives of a class-major batch; everything that does not depend on the gates.

    Args:
        z: (N, D) embeddings. boundaries: class starts and N. kappa: 0-dim. mix: (K, K - 1). kernels: the passes.
    """

    def __init__(
        self,
        z: Tensor,
        boundaries: Sequence[int],
        kappa: Tensor,
        mix: Tensor,
        kernels: TorchSynthesisKernels,
    ) -> None:
        self.z, self.boundaries, self.kernels = z, list(boundaries), kernels
        # A number of the host reaches a GPU as an argument of a call, not by a copy.
        self.kappa = kappa.to(z) if kappa.device == z.device else z.new_full((), kappa.item())
        counts = [stop - start for start, stop in zip(self.boundaries, self.boundaries[1:], strict=False)]
        self.counts, self.num_classes = counts, len(counts)
        self.num_anchors = sum(count for count in counts if count > 1)
        classes = class_tensors(tuple(self.boundaries), z.device)
        self.starts, self.class_index, self.rank, self.positive, self.is_anchor, *_ = classes
        self.class_numbers = classes.numbers
        self.weights = chain_weights(sent(mix, z.device, z.dtype), classes)  # (K, N)
        self.positive_distance = kernels.positive_distance(z, self.positive)
        # `torch.where` fills a tensor with the number it is given, on a GPU one more kernel each time.
        self.zero, self.lowest = z.new_zeros(()), z.new_full((), -math.inf)

    @property
    def has_negatives(self) -> bool:
        """Whether any anchor has a negative: at least two classes, one of them with two samples."""
        return self.num_classes > 1 and self.num_anchors > 0

    @functools.cached_property
    def others(self) -> Tensor:
        """(N, M) bool: rows that are anchors, against the classes that are not their own."""
        return self.is_anchor[:, None] & (self.class_index[:, None] != self.class_numbers)

    @property
    def cuts(self) -> list[int] | None:
        """Where tiles may be cut; anywhere, if nothing is synthesized."""
        return self.boundaries if self.has_negatives else None

    def sides(self, tile: Tile) -> list[Side]:
        """The anchor sides of a tile: its rows against its columns, its mirrored columns against its rows."""
        if not self.has_negatives:
            return []
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
        first, last = (bisect.bisect_left(boundaries, node) for node in (negatives.start, negatives.stop))
        self.classes = slice(first, last)
        counts = synthesis.counts[first:last]
        self.uniform = counts[0] if len(set(counts)) == 1 else None
        self.a = synthesis.z[anchors]
        self.geometry = synthesis.kernels.geometry(synthesis, anchors, negatives)

    @property
    def shape(self) -> tuple[int, int]:
        """(A, m): anchors and classes."""
        return self.anchors.stop - self.anchors.start, self.classes.stop - self.classes.start

    def view(self, tile_values: Tensor) -> Tensor:
        """This side's part of a tile (R, S, ...), as (A, B, ...)."""
        part = tile_values[:, self.columns]
        return part.transpose(0, 1) if self.mirrored else part

    @property
    def boundaries(self) -> list[int]:
        """Starts of the classes, and the end of the last one."""
        return self.synthesis.boundaries[self.classes.start : self.classes.stop + 1]

    @property
    def local_class(self) -> Tensor:
        """(B,) place of each negative's class among the classes."""
        return self.synthesis.class_index[self.negatives] - self.classes.start

    @property
    def valid(self) -> Tensor:
        """(A, 1) bool: rows that are anchors."""
        return self.synthesis.is_anchor[self.anchors][:, None]

    @property
    def others(self) -> Tensor:
        """(A, m) bool: rows that are anchors, against the classes that are not their own."""
        return self.synthesis.others[self.anchors, self.classes]

    def synthesize(self, gate: Tensor, *, need_values: bool = True) -> Synthetic:
        """Synthetic negatives from the gates (A, B, D), as :meth:`view` gives them."""
        return self.synthesis.kernels.synthesize(self, gate, need_values=need_values)

    def add_gate_gradient(self, synthetic: Synthetic, grads: SyntheticGradients, out: Tensor) -> None:
        """Add the gradient of the gates to ``out`` (A, B, D), a view of a tile."""
        self.synthesis.kernels.add_gate_gradient(self, synthetic, grads, out)

    def backward(self, gate: Tensor, grads: SyntheticGradients, out: EmbeddingGradients) -> None:
        """Add the gradients of anchors, negatives and distances, the gates held constant."""
        self.synthesis.kernels.embedding_gradient(self, gate, grads, out)


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


class AllPairs(Protocol):
    """Passes that read and write (N, N, D) gates and (N, M, D) synthetic negatives where the caller has them.

    Sides are blocks of anchors against all negatives. A pass writes the rows of its anchors, once and in full: 0 for
    samples that are alone in their class, whose upstream gradient is not read either.
    """

    def synthesize(self, side: Side, out: Tensor) -> None:
        """Write the synthetic negatives of the side into ``out`` (N, M, D)."""

    def write_gate_gradient(self, side: Side, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of the side's gates into ``out`` (N, N, D); ``grad`` (N, M, D) contiguous."""

    def backward(self, side: Side, grad: Tensor, out: EmbeddingGradients) -> None:
        """Add the gradients of anchors, negatives and distances, the gates held constant."""

    def expect_writes(self, out: Tensor) -> None:
        """Told of a large tensor before the first write to it."""


class TorchSynthesisKernels:
    """The passes of the synthesis in plain torch, on any device; the others equal it up to rounding."""

    def positive_distance(self, z: Tensor, positive: Tensor) -> Tensor:
        """Distance (15) of every node of ``z`` (N, D) to its positive, (N,), rounded as those of :meth:`geometry`.

        A negative equal to the positive is near, so both distances have to come from the same order of summation.
        """
        return _norms(z - z[positive] + DISTANCE_OFFSET)

    def geometry(self, synthesis: Synthesis, anchors: slice, negatives: slice) -> Geometry:
        """Distances and the two numbers of each pair; see :class:`Geometry`."""
        difference = _differences(synthesis, anchors, negatives)
        return self.geometry_of(synthesis, anchors, negatives, _norms(difference - DISTANCE_OFFSET))

    def geometry_of(self, synthesis: Synthesis, anchors: slice, negatives: slice, distance: Tensor) -> Geometry:
        """The geometry from the distances (A, B)."""
        reach = synthesis.positive_distance[anchors][:, None]
        near = reach >= distance
        # A positive in its own column is at distance dp by definition, whatever the rounding of two norms says.
        position = torch.arange(negatives.start, negatives.stop, device=distance.device)
        near |= synthesis.positive[anchors][:, None] == position[None]
        ratio = torch.where(near, torch.ones_like(distance), reach / distance)
        weight = synthesis.weights[synthesis.rank[anchors]][:, negatives]
        # 1 - ρ from the difference, which is exact where the distances nearly tie; from a rounded ρ it is not.
        rest = torch.where(near, synthesis.zero, (distance - reach) / distance)
        return Geometry(distance, near, ratio, weight, weight * ratio, weight * synthesis.kappa * rest)

    def synthesize(self, side: Side, gate: Tensor, *, need_values: bool) -> Synthetic:
        """See :meth:`Side.synthesize`."""
        pull = _pull(side, gate).mul_(_side_differences(side))
        values = _class_sums(side, pull).add_(side.a[:, None])
        dots = torch.matmul(values, side.a[:, :, None])[..., 0]
        return Synthetic(values, dots, _norms(values).square_())

    def of_all_pairs(self, synthesis: Synthesis, order: Tensor, gate: Tensor) -> AllPairs | None:
        """Passes in the caller's order: ``gate`` (N, N, D), ``order`` (N,) the caller's row of a class-major slot.

        None where the form has none: gates are then gathered block by block.
        """
        return None

    def add_gate_gradient(
        self, side: Side, synthetic: Synthetic, grads: SyntheticGradients, out: Tensor
    ) -> None:
        """See :meth:`Side.add_gate_gradient`."""
        spread = _expand_classes(side, _grad_values(side, synthetic, grads))
        out += spread.mul_(_side_differences(side)).mul_(side.geometry.slope[..., None])

    def embedding_gradient(
        self, side: Side, gate: Tensor, grads: SyntheticGradients, out: EmbeddingGradients
    ) -> None:
        """See :meth:`Side.backward`."""
        synthesis, geometry = side.synthesis, side.geometry
        difference = _side_differences(side)
        synthetic = self.synthesize(side, gate, need_values=True)
        grad_syn = _grad_values(side, synthetic, grads)
        if grads.dots is not None:
            out.z[side.anchors] += torch.bmm(grads.dots[:, None, :], synthetic.values)[:, 0]
        spread = _expand_classes(side, grad_syn)
        grad_pull = spread * difference
        grad_difference = spread.mul_(_pull(side, gate))
        # t = rho + kappa (1 - rho) gate, and rho is a constant 1 where the negative is near.
        grad_ratio = geometry.weight * (grad_pull.sum(-1) - synthesis.kappa * (grad_pull * gate).sum(-1))
        grad_ratio = torch.where(geometry.near, torch.zeros_like(grad_ratio), grad_ratio / geometry.distance)
        out.positive_distance[side.anchors] += grad_ratio.sum(1)
        grad_distance = -grad_ratio * geometry.ratio / geometry.distance
        grad_distance = torch.where(geometry.near, torch.zeros_like(grad_distance), grad_distance)
        grad_difference += (difference - DISTANCE_OFFSET) * grad_distance[..., None]
        out.z[side.anchors] += grad_syn.sum(1) - grad_difference.sum(1)
        out.z[side.negatives] += grad_difference.sum(0)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _differences(synthesis: Synthesis, anchors: slice, negatives: slice) -> Tensor:
    """Negative minus anchor, (A, B, D)."""
    return synthesis.z[negatives][None] - synthesis.z[anchors][:, None]


def _side_differences(side: Side) -> Tensor:
    return _differences(side.synthesis, side.anchors, side.negatives)


def _pull(side: Side, gate: Tensor) -> Tensor:
    """``w t`` of every (anchor, negative, channel), (A, B, D)."""
    return (gate * side.geometry.slope[..., None]).add_(side.geometry.offset[..., None])


def _class_sums(side: Side, values: Tensor) -> Tensor:
    """Sum (A, B, D) over the samples of each class, (A, m, D)."""
    if side.uniform is not None:
        return values.unflatten(1, (-1, side.uniform)).sum(2)
    if values.is_cuda:  # where an index_add_ adds in any order
        return sums_between(values, [start - side.negatives.start for start in side.boundaries])
    out = values.new_zeros((*side.shape, values.shape[2]))
    return out.index_add_(1, side.local_class, values)


def sums_between(values: Tensor, starts: Sequence[int]) -> Tensor:
    """Sum (A, B, D) over the runs of its second dimension that start at ``starts``, whose last entry is B."""
    return torch.stack([values[:, a:b].sum(1) for a, b in itertools.pairwise(starts)], 1)


def _expand_classes(side: Side, values: Tensor) -> Tensor:
    """Repeat (A, m, D) for every sample of each class, (A, B, D)."""
    return values.index_select(1, side.local_class)


def _grad_values(side: Side, synthetic: Synthetic, grads: SyntheticGradients) -> Tensor:
    """The whole gradient of the synthetic negatives, (A, m, D)."""
    out = grads.values
    if grads.squares is not None:
        part = (2 * grads.squares)[..., None] * synthetic.values
        out = part if out is None else part.add_(out)
    if grads.dots is not None:
        part = grads.dots[..., None] * side.a[:, None]
        out = part if out is None else part.add_(out)
    return out
