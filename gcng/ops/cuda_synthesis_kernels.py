"""The passes of the synthesis on CUDA tensors: launchers of csrc/cuda/synthesis*.cu behind the torch form's contract.

Owns the signatures of the launchers and the cut of a gradient into parts. Embeddings are float32, gates float32 or 16
bit; for others, and without a CUDA library for the device, another form runs. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

from gcng.ops import native
from gcng.ops.synthesis_tiles import (
    EmbeddingGradients,
    Geometry,
    Side,
    Synthesis,
    Synthetic,
    SyntheticGradients,
    TorchSynthesisKernels,
)

# As GateStorage of csrc/cuda/synthesis_chain.cuh numbers them.
_STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Threads that a gradient is cut into, about the residents of a large GPU: a constant, so that the order of a sum never
# depends on the machine. Every part costs one more row of partial sums.
GRADIENT_THREADS = 1 << 17
MAX_PARTS = 64
_CHANNELS = 4  # of a thread

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIDE = [_POINTER, _POINTER, *[_SIZE] * 6]  # z, class_start, and six numbers
_GATES = [_POINTER, ctypes.c_int, _SIZE, _SIZE]
# Launcher -> arguments before the stream.
_SIGNATURES = {
    "positive_distance": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER],
    "geometry": [_POINTER, *[_SIZE] * 6, *[_POINTER] * 11],
    "forward": [*_SIDE, *_GATES, *[_POINTER] * 5],
    "gate_gradient": [*_SIDE, *[_POINTER] * 6, _SIZE, _SIZE],
    "embedding_gradient": [*_SIDE, _SIZE, *_GATES, *[_POINTER] * 13, _SIZE, _POINTER, _SIZE],
}


class CudaSynthesisKernels(TorchSynthesisKernels):
    """The passes of :class:`TorchSynthesisKernels` by CUDA kernels; results repeat bit for bit.

    Args:
        otherwise: the form for tensors that the kernels do not take; plain torch by default.
        library: launchers for tensors on any device; None loads the built library on first use, for CUDA tensors.
    """

    def __init__(self, otherwise: TorchSynthesisKernels | None = None, *, library: ctypes.CDLL | None = None) -> None:
        self._otherwise, self._library = otherwise or TorchSynthesisKernels(), library

    def _takes(self, z: Tensor) -> bool:
        usable = z.is_cuda or self._library is not None
        return usable and z.dtype == torch.float32 and z.numel() > 0 and self._launchers(z) is not None

    def _launchers(self, z: Tensor) -> ctypes.CDLL | None:
        return native.cuda(z.device.index) if self._library is None else self._library

    def _launch(self, name: str, z: Tensor, *arguments: int | Tensor | None) -> None:
        """Call a launcher on the current stream of the device of ``z``; tensors are passed as pointers."""
        launcher = getattr(self._launchers(z), f"gcng_synthesis_{name}")
        launcher.argtypes = [*_SIGNATURES[name], _POINTER]
        words = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
            stream = torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else None
            error = launcher(z.data_ptr(), *words, stream)
        if error:
            raise RuntimeError(f"gcng: the synthesis kernel {name} was not launched on {z.device}: CUDA error {error}")

    def positive_distance(self, z: Tensor, positive: Tensor) -> Tensor:
        """Distance (15) of every node of ``z`` (N, D) to its positive, (N,), rounded as those of :meth:`geometry`."""
        if not self._takes(z):
            return self._otherwise.positive_distance(z, positive)
        out = z.new_empty(z.shape[0])
        self._launch("positive_distance", z, positive, *z.shape, out)
        return out

    def geometry(self, synthesis: Synthesis, anchors: slice, negatives: slice) -> Geometry:
        """Distances and the two numbers of each pair; see :class:`Geometry`."""
        z = synthesis.z
        if not self._takes(z):
            return self._otherwise.geometry(synthesis, anchors, negatives)
        shape = (anchors.stop - anchors.start, negatives.stop - negatives.start)
        out = Geometry(*(z.new_empty(shape, dtype=torch.bool if i == 1 else z.dtype) for i in range(6)))
        self._launch(
            "geometry", z, *z.shape, anchors.start, shape[0], negatives.start, shape[1], synthesis.positive_distance,
            synthesis.positive, synthesis.rank, synthesis.weights, synthesis.kappa, *out,
        )  # fmt: skip
        return out

    def synthesize(self, side: Side, gate: Tensor, *, need_values: bool) -> Synthetic:
        """See :meth:`Side.synthesize`; ``values`` is None where not needed."""
        z, geometry = side.synthesis.z, side.geometry
        if not self._takes(z):
            return self._otherwise.synthesize(side, gate, need_values=need_values)
        gate = _stored(gate)
        values = z.new_empty((*side.shape, z.shape[1])) if need_values else None
        out = Synthetic(values, z.new_empty(side.shape), z.new_empty(side.shape))
        self._launch("forward", z, *_numbers(side), *_gates(gate), geometry.offset, geometry.slope, *out)
        return out

    def add_gate_gradient(self, side: Side, synthetic: Synthetic, grads: SyntheticGradients, out: Tensor) -> None:
        """See :meth:`Side.add_gate_gradient`."""
        z = side.synthesis.z
        if not self._takes(z) or out.dtype != z.dtype or not _consecutive(out):
            self._otherwise.add_gate_gradient(side, synthetic, grads, out)
            return
        if grads.squares is not None and synthetic.values is None:
            raise ValueError("gcng: the gradient of the squares needs the values of the synthetic negatives")
        values = synthetic.values.contiguous() if grads.squares is not None else None
        upstream = _upstream(grads)
        self._launch(
            "gate_gradient", z, *_numbers(side), side.geometry.slope, values, *upstream, out, *out.stride()[:2]
        )

    def embedding_gradient(self, side: Side, gate: Tensor, grads: SyntheticGradients, out: EmbeddingGradients) -> None:
        """See :meth:`Side.backward`."""
        z, geometry = side.synthesis.z, side.geometry
        if not self._takes(z):
            self._otherwise.embedding_gradient(side, gate, grads, out)
            return
        gate = _stored(gate)
        width, (a, m), b = z.shape[1], side.shape, side.negatives.stop - side.negatives.start
        most = max(side.synthesis.counts[side.classes])
        classes_each, anchors_each = _part(m, a, width), _part(a, b, width)
        grad_reach, grad_difference = z.new_empty((a, b)), z.new_empty((a, b))
        grad_anchors = z.new_empty((-(-m // classes_each), a, width))
        grad_negatives = z.new_empty((-(-a // anchors_each), b, width))
        upstream = _upstream(grads)
        self._launch(
            "embedding_gradient", z, *_numbers(side), most, *_gates(gate), side.synthesis.kappa, *geometry, *upstream,
            grad_reach, grad_difference, grad_anchors, classes_each, grad_negatives, anchors_each,
        )  # fmt: skip
        out.z[side.anchors] += grad_anchors.sum(0)
        out.z[side.negatives] += grad_negatives.sum(0)
        out.positive_distance[side.anchors] += grad_reach.sum(1)


def _part(length: int, rows: int, width: int) -> int:
    """How many of ``length`` terms a thread adds up, where ``rows`` x ``width`` sums are wanted."""
    threads = rows * -(-width // _CHANNELS)
    parts = max(1, min(MAX_PARTS, length, -(-GRADIENT_THREADS // max(threads, 1))))
    return -(-length // parts) or 1


def _numbers(side: Side) -> tuple[Tensor | int, ...]:
    """What follows ``z`` in a launcher's arguments for a side."""
    synthesis, (a, m) = side.synthesis, side.shape
    starts = synthesis.starts[side.classes.start : side.classes.stop + 1]
    b = side.negatives.stop - side.negatives.start
    return starts, synthesis.z.shape[1], side.anchors.start, a, m, side.negatives.start, b


def _consecutive(x: Tensor) -> bool:
    return x.stride(2) == 1 or x.shape[2] == 1


def _stored(gate: Tensor) -> Tensor:
    """Gates (A, B, D) as the kernels read them: the view itself, as a rule."""
    gate = gate if gate.dtype in _STORAGE else gate.float()
    return gate if _consecutive(gate) else gate.contiguous()


def _gates(gate: Tensor) -> tuple[Tensor | int, ...]:
    return gate, _STORAGE[gate.dtype], gate.stride(0), gate.stride(1)


def _upstream(grads: SyntheticGradients) -> list[Tensor | None]:
    return [None if grad is None else grad.contiguous() for grad in grads]
