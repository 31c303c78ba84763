"""The passes of the synthesis, compiled for the CPU: csrc/cpu/synthesis.cpp behind the contract of the torch form.

Takes gates and gradients of gates as views of a tile, transposed or not, or of all pairs in the caller's order, and
holds no tensor of all pairs and channels.
Where the extension or the dtype is missing, the torch form runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcng.ops import native
from gcng.ops.synthesis_tiles import (
    AllPairs,
    EmbeddingGradients,
    Geometry,
    Side,
    Synthesis,
    Synthetic,
    SyntheticGradients,
    TorchSynthesisKernels,
)

_SIDE = "Tensor z, Tensor class_start, int first_anchor"
_ORDER = "Tensor? order, Tensor? is_anchor"
_GRADS = "Tensor? grad_values, Tensor? grad_dots, Tensor? grad_squares"
native.define("synthesis_positive_distance(Tensor z, Tensor positive, Tensor(a!) out) -> ()")
native.define(
    "synthesis_geometry(Tensor z, int first_anchor, int first_negative, Tensor reach, Tensor positive, Tensor rank, "
    "Tensor weights, Tensor kappa, Tensor(a!) distance, Tensor(b!) near, Tensor(c!) ratio, Tensor(d!) weight, "
    "Tensor(e!) offset, Tensor(f!) slope) -> ()"
)
native.define(
    f"synthesis_forward({_SIDE}, Tensor gate, Tensor offset, Tensor slope, {_ORDER}, Tensor(a!)? values, "
    "Tensor(b!)? dots, Tensor(c!)? squares) -> ()"
)
native.define(
    f"synthesis_gate_gradient({_SIDE}, Tensor slope, Tensor? values, {_GRADS}, {_ORDER}, bool overwrite, "
    "Tensor(a!) out) -> ()"
)
native.define(
    f"synthesis_embedding_gradient({_SIDE}, Tensor gate, Tensor kappa, Tensor distance, Tensor near, Tensor ratio, "
    f"Tensor weight, Tensor offset, Tensor slope, {_GRADS}, {_ORDER}, Tensor(a!) grad_z, Tensor(b!) grad_reach) -> ()"
)
native.define("prefer_huge_pages(Tensor(a!) x) -> ()")

_AS_THE_SIDE = None, None  # no order of the caller: gates and synthetic negatives are those of the side


class NativeSynthesisKernels(TorchSynthesisKernels):
    """The passes of :class:`TorchSynthesisKernels`, each one call; equal up to rounding, on any number of threads."""

    def positive_distance(self, z: Tensor, positive: Tensor) -> Tensor:
        """Distance (15) of every node of ``z`` (N, D) to its positive, (N,), rounded as those of :meth:`geometry`."""
        if (kernels := _kernels(z)) is None:
            return super().positive_distance(z, positive)
        out = z.new_empty(z.shape[0])
        kernels.synthesis_positive_distance(z, positive, out)
        return out

    def geometry(self, synthesis: Synthesis, anchors: slice, negatives: slice) -> Geometry:
        """Distances and the two numbers of each pair; see :class:`Geometry`."""
        if (kernels := _kernels(synthesis.z)) is None:
            return super().geometry(synthesis, anchors, negatives)
        z, shape = synthesis.z, (anchors.stop - anchors.start, negatives.stop - negatives.start)
        out = Geometry(*(z.new_empty(shape, dtype=torch.bool if i == 1 else z.dtype) for i in range(6)))
        kernels.synthesis_geometry(
            z, anchors.start, negatives.start, synthesis.positive_distance, synthesis.positive, synthesis.rank,
            synthesis.weights, synthesis.kappa, *out,
        )  # fmt: skip
        return out

    def synthesize(self, side: Side, gate: Tensor, *, need_values: bool) -> Synthetic:
        """See :meth:`Side.synthesize`; ``values`` is None where not needed."""
        if (kernels := _kernels(side.a)) is None:
            return super().synthesize(side, gate, need_values=need_values)
        z, geometry = side.synthesis.z, side.geometry
        values = z.new_empty((*side.shape, z.shape[1])) if need_values else None
        out = Synthetic(values, z.new_empty(side.shape), z.new_empty(side.shape))
        kernels.synthesis_forward(
            *_side(side), _channels(gate, z), geometry.offset, geometry.slope, *_AS_THE_SIDE, *out
        )
        return out

    def add_gate_gradient(self, side: Side, synthetic: Synthetic, grads: SyntheticGradients, out: Tensor) -> None:
        """See :meth:`Side.add_gate_gradient`."""
        kernels = _kernels(side.a)
        if kernels is None or not _consecutive(out) or out.dtype != side.a.dtype:
            super().add_gate_gradient(side, synthetic, grads, out)
            return
        values = None if synthetic.values is None else synthetic.values.contiguous()
        kernels.synthesis_gate_gradient(
            *_side(side), side.geometry.slope, values, *_upstream(grads), *_AS_THE_SIDE, False, out
        )

    def embedding_gradient(self, side: Side, gate: Tensor, grads: SyntheticGradients, out: EmbeddingGradients) -> None:
        """See :meth:`Side.backward`."""
        if (kernels := _kernels(side.a)) is None:
            super().embedding_gradient(side, gate, grads, out)
            return
        synthesis = side.synthesis
        kernels.synthesis_embedding_gradient(
            *_side(side), _channels(gate, synthesis.z), synthesis.kappa, *side.geometry, *_upstream(grads),
            *_AS_THE_SIDE, out.z, out.positive_distance,
        )  # fmt: skip

    def of_all_pairs(self, synthesis: Synthesis, order: Tensor, gate: Tensor) -> AllPairs | None:
        """See :meth:`TorchSynthesisKernels.of_all_pairs`."""
        kernels, z = _kernels(synthesis.z), synthesis.z
        if kernels is None or gate.dtype != z.dtype or not _consecutive(gate):
            return None
        return _NativeAllPairs(kernels, synthesis, order, gate)


class _NativeAllPairs(AllPairs):
    """Moves no channel of a pair but from the caller's gates into the passes, and from them into the results."""

    def __init__(self, kernels: Any, synthesis: Synthesis, order: Tensor, gate: Tensor) -> None:
        self._kernels, self._gate, self._order = kernels, gate, (order, synthesis.is_anchor)

    def synthesize(self, side: Side, out: Tensor) -> None:
        geometry = side.geometry
        self._kernels.synthesis_forward(
            *_side(side), self._gate, geometry.offset, geometry.slope, *self._order, out, None, None
        )

    def write_gate_gradient(self, side: Side, grad: Tensor, out: Tensor) -> None:
        slope = side.geometry.slope
        self._kernels.synthesis_gate_gradient(*_side(side), slope, None, grad, None, None, *self._order, True, out)

    def backward(self, side: Side, grad: Tensor, out: EmbeddingGradients) -> None:
        self._kernels.synthesis_embedding_gradient(
            *_side(side), self._gate, side.synthesis.kappa, *side.geometry, grad, None, None, *self._order, out.z,
            out.positive_distance,
        )  # fmt: skip

    def expect_writes(self, out: Tensor) -> None:
        self._kernels.prefer_huge_pages(out)


def _kernels(z: Tensor) -> Any | None:
    """The extension, where it has kernels for tensors like ``z``."""
    usable = z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64) and z.numel() > 0
    return native.cpu() if usable else None


def _side(side: Side) -> tuple[Tensor, Tensor, int]:
    synthesis = side.synthesis
    return synthesis.z, synthesis.starts[side.classes.start : side.classes.stop + 1], side.anchors.start


def _consecutive(x: Tensor) -> bool:
    return x.stride(2) == 1 or x.shape[2] == 1


def _channels(gate: Tensor, z: Tensor) -> Tensor:
    """Gates (A, B, D) in the dtype of the embeddings with consecutive channels: the view itself, as a rule."""
    gate = gate.to(z.dtype)
    return gate if gate.stride(2) == 1 else gate.contiguous()


def _upstream(grads: SyntheticGradients) -> list[Tensor | None]:
    return [None if grad is None else grad.contiguous() for grad in grads]
