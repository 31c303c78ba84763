"""Builds the compiled kernels of csrc/. Imports neither torch nor setuptools, downloads nothing, runs when asked only.

Owns which compilers there are and their flags, the folder of objects and its lock, and what a package build does; how
they are run is in :mod:`gcng.compilation`. ``setup.py``, ``gcng build`` and ``python -m gcng.build`` come here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcng import libraries
from gcng.compilation import BuildError, Job, compile_objects, link
from gcng.compilation import compile_object as compile_object
from gcng.compilation import run_compiler as run_compiler
from gcng.libraries import CUDA_LIBRARY, LibraryError

# Oldest torch whose stable ABI csrc/register_*.cpp use; a library runs on this one and all later ones.
TORCH_TARGET = (2, 11)
# Contraction to FMA is allowed, reordering is not: -ffast-math would change what NaN and infinities do.
CPU_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall")
CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall")
# Machine code for A100, H100 and H200, B200; what lies between them is compiled from the PTX of the first when it runs.
CUDA_ARCHITECTURES = "8.0+PTX 9.0a 10.0a"
LOCK_TIMEOUT = 600.0


# ------------------------------------------------------------------------------------------------- what is there


def check_platform() -> None:
    """BuildError where the libraries, which are ELF files, could not be loaded."""
    if sys.platform != "linux":
        raise BuildError(f"the kernels are built on Linux only, and this is {sys.platform}")


def torch_folder() -> Path:
    """Folder of the installed torch, found without importing it; BuildError without one that is new enough.

    An isolated build (pip's default) cannot import what is installed, but its interpreter is the environment's: torch
    lies where that keeps its packages. Headers and library names are all that a build takes from there.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    folders += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    folder = next((place for place in folders if (place / "version.py").is_file()), None)
    if folder is None:
        raise BuildError("torch is not installed in the environment that builds")
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(encoding="utf-8"))
    if not version or tuple(map(int, version.groups())) < TORCH_TARGET:
        raise BuildError(f"torch {'.'.join(map(str, TORCH_TARGET))} or later is needed")
    return folder


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*= '", text, re.MULTILINE) is not None


def compiler() -> list[str]:
    """Command of the C++ compiler: CXX, or the first of c++, g++, clang++; BuildError without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(words[0]):
            return words
    raise BuildError(f"no C++ compiler: {' '.join(named) or 'c++, g++ or clang++'} not found")


def cuda_compiler() -> str:
    """nvcc of CUDA_HOME, on the path, or where the toolkit installs it; BuildError without one."""
    home = os.environ.get("CUDA_HOME")
    for name in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(name):
            return found
    raise BuildError("no nvcc: install the CUDA toolkit, or set CUDA_HOME")


def cuda_architectures(text: str | None = None) -> list[str]:
    """nvcc options for a list in the spelling of TORCH_CUDA_ARCH_LIST, such as ``8.0 9.0a 10.0+PTX``."""
    text = text or os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    options = []
    for name in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {name!r} is not an architecture such as 9.0 or 9.0a or 8.0+PTX")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


def num_jobs() -> int:
    """Compilers at once: MAX_JOBS, or the cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("MAX_JOBS") or str(cores)
    if not text.isdecimal() or text == "0":
        raise BuildError(f"MAX_JOBS is {text!r}; it must be a positive number")
    return int(text)


def cpu_sources(folder: Path) -> tuple[list[Path], list[Path]]:
    """Kernels (compiled for every instruction set) and registrations (compiled once), by file name alone."""
    return sorted(folder.glob("cpu/*.cpp")), sorted(folder.glob("register_*.cpp"))


def cuda_sources(folder: Path) -> list[Path]:
    """Sources of the CUDA library."""
    return sorted(folder.glob("cuda/*.cu"))


# -------------------------------------------------------------------------------------------------- the libraries


def _write_build_info(path: Path, info: Mapping[str, str]) -> Path:
    text = json.dumps((libraries.MARKER + json.dumps(info).encode()).decode())
    code = (
        'extern "C" {\n'
        '__attribute__((used, visibility("default"))) extern const char gcng_build_info[];\n'
        f"const char gcng_build_info[] = {text};\n"
        "}\n"
    )
    if not path.is_file() or path.read_text(encoding="utf-8") != code:
        path.write_text(code, encoding="utf-8")
    return path


@contextlib.contextmanager
def locked(folder: Path, timeout: float) -> Iterator[None]:
    """One process at a time in the folder of objects. The lock dies with its holder, so none is ever stale."""
    import fcntl  # not on Windows, where an installation imports this module all the same

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise BuildError(f"another build has held {folder / 'lock'} for {timeout:.0f} s") from None
                time.sleep(0.1)
        for left in folder.rglob("*.part"):  # of a build that was killed
            left.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _workplace(objects: Path | None, target: Path, timeout: float) -> Iterator[tuple[Path, Path]]:
    """Yields the folder of sources and the locked folder of objects."""
    sources = libraries.source_folder()
    if sources is None:
        raise BuildError("the sources (csrc) are not part of this installation")
    checkout = libraries.PACKAGE.parent
    if objects is None:
        in_checkout = sources.parent == checkout and os.access(checkout, os.W_OK)
        objects = checkout / "build" / "native" if in_checkout else libraries.user_folder() / "objects"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(objects, timeout):
            yield sources, objects
    except (OSError, LibraryError) as error:
        raise BuildError(str(error)) from error


