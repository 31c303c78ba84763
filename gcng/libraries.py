"""Which compiled libraries there can be, where they lie, and what one was built from. Imports no torch.

Shared by :mod:`gcng.build`, which makes the libraries, and :mod:`gcng.ops.native`, which loads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CUDA_LIBRARY = "gcng_cuda.so"
# Library -> compiler flags. Each holds every CPU kernel once, compiled for one instruction set; best first.
CPU_LIBRARIES = {
    "gcng_cpu_avx512.so": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "gcng_cpu_avx2.so": ("-march=x86-64-v3",),
    "gcng_cpu_baseline.so": (),
}
# A built library holds this, JSON, and a zero byte.
MARKER = b"gcng-build:"


class LibraryError(RuntimeError):
    """A file is not a library that can be loaded; the message says why, in one line."""


def cpu_libraries() -> dict[str, tuple[str, ...]]:
    """The part of CPU_LIBRARIES that this machine's architecture has a compiler for."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return CPU_LIBRARIES
    return {"gcng_cpu_baseline.so": ()}


def package_folder() -> Path:
    """Where a build of the package puts its libraries."""
    return PACKAGE / "_native"


def user_folder() -> Path:
    """Where ``gcng build`` puts them if the package cannot be written: the user's cache, one folder an installation."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gcng" / hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]


def source_folder() -> Path | None:
    """The copy of csrc/ that an installation carries, or that of the checkout; None where there is neither."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "tensor_access.h").is_file():
            return folder
    return None


def source_hash(folder: Path, *, cuda: bool = False) -> str:
    """Hash of every file that decides what the CPU libraries, or the CUDA library, do."""
    patterns = ("*.h", "cuda/*") if cuda else ("*.h", "*.cpp", "cpu/*")
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def read_build_info(path: Path) -> dict[str, str]:
    """What a library was built from, read from its bytes: nothing is loaded.

    Returns:
        ``sources`` (:func:`source_hash`), ``compiler``, ``flags``.

    Raises:
        LibraryError: not a whole ELF file (to map one that was cut can kill the process), or not one of gcng.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if content[:4] != b"\x7fELF" or len(content) < 64:
        raise LibraryError(f"{path} is not a shared library")
    # The table of sections stands at the very end, so a file that was cut anywhere lacks some of it.
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    if content[4:6] != b"\x02\x01" or not count or table + size * count > len(content):
        raise LibraryError(f"{path} is cut short or damaged")
    start = content.find(MARKER)
    try:
        info = json.loads(content[start + len(MARKER) : content.index(b"\0", start)]) if start >= 0 else None
    except ValueError:
        info = None
    if not isinstance(info, dict) or "sources" not in info:
        raise LibraryError(f"{path} does not say what it was built from")
    return info
