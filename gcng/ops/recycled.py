"""Packed storage on the CPU in memory that is used again.

The first write to every 4 KiB of fresh memory costs the system microseconds, and what is beyond 32 MiB comes fresh at
every request. The hidden stash of a training step is that large, and of the same size at every step: what a step gives
back is kept for the next one.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from gcng.ops.tiles import pair_count

FEWEST_BYTES = 2**25  # what is smaller glibc's heap keeps for the next request by itself
_ALIGNMENT = 64  # as torch aligns its own

_free: dict[int, list[np.ndarray]] = {}  # size in bytes -> buffers that no tensor uses


class _Lease(np.ndarray):
    """The array below a tensor; unlike its base it can be watched, and dies with the tensor's storage."""


def packed_storage(like: Tensor, n: int, width: int) -> Tensor:
    """Packed storage (P, ``width``) in the dtype and on the device of ``like``, contents undefined."""
    shape = pair_count(n), width
    size = shape[0] * shape[1] * like.element_size()
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64) or size < FEWEST_BYTES:
        return like.new_empty(shape)
    buffer = _take(size)
    start = -buffer.ctypes.data % _ALIGNMENT
    lease = buffer[start : start + size].view(_Lease)
    weakref.finalize(lease, _give_back, size, buffer)
    return torch.from_numpy(lease).view(like.dtype).view(shape)


# No lock: a garbage collection may call _give_back in the middle of either function, in the same thread. Each step is
# atomic, and the worst that two threads can do to each other is to let go of a buffer.
def _take(size: int) -> np.ndarray:
    try:
        return _free[size].pop()
    except (KeyError, IndexError):
        # Another size than before: the batch has changed, and what waits is of the old one.
        _free.clear()
        return np.empty(size + _ALIGNMENT, np.uint8)


def _give_back(size: int, buffer: np.ndarray) -> None:
    _free.setdefault(size, []).append(buffer)


def empty_cache() -> None:
    """Give the memory back to the system that waits for the next training step on the CPU.

    After a step, the stashes of its batch size stay with the process (docs/memory.md); a step on another size
    replaces them. Tensors in use are not touched.
    """
    _free.clear()
