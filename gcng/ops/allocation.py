"""Allocation failures: what they look like on each device, and the one more try that answers them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch

from gcng.ops import recycled
from gcng.ops.transfers import capturing

T = TypeVar("T")

# What raises a plain RuntimeError: torch's allocator and the C++ kernels on the CPU; on a GPU whose memory torch's
# cache holds, everything that allocates beside it: the driver, cuBLAS, a module that Triton loads, a launcher's number.
_SIGNS = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED|CUDA error 2\b",
    re.IGNORECASE,
)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error says that there was no memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


def tried_twice(
    run: Callable[[int], T],
    device: torch.device,
    clear: Callable[[], None] | None = None,
    *,
    size: str = "tiles as planned",
) -> T:
    """``run(1)``; an allocation failure is answered once, with ``run(2)``, which takes half as much at a time.

    In between ``clear()`` gives back what the caller keeps, and what waits to be used again goes to the device.

    Raises:
        torch.OutOfMemoryError, MemoryError or RuntimeError, as the second failure was; says what was tried, ``size``.
    """
    try:
        return run(1)
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
    # Behind the handler: the exception is gone, and with it the frames that held the tensors of the first attempt.
    if clear is not None:
        clear()
    if device.type == "cpu":
        recycled.empty_cache()
    elif device.type == "cuda" and not capturing(device):
        torch.cuda.empty_cache()
    try:
        return run(2)
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        kind = next(one for one in (torch.OutOfMemoryError, MemoryError, RuntimeError) if isinstance(error, one))
        raise kind(
            f"gcng: not enough memory on {device}, neither for {size} nor for half of that ({error}); use a smaller "
            "memory_budget, fewer samples or fewer channels, or free what else holds memory there"
        ) from error
