"""The passes of the synthesis as Triton kernels; triton is imported by the first pass that runs."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from torch import Tensor

from gcng.ops.synthesis_tiles import (
    EmbeddingGradients,
    Geometry,
    Side,
    Synthesis,
    Synthetic,
    SyntheticGradients,
    TorchSynthesisKernels,
)

if TYPE_CHECKING:
    from gcng.kernels.synthesis_geometry import Block


class TritonSynthesisKernels(TorchSynthesisKernels):
    """The contract of :class:`~gcng.ops.synthesis_tiles.TorchSynthesisKernels`, on a GPU or in the interpreter."""

    def positive_distance(self, z: Tensor, positive: Tensor) -> Tensor:
        """Distance (15) of every node of ``z`` (N, D) to its positive, (N,); rounded as those of :meth:`geometry`."""
        from gcng.kernels.synthesis_geometry import positive_distance

        return positive_distance(z, positive)

    def geometry(self, synthesis: Synthesis, anchors: slice, negatives: slice) -> Geometry:
        """Distances and the two numbers of each pair; see :class:`~gcng.ops.synthesis_tiles.Geometry`."""
        from gcng.kernels.synthesis_geometry import pair_geometry

        block = _block(synthesis, anchors, negatives)
        numbers = synthesis.positive_distance, synthesis.positive, synthesis.rank, synthesis.weights, synthesis.kappa
        return Geometry(*pair_geometry(block, *numbers))

    def synthesize(self, side: Side, gate: Tensor, *, need_values: bool) -> Synthetic:
        """See :meth:`~gcng.ops.synthesis_tiles.Side.synthesize`."""
        from gcng.kernels.synthesis import synthesize_forward

        return Synthetic(*synthesize_forward(_block_of(side), side.geometry, gate, need_values=need_values))

    def add_gate_gradient(self, side: Side, synthetic: Synthetic, grads: SyntheticGradients, out: Tensor) -> None:
        """See :meth:`~gcng.ops.synthesis_tiles.Side.add_gate_gradient`."""
        from gcng.kernels.synthesis import Upstream, add_gate_gradient

        add_gate_gradient(_block_of(side), side.geometry.slope, synthetic.values, Upstream(*grads), out)

    def embedding_gradient(self, side: Side, gate: Tensor, grads: SyntheticGradients, out: EmbeddingGradients) -> None:
        """See :meth:`~gcng.ops.synthesis_tiles.Side.backward`."""
        from gcng.kernels.synthesis import Upstream
        from gcng.kernels.synthesis_gradient import add_embedding_gradient

        kappa = side.synthesis.kappa
        upstream = Upstream(*grads)
        add_embedding_gradient(_block_of(side), side.geometry, kappa, gate, upstream, out.z, out.positive_distance)


def _block_of(side: Side) -> Block:
    return _block(side.synthesis, side.anchors, side.negatives)


def _block(synthesis: Synthesis, anchors: slice, negatives: slice) -> Block:
    from gcng.kernels.synthesis_geometry import Block

    first, last = (bisect.bisect_left(synthesis.boundaries, node) for node in (negatives.start, negatives.stop))
    most = max(synthesis.counts[first:last], default=0)
    return Block(synthesis.z, synthesis.starts, anchors, negatives, slice(first, last), most)