def build_cpu(
    target: Path, *, objects: Path | None = None, names: Sequence[str] | None = None, timeout: float = LOCK_TIMEOUT
) -> list[Path]:
    """Build the CPU libraries into the folder ``target``.

    Args:
        objects: folder of the object cache; None takes build/native of a checkout, or the user's cache.
        names: libraries to build; None builds all of :func:`gcng.libraries.cpu_libraries`.
        timeout: seconds to wait for another build that uses the same objects.

    Raises:
        BuildError: no sources, torch or compiler, a compile error, or the lock was not to be had.
    """
    check_platform()
    torch, command = torch_folder(), compiler()
    stable = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    linked = ["-L", str(torch / "lib"), "-ltorch_cpu", "-lc10", "-pthread"]
    with _workplace(objects, target, timeout) as (folder, cache):
        # Messages name csrc/..., not where it lay when it was compiled.
        common = [*command, *CPU_FLAGS, f"-ffile-prefix-map={folder}=csrc", "-I", str(folder)]
        registration = [*common, stable, "-isystem", str(torch / "include")]
        kernels, registrations = cpu_sources(folder)
        start = libraries.source_hash(folder)
        bound = [Job(registration, path, cache / f"{path.stem}.o") for path in registrations]
        parts = {}
        for name in names or libraries.cpu_libraries():
            flags, place = libraries.CPU_LIBRARIES[name], cache / Path(name).stem
            place.mkdir(exist_ok=True)
            info = {"sources": start, "compiler": command[0], "flags": shlex.join(flags)}
            files = [*kernels, _write_build_info(place / "build_info.cpp", info)]
            parts[name] = [Job([*common, *flags], path, place / f"{path.stem}.o") for path in files]
        compile_objects([*bound, *itertools.chain(*parts.values())], num_jobs())
        made = []
        for name, jobs in parts.items():
            files = [str(job.target) for job in [*jobs, *bound]]
            made.append(link([*command, "-shared", *files, *linked], target / name))
        if libraries.source_hash(folder) != start:
            raise BuildError("a source file changed during the build; build again")
        return made


def build_cuda(target: Path, *, objects: Path | None = None, timeout: float = LOCK_TIMEOUT) -> list[Path]:
    """Build the CUDA library into the folder ``target``; needs nvcc, and neither a GPU nor torch. Else as build_cpu."""
    check_platform()
    nvcc, architectures = cuda_compiler(), cuda_architectures()
    with _workplace(objects, target, timeout) as (folder, cache):
        files = cuda_sources(folder)
        if not files:
            raise BuildError("this version has no CUDA source")
        place, start = cache / Path(CUDA_LIBRARY).stem, libraries.source_hash(folder, cuda=True)
        place.mkdir(exist_ok=True)
        shown = " ".join(option.split(",code=", 1)[1] for option in architectures)
        info = {"sources": start, "compiler": nvcc, "flags": shown}
        command = [nvcc, *CUDA_FLAGS, *architectures, "-I", str(folder)]
        files.append(_write_build_info(place / "build_info.cpp", info))
        jobs = [Job(command, path, place / f"{path.stem}.o") for path in files]
        compile_objects(jobs, num_jobs())
        return [link([nvcc, "-shared", *(str(job.target) for job in jobs)], target / CUDA_LIBRARY)]


# --------------------------------------------------------------------------------------- as a part of a package


@dataclass(frozen=True)
class Plan:
    """What a package build compiles, and why not the rest."""

    cpu: bool
    cuda: bool
    reason: str


def plan() -> Plan:
    """Decide by what is installed and by GCNG_BUILD_CUDA (auto, 0 or 1).

    Raises:
        BuildError: GCNG_BUILD_CUDA=1 where it cannot be done, or another value.
    """
    wish = os.environ.get("GCNG_BUILD_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"GCNG_BUILD_CUDA is {wish!r}; use auto, 0 or 1")
    folder = libraries.source_folder()
    if wish == "1":
        check_platform()
        cuda_compiler()
        cuda_architectures()
        if folder is None or not cuda_sources(folder):
            raise BuildError("GCNG_BUILD_CUDA=1, but there is no CUDA source")
    try:
        check_platform(), torch_folder(), compiler(), num_jobs()
    except BuildError as error:
        return Plan(False, wish == "1", str(error))
    cuda = wish == "1"
    if wish == "auto" and folder is not None and cuda_sources(folder):
        with contextlib.suppress(BuildError):
            cuda = torch_has_cuda() and bool(cuda_compiler())
    return Plan(True, cuda, "")


def _in_one_line(error: BuildError) -> str:
    """A compiler may have said pages: its first error, or what it said last."""
    found = re.search(r".*\berror: .*", str(error))
    return found[0].strip() if found else str(error).splitlines()[-1]


def build_package(wanted: Plan, target: Path) -> None:
    """Build what is planned into ``target``. Only what GCNG_BUILD_CUDA=1 asked for may fail the installation."""
    reason = wanted.reason
    if wanted.cpu:
        try:
            build_cpu(target)
        except BuildError as error:
            reason = _in_one_line(error)
    if wanted.cuda:
        try:
            build_cuda(target)
        except BuildError as error:
            if os.environ.get("GCNG_BUILD_CUDA") == "1":
                raise
            why = _in_one_line(error)
            print(f"gcng: without the CUDA kernels, to build them later: gcng build --cuda ({why})", file=sys.stderr)
    if reason:
        print(f"gcng: without the compiled CPU kernels, to build them later: gcng build ({reason})", file=sys.stderr)


def main() -> int:
    """``python -m gcng.build``: bring the libraries of a checkout up to date, as an editable install does."""
    try:
        build_package(plan(), libraries.package_folder())
    except BuildError as error:
        print(f"gcng: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
