"""Loads the compiled kernels on first use: which library, which instruction set, and why none.

Owns the namespace ``gcng_cpu``, whose schemas are declared in Python by the op that calls them, and the one warning
that a missing or unusable library gives. An op asks :func:`cpu` and takes its blocked torch path where that is None.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
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
        skipped: why a library for more of this processor is not the one that is loaded, one line; empty if it is.
        found: whether a library is there at all, loaded or not.
    """

    path: Path | None
    flags: str = ""
    cause: str = ""
    skipped: str = ""
    found: bool = True


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


def cuda(index: int | None = None, *, quiet: bool = False) -> ctypes.CDLL | None:
    """The launchers of CUDA kernels (raw pointers and a stream in, an error code out), or None.

    A lookup after the first call for a device. One warning a device where a library is there and cannot be used on it;
    none where nothing was built, which leaves a path that needs no build.

    Args:
        index: device that the library must have code for; None takes any library that loads.
        quiet: warn of nothing.
    """
    if not _Switch.enabled:
        return None
    library, status = _load_cuda(index)
    if library is None and status.found and not quiet:
        _warn_of_cuda(index, status.cause)
    return library


def cpu_status() -> Status:
    """What :func:`cpu` finds. Loads the library, warns of nothing."""
    return _load_cpu()


def cuda_status(index: int | None = None) -> Status:
    """What :func:`cuda` finds. Loads the library, warns of nothing; initializes CUDA only where a device is given."""
    return _load_cuda(index)[1]


def runs_on(flags: str, capability: tuple[int, int]) -> bool:
    """Whether a device has code among ``flags``, e.g. ``[sm_80,compute_80] sm_90a``, by CUDA's rules.

    Machine code (sm) runs on its own major version from its minor version on, PTX (compute) on every later device,
    code for one architecture (90a) on that alone, code for a family (100f) as machine code does.
    """
    for kind, major, minor, suffix in re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", flags):
        code = int(major), int(minor)
        any_major = kind == "compute" and not suffix
        later = suffix != "a" and capability > code and (any_major or capability[0] == code[0])
        if later or capability == code:
            return True
    return False


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
    status = _load_cpu()
    if status.cause:
        message = f"gcng: the compiled CPU kernels are not used, the slower torch path runs: {status.cause}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None
    if status.skipped:
        message = f"gcng: the compiled CPU kernels are not those for all of this processor: {status.skipped}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return torch.ops.gcng_cpu


@functools.cache
def _warn_of_cuda(index: int | None, cause: str) -> None:
    device = "" if index is None else f" on CUDA device {index}"
    message = (
        f"gcng: the CUDA C++ kernels of the synthesis are not used{device}, its Triton or torch form runs: {cause}"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=4)


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
def _load_cuda(index: int | None) -> tuple[ctypes.CDLL | None, Status]:
    capability = None if index is None else torch.cuda.get_device_capability(index)
    status = _find([libraries.CUDA_LIBRARY], command="gcng build --cuda", capability=capability)
    if status.path is None:
        return None, status
    try:
        return ctypes.CDLL(str(status.path)), status
    except OSError as error:
        cause = f"{status.path} does not load ({error}); build it again: gcng build --cuda"
        return None, Status(None, cause=cause)


def _find(names: Sequence[str], *, command: str, capability: tuple[int, int] | None = None) -> Status:
    """The first library that is whole, was built from the sources of this installation, and has code for a device."""
    causes: dict[str, str] = {}  # the first of each name
    folder = libraries.source_folder()
    wanted = libraries.source_hash(folder, cuda=names[0] == libraries.CUDA_LIBRARY) if folder else None
    places = (libraries.package_folder(), libraries.user_folder())
    for path in (place / name for name in names for place in places):
        if not path.is_file():
            continue
        cause = ""
        try:
            info = libraries.read_build_info(path)
        except (OSError, libraries.LibraryError) as error:
            cause = f"{error}; build it again: {command}"
        else:
            flags = info.get("flags", "")
            if wanted not in (None, info["sources"]):
                cause = f"{path} was built from other sources; build it again: {command}"
            elif capability is not None and not runs_on(flags, capability):
                cause = (
                    f"{path} was built for {flags or 'no device'}, not for compute capability "
                    f"{'.'.join(map(str, capability))}; "
                    f"build it again: TORCH_CUDA_ARCH_LIST={_visible_architectures()} {command}"
                )
        if not cause:
            return Status(path, flags=flags, skipped=next((causes[x] for x in causes if x != path.name), ""))
        causes.setdefault(path.name, cause)
    return Status(None, cause=next(iter(causes.values()), f"not built; to build: {command}"), found=bool(causes))


def _visible_architectures() -> str:
    """Of all devices, so that a build for one does not leave out another, e.g. ``8.0,9.0``."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ",".join(f"{major}.{minor}" for major, minor in sorted(found))
