"""Builds the compiled kernels of csrc/ and says what a built library is. Imports neither torch nor setuptools.

Owns compiler flags, the object cache, the lock and the hash of the sources. ``setup.py`` and ``gcng build`` call
:func:`build_cpu` and :func:`build_cuda`; :mod:`gcng.ops.native` asks :func:`read_build_info` before it loads a file.
Nothing is ever downloaded, and nothing here runs at import.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Oldest torch whose stable ABI the registration files use.
TORCH_TARGET = (2, 11)
LOCK_TIMEOUT = 600.0
_MARKER = b"gcng-build:"

# Instruction set -> flags. Every library holds all kernels once; the loader picks the best that the machine can run.
X86_FLAGS = {
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "baseline": (),
}
# Contraction to FMA is allowed, reordering is not: -ffast-math would change what NaN and infinities do.
COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall")


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says why, in one line where that is possible."""


def source_folder() -> Path | None:
    """csrc/ of the checkout, or the copy that an installation carries; None where there is neither."""
    for folder in (PACKAGE.parent / "csrc", PACKAGE / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    return None


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Name -> compiler flags of the libraries that are built for this machine's architecture, best first."""
    return X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ()}


def library_name(kind: str) -> str:
    """File name of a library: ``kind`` is an instruction set, or ``cuda``."""
    return f"gcng_{kind}.so" if kind == "cuda" else f"gcng_cpu_{kind}.so"


def library_folders() -> list[Path]:
    """Where libraries are looked for: inside the package, then the user's cache."""
    return [PACKAGE / "_native", user_folder()]


def user_folder() -> Path:
    """Per-user place for what ``gcng build`` makes where the package cannot be written; one for each installation."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gcng" / hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]


def sources(kind: str, folder: Path) -> list[Path]:
    """Source files of a library, by file name alone: ``kind`` is ``kernels``, ``registration`` or ``cuda``."""
    pattern = {"kernels": "cpu/*.cpp", "registration": "register_*.cpp", "cuda": "cuda/*.cu"}[kind]
    return sorted(folder.glob(pattern))


def source_hash(folder: Path, *, cuda: bool = False) -> str:
    """Hash of every file that decides what the CPU (or CUDA) library does."""
    patterns = ("*.h", "cuda/*") if cuda else ("*.h", "*.cpp", "cpu/*")
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------- what a library says


def read_build_info(path: Path) -> dict[str, str]:
    """What a library was built from, read from its bytes without loading it.

    Raises:
        BuildError: not a whole ELF file (mapping a cut one can kill the process), or not one of ours.
    """
    content = path.read_bytes()
    if content[:4] != b"\x7fELF" or len(content) < 64:
        raise BuildError(f"{path} is not a shared library")
    # The table of sections stands at the very end, so a file that was cut anywhere lacks some of it.
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    if content[4:6] != b"\x02\x01" or table + size * count > len(content):
        raise BuildError(f"{path} is cut short or damaged")
    start = content.find(_MARKER)
    end = content.find(b"\0", start)
    if start < 0 or end < 0:
        raise BuildError(f"{path} does not say what it was built from")
    try:
        return json.loads(content[start + len(_MARKER) : end])
    except ValueError as error:
        raise BuildError(f"{path} does not say what it was built from") from error


def _write_build_info(path: Path, info: dict[str, str]) -> None:
    text = json.dumps((_MARKER + json.dumps(info).encode()).decode())
    symbol = '__attribute__((used, visibility("default")))'
    code = f'extern "C" {{ extern const char gcng_build_info[];\n{symbol} const char gcng_build_info[] = {text}; }}\n'
    if not path.is_file() or path.read_text(encoding="utf-8") != code:
        path.write_text(code, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ compiling


def torch_folder() -> Path:
    """Folder of the installed torch, found without importing it.

    Raises:
        BuildError: no torch, or one that is older than the stable ABI used here.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed in the environment that builds")
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(encoding="utf-8"))
    if not version or tuple(map(int, version.groups())) < TORCH_TARGET:
        raise BuildError(f"torch {'.'.join(map(str, TORCH_TARGET))} or later is needed")
    return folder


