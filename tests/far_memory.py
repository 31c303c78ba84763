"""Tensors that reach beyond 2^31 elements in little memory: reserved, and committed page by page where it is written.

Owns :func:`reserved`, :func:`spread` and :class:`FarChannels`; for tests that a kernel counts offsets in 64 bits.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
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

MAP_NORESERVE = 0x4000  # Linux; the module mmap names it from Python 3.13 on
# Elements between neighbors. As a signed number of 32 bits it is negative, and rows stay on multiples of 16 bytes.
APART = 3 << 30
TOUCHED_BYTES = 200 << 20


def reserved(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros of this shape that take memory only where they are written, 4 KiB at a time."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def spread(values: Tensor, *strides: int) -> Tensor:
    """A copy of ``values`` whose elements are ``strides`` apart."""
    reach = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    return reserved(reach + 1, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """AssertionError where the block commits TOUCHED_BYTES or more, by the kernel's count of resident pages."""
    with contextlib.suppress(OSError):  # the peak starts again; where it cannot, less is seen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak_bytes()
    yield
    touched = _peak_bytes() - before
    assert touched < TOUCHED_BYTES, f"{touched / 2**20:.0f} MiB were touched"


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class FarChannels(TorchSynthesisKernels):
    """The passes of ``kernels`` on gates, and their gradients, whose anchors or negatives lie APART elements apart."""

    def __init__(self, kernels: TorchSynthesisKernels, *, far_anchors: bool) -> None:
        self._kernels, self._far_anchors = kernels, far_anchors

    def _far(self, x: Tensor) -> Tensor:
        near = -(-x.shape[2] // 8) * 8
        return spread(x, *((APART, near) if self._far_anchors else (near, APART)), 1)

    def positive_distance(self, z: Tensor, positive: Tensor) -> Tensor:
        return self._kernels.positive_distance(z, positive)

    def geometry(self, synthesis: Synthesis, anchors: slice, negatives: slice) -> Geometry:
        return self._kernels.geometry(synthesis, anchors, negatives)

    def synthesize(self, side: Side, gate: Tensor, *, need_values: bool) -> Synthetic:
        return self._kernels.synthesize(side, self._far(gate), need_values=need_values)

    def add_gate_gradient(self, side: Side, synthetic: Synthetic, grads: SyntheticGradients, out: Tensor) -> None:
        far = self._far(out)
        self._kernels.add_gate_gradient(side, synthetic, grads, far)
        out.copy_(far)

    def embedding_gradient(self, side: Side, gate: Tensor, grads: SyntheticGradients, out: EmbeddingGradients) -> None:
        self._kernels.embedding_gradient(side, self._far(gate), grads, out)
