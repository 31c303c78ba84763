"""Which form of the tile passes runs on a tensor: compiled, Triton, or plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcng.ops import native
from gcng.ops.cuda_synthesis_kernels import CudaSynthesisKernels
from gcng.ops.native_pair_kernels import NativePairKernels
from gcng.ops.native_synthesis_kernels import NativeSynthesisKernels
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from gcng.ops.triton_pair_kernels import TritonPairKernels
from gcng.ops.triton_path import runs_on, runs_triton
from gcng.ops.triton_synthesis_kernels import TritonSynthesisKernels


class Kernels(NamedTuple):
    """The passes of the pair pipeline and of the synthesis."""

    pair: TorchPairKernels
    synthesis: TorchSynthesisKernels


TORCH = Kernels(TorchPairKernels(), TorchSynthesisKernels())
NATIVE = Kernels(NativePairKernels(), NativeSynthesisKernels())
TRITON = Kernels(TritonPairKernels(), TritonSynthesisKernels())
CUDA_SYNTHESIS = CudaSynthesisKernels()


class _Switch:
    # Of the process: autograd runs a backward on a GPU in a thread of its own.
    forced: Kernels | None = None


@contextlib.contextmanager
def forced_kernels(pair: TorchPairKernels, synthesis: TorchSynthesisKernels) -> Iterator[None]:
    """Run with these passes, whatever the device, in all threads of this process: tests and benchmarks only."""
    before, _Switch.forced = _Switch.forced, Kernels(pair, synthesis)
    try:
        yield
    finally:
        _Switch.forced = before


def pair_kernels(like: Tensor) -> TorchPairKernels:
    """The passes of the pair pipeline for a tensor's device and dtype."""
    return _kernels(like).pair


def operand_dtype(base: Tensor) -> torch.dtype:
    """What edges, stashes and the operands of products over pairs are stored in, for a field on ``base``."""
    return pair_kernels(base).operand_dtype(base.dtype)


def synthesis_kernels(like: Tensor) -> TorchSynthesisKernels:
    """The passes of the synthesis for a tensor's device and dtype."""
    if _Switch.forced is None and like.is_cuda and like.dtype != torch.float64:
        return cuda_synthesis(like.device.index)
    return _kernels(like).synthesis


def cuda_synthesis(index: int, *, quiet: bool = False) -> TorchSynthesisKernels:
    """The passes of the synthesis for float32 on a CUDA device: CUDA C++, else Triton, else plain torch.

    Of cached answers, so that nothing is asked of the device while a graph is captured.

    Args:
        index: the device. quiet: warn of nothing.
    """
    if native.cuda(index, quiet=quiet) is not None:
        return CUDA_SYNTHESIS
    return (TRITON if runs_on(index, quiet=quiet) else TORCH).synthesis


def _kernels(like: Tensor) -> Kernels:
    if _Switch.forced is not None:
        return _Switch.forced
    if like.device.type == "cpu":
        return NATIVE if native.cpu() is not None else TORCH
    return TRITON if runs_triton(like) else TORCH