def compiler() -> list[str]:
    """Command of the C++ compiler: CXX, or the first of c++, g++, clang++ that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(words[0]):
            return words
    raise BuildError(f"no C++ compiler: {' '.join(named) or 'c++, g++ or clang++'} not found")


def num_jobs() -> int:
    """Compilers at once: MAX_JOBS, or the cores of this process."""
    return max(1, int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".strip())
    return done.stdout + done.stderr


def _up_to_date(target: Path, command: str) -> bool:
    """Whether an object was made by this command and is newer than all that it was made from."""
    record, depends = target.with_suffix(".cmd"), target.with_suffix(".d")
    try:
        if record.read_text(encoding="utf-8") != command:
            return False
        made = target.stat().st_mtime_ns
        names = depends.read_text(encoding="utf-8").replace("\\\n", " ").split(":", 1)[1].split()
        return all(os.stat(name).st_mtime_ns < made for name in names)
    except (OSError, IndexError):
        return False


def _compile(command: list[str], source: Path, target: Path) -> Path:
    """One object, from the cache where nothing changed; it takes its name only when it is whole."""
    line = shlex.join([*command, str(source)])
    if _up_to_date(target, line):
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    target.with_suffix(".cmd").unlink(missing_ok=True)
    _run([*command, "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(part)])
    os.replace(part, target)
    target.with_suffix(".cmd").write_text(line, encoding="utf-8")
    return target


def _link(command: list[str], target: Path) -> Path:
    """A library takes its name in one step: a killed build leaves the old one or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _run([*command, "-o", str(part)])
        read_build_info(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _object_folder(folder: Path | None, timeout: float) -> Iterator[Path]:
    """The folder of objects, for one process at a time; the lock dies with its holder, so none can be stale."""
    checkout = PACKAGE.parent
    if folder is None:
        in_checkout = (checkout / "csrc").is_dir() and os.access(checkout, os.W_OK)
        folder = checkout / "build" / "native" if in_checkout else user_folder() / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise BuildError(f"another build holds {folder / 'lock'} for {timeout:.0f} s") from None
                time.sleep(0.1)
        for left in folder.rglob("*.part"):  # of a build that was killed
            left.unlink(missing_ok=True)
        yield folder


def build_cpu(
    target: Path,
    *,
    objects: Path | None = None,
    kinds: Iterable[str] | None = None,
    timeout: float = LOCK_TIMEOUT,
) -> list[Path]:
    """Build the CPU libraries into the folder ``target``.

    Args:
        objects: folder of the object cache; None takes build/native of a checkout, or the user's cache.
        kinds: instruction sets; None builds all of :func:`instruction_sets`.
        timeout: seconds to wait for another build that uses the same objects.

    Raises:
        BuildError: no sources, no torch, no compiler, a compile error, or the lock was not to be had.
    """
    folder = source_folder()
    if folder is None:
        raise BuildError("the sources (csrc) are not part of this installation")
    torch, words = torch_folder(), compiler()
    flags = {kind: instruction_sets()[kind] for kind in (kinds or instruction_sets())}
    base = [*words, *COMMON_FLAGS, "-I", str(folder)]
    stable = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    registration = [*base, stable, "-isystem", str(torch / "include")]
    with _object_folder(objects, timeout) as cache, ThreadPoolExecutor(num_jobs()) as pool:
        jobs = {}
        for source in sources("registration", folder):
            jobs["registration", source] = pool.submit(_compile, registration, source, cache / f"{source.stem}.o")
        for kind, extra in flags.items():
            (cache / kind).mkdir(exist_ok=True)
            info = {"sources": source_hash(folder), "kind": kind, "torch": ".".join(map(str, TORCH_TARGET))}
            _write_build_info(cache / kind / "build_info.cpp", info)
            for source in [*sources("kernels", folder), cache / kind / "build_info.cpp"]:
                object_file = cache / kind / f"{source.stem}.o"
                jobs[kind, source] = pool.submit(_compile, [*base, *extra], source, object_file)
        made = {key: job.result() for key, job in jobs.items()}
        libraries = ["-L", str(torch / "lib"), "-ltorch_cpu", "-lc10", "-pthread"]
        links = []
        for kind in flags:
            files = [str(path) for (owner, _), path in made.items() if owner in (kind, "registration")]
            links.append(pool.submit(_link, [*words, "-shared", *files, *libraries], target / library_name(kind)))
        return [link.result() for link in links]


def main() -> int:
    """``python gcng/build.py``: rebuild what changed into the package of this checkout."""
    start = time.monotonic()
    try:
        made = build_cpu(PACKAGE / "_native")
    except BuildError as error:
        print(f"gcng build: {error}", file=sys.stderr)
        return 1
    print(f"{len(made)} libraries in {time.monotonic() - start:.1f} s: {made[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
