"""Loads the compiled kernels on first use: which library, which instruction set, and why none.

Owns the namespace ``gcng_cpu``, whose schemas are declared in Python by the op that calls them, and the one warning
that a missing or unusable library gives. An op asks :func:`cpu` and takes its blocked torch path where that is None.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcng import libraries

NAMESPACE = torch.library.Library("gcng_cpu", "FRAGMENT")

# Flags of /proc/cpuinfo behind what x86-64-v3 and x86-64-v4 promise to the compiler.
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
# The process that imports gcng; a child of fork must not wait for its threads.
_HOME_PROCESS = os.getpid()
_declared: list[str] = []


@dataclass(frozen=True)
class Status:
    """What is in use of the CPU kernels, or of the CUDA kernels.

    Attributes:
        path: library that is loaded; None where none is.
        flags: what it was compiled for. cause: why none is loaded, one line; empty if one is.
    """

    path: Path | None
    flags: str = ""
    cause: str = ""


class _Switch:
    enabled = True


def define(schema: str) -> None:
    """Declare an op of the CPU kernels, e.g. ``class_layout(Tensor labels, Tensor(a!) order) -> ()``."""
    _declared.append(NAMESPACE.define(schema))


def declared() -> list[str]:
    """Names of the CPU kernels that the ops imported so far call."""
    return sorted(_declared)


def cpu() -> Any | None:
    """The namespace ``torch.ops.gcng_cpu``, or None: then the blocked torch path runs, after one warning."""
    return _cpu_or_warning() if _Switch.enabled else None


def cuda() -> ctypes.CDLL | None:
    """The launchers of CUDA kernels (raw pointers and a stream in, an error code out), or None.

    Without a warning: it is the ops' decision whether another path is a loss.
    """
    return _load_cuda()[0] if _Switch.enabled else None


def cpu_status() -> Status:
    """What :func:`cpu` finds. Loads the library, warns of nothing."""
    return _load_cpu()


def cuda_status() -> Status:
    """What :func:`cuda` finds. Loads the library, which initializes no device."""
    return _load_cuda()[1]


@contextmanager
def disabled() -> Iterator[None]:
    """Run as if nothing was built, in all threads of this process: how tests reach the blocked torch path."""
    before, _Switch.enabled = _Switch.enabled, False
    try:
        yield
    finally:
        _Switch.enabled = before


def runnable_libraries() -> list[str]:
    """CPU libraries this machine can run, best first; none above what torch uses itself (ATEN_CPU_CAPABILITY)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    has = next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())
    allowed = torch.backends.cpu.get_cpu_capability()
    names = list(libraries.cpu_libraries())
    if not (has >= _V3 and allowed.startswith(("AVX2", "AVX512"))):
        return names[-1:]
    return names if has >= _V4 and allowed.startswith("AVX512") else names[-2:]


@functools.cache
def _cpu_or_warning() -> Any | None:
    cause = _load_cpu().cause
    if not cause:
        return torch.ops.gcng_cpu
    message = f"gcng: the compiled CPU kernels are not used, the slower torch path runs: {cause}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    return None


@functools.cache
def _load_cpu() -> Status:
    status = _find(runnable_libraries(), command="gcng build")
    if status.path is None:
        return status
    try:
        torch.ops.load_library(str(status.path))
        ctypes.CDLL(str(status.path)).gcng_set_home_process(ctypes.c_int64(_HOME_PROCESS))
    except (OSError, RuntimeError, AttributeError) as error:
        return Status(None, cause=f"{status.path} does not load ({error}); build it again: gcng build")
    return status


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL | None, Status]:
    status = _find([libraries.CUDA_LIBRARY], command="gcng build --cuda")
    if status.path is None:
        return None, status
    try:
        return ctypes.CDLL(str(status.path)), status
    except OSError as error:
        cause = f"{status.path} does not load ({error}); build it again: gcng build --cuda"
        return None, Status(None, cause=cause)


def _find(names: Sequence[str], *, command: str) -> Status:
    """The first library that is whole and was built from the sources of this installation."""
    cause = ""
    folder = libraries.source_folder()
    wanted = libraries.source_hash(folder, cuda=names[0] == libraries.CUDA_LIBRARY) if folder else None
    places = (libraries.package_folder(), libraries.user_folder())
    for path in (place / name for name in names for place in places):
        if not path.is_file():
            continue
        try:
            info = libraries.read_build_info(path)
        except (OSError, libraries.LibraryError) as error:
            cause = cause or f"{error}; build it again: {command}"
            continue
        if wanted in (None, info["sources"]):
            return Status(path, flags=info.get("flags", ""))
        cause = cause or f"{path} was built from other sources; build it again: {command}"
    return Status(None, cause=cause or f"not built; to build: {command}")
