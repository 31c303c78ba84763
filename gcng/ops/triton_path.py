"""Whether Triton kernels run on a tensor, and why not: what every op asks before its blocked torch path."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

OLDEST = (3, 6)
OLDEST_ARCHITECTURE = (8, 0)


class _Switch:
    # Of the process: autograd runs a backward on a GPU in a thread of its own.
    forced: bool | None = None


@contextlib.contextmanager
def _forced(value: bool) -> Iterator[None]:
    before, _Switch.forced = _Switch.forced, value
    try:
        yield
    finally:
        _Switch.forced = before


def triton_everywhere() -> contextlib.AbstractContextManager[None]:
    """Run the Triton kernels on any device, in all threads of this process: tests do, in Triton's interpreter."""
    return _forced(True)


def disabled() -> contextlib.AbstractContextManager[None]:
    """Run as if Triton were not installed, in all threads of this process: tests and benchmarks only."""
    return _forced(False)


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels compute an op on ``x``.

    On CUDA tensors of 16 or 32 bit; float64 is for checks and takes the blocked torch path. Where the kernels cannot
    run, one warning says why.
    """
    if _Switch.forced is not None:
        return _Switch.forced
    return x.is_cuda and x.dtype != torch.float64 and runs_on(x.device.index)


def runs_on(index: int, *, quiet: bool = False) -> bool:
    """Whether the Triton kernels run on a CUDA device; where not, the one warning too, unless ``quiet``."""
    if _Switch.forced is not None:
        return _Switch.forced
    cause = device_cause(index)
    if cause and not quiet:
        _warn(cause)
    return not cause


def device_cause(index: int) -> str:
    """Why the Triton kernels do not run on a CUDA device, in one line; empty if they do."""
    return triton_cause() or _capability_cause(index) or _start_cause()


@functools.cache
def triton_cause() -> str:
    """Why Triton cannot be used at all, in one line; empty if it can. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'triton>=3.6'"
    if importlib.util.find_spec("gcng.kernels") is None:
        return "gcng.kernels is not installed; install gcng with pip, an import path to the checkout is not enough"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""  # some builds carry no metadata
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old; 3.6 or later is needed"
    return ""


@functools.cache
def _capability_cause(index: int) -> str:
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST_ARCHITECTURE:
        return ""
    return f"device {index} has compute capability {found[0]}.{found[1]}; 8.0 or later is needed"


@functools.cache
def _start_cause() -> str:
    """Why Triton cannot start a kernel here, in one line; empty if it can.

    Triton compiles what starts its kernels with the C compiler of the machine, and looks for the driver's library.
    Images made for deployment may have neither compiler nor headers.
    """
    try:
        from triton.runtime import driver

        getattr(driver.active, "utils")  # noqa: B009 (not for its value: it is compiled when it is first asked for)
    except Exception as error:
        lines = str(error).strip().splitlines()
        words = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
        return f"triton cannot start kernels on this machine, which takes a C compiler and Python's headers ({words})"
    return ""


@functools.cache
def _warn(cause: str) -> None:
    warnings.warn(
        f"gcng: the Triton kernels are not used, the slower torch path runs: {cause}", RuntimeWarning, stacklevel=5
    )
