"""Which form of the tile passes runs on a tensor: compiled, Triton, or plain torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels

_TORCH = (TorchPairKernels(), TorchSynthesisKernels())


class _Forced(threading.local):
    kernels: tuple[TorchPairKernels, TorchSynthesisKernels] | None = None


_forced = _Forced()


@contextlib.contextmanager
def forced_kernels(pair: TorchPairKernels, synthesis: TorchSynthesisKernels) -> Iterator[None]:
    """Run with these passes in this thread, whatever the device: how tests and benchmarks compare the forms."""
    before = _forced.kernels
    _forced.kernels = pair, synthesis
    try:
        yield
    finally:
        _forced.kernels = before


def pair_kernels(like: Tensor) -> TorchPairKernels:
    """The passes of the pair pipeline for a tensor's device and dtype."""
    return _kernels(like)[0]


def operand_dtype(base: Tensor) -> torch.dtype:
    """What edges, stashes and the operands of products over pairs are stored in, for a field on ``base``."""
    return pair_kernels(base).operand_dtype(base.dtype)


def synthesis_kernels(like: Tensor) -> TorchSynthesisKernels:
    """The passes of the synthesis for a tensor's device and dtype."""
    return _kernels(like)[1]


def _kernels(like: Tensor) -> tuple[TorchPairKernels, TorchSynthesisKernels]:
    return _forced.kernels or _TORCH
