"""Loads the compiled kernels on first use: which library, which instruction set, and why none.

Owns the namespace ``gcng_cpu`` (schemas are declared here in Python, by the op that calls them) and the one warning
that a missing or unusable library gives. An op asks :func:`cpu` and takes its blocked torch path where that is None.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcng import build

LIBRARY = torch.library.Library("gcng_cpu", "FRAGMENT")

# /proc/cpuinfo flags that x86-64-v3 and x86-64-v4 promise to the compiler.
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})


@dataclass(frozen=True)
class Status:
    """What of a library is in use. ``path`` is None where none is; ``cause`` then says why, in one line."""

    path: Path | None
    kind: str
    cause: str


class _Switch:
    enabled = True


def define(schema: str) -> None:
    """Declare an op of the extension, e.g. ``define("class_layout(Tensor labels, Tensor(a!) order) -> ()")``."""
    LIBRARY.define(schema)


def cpu() -> Any | None:
    """The namespace ``torch.ops.gcng_cpu`` of the CPU kernels, or None: then the blocked torch path runs."""
    if not _Switch.enabled:
        return None
    return _warned_cpu()


def cuda() -> ctypes.CDLL | None:
    """The library of CUDA launchers (raw pointers and a stream in, error code out), or None."""
    return _cuda()[0] if _Switch.enabled else None


def cpu_status() -> Status:
    """What :func:`cpu` found; loads the library, warns of nothing."""
    return _load_cpu()


def cuda_status() -> Status:
    """What :func:`cuda` found."""
    return _cuda()[1]


@contextmanager
def disabled() -> Iterator[None]:
    """Run the blocked torch path in this process, as if nothing was built. For tests; not thread-local."""
    before, _Switch.enabled = _Switch.enabled, False
    try:
        yield
    finally:
        _Switch.enabled = before


def runnable_kinds() -> list[str]:
    """Instruction sets this machine can run, best first, none above what torch itself uses (ATEN_CPU_CAPABILITY)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = next((set(line.split(":", 1)[1].split()) for line in text.splitlines() if line.startswith("flags")), set())
    allowed = torch.backends.cpu.get_cpu_capability()
    kinds = ["baseline"]
    if flags >= _V3 and allowed.startswith(("AVX2", "AVX512")):
        kinds.insert(0, "avx2")
        if flags >= _V4 and allowed.startswith("AVX512"):
            kinds.insert(0, "avx512")
    return kinds


@functools.cache
def _warned_cpu() -> Any | None:
    status = _load_cpu()
    if status.path is not None:
        return torch.ops.gcng_cpu
    warnings.warn(
        f"gcng: the compiled CPU kernels are not used, the slower torch path runs: {status.cause}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


@functools.cache
def _load_cpu() -> Status:
    status, path = _find(runnable_kinds(), cuda=False)
    if path is None:
        return status
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Status(None, status.kind, f"{path} does not load ({error}); build it again: gcng build")
    return status


@functools.cache
def _cuda() -> tuple[ctypes.CDLL | None, Status]:
    status, path = _find(["cuda"], cuda=True)
    if path is None:
        return None, status
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL), status
    except OSError as error:
        return None, Status(None, "cuda", f"{path} does not load ({error}); build it again: gcng build --cuda")


def _find(kinds: list[str], *, cuda: bool) -> tuple[Status, Path | None]:
    """The best library that is whole and was built from the sources of this version."""
    command = "gcng build --cuda" if cuda else "gcng build"
    cause = f"not built; to build: {command}"
    folder = build.source_folder()
    wanted = build.source_hash(folder, cuda=cuda) if folder else None
    for kind in kinds:
        for place in build.library_folders():
            path = place / build.library_name(kind)
            if not path.is_file():
                continue
            try:
                info = build.read_build_info(path)
            except (OSError, build.BuildError) as error:
                cause = f"{error}; build it again: {command}"
                continue
            if wanted is not None and info.get("sources") != wanted:
                cause = f"{path} was built from other sources; build it again: {command}"
                continue
            return Status(path, kind, ""), path
    return Status(None, kinds[0], cause), None
