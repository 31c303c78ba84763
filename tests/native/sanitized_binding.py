"""Runs tests of the compiled kernels from Python, in libraries that sanitizers watch: part of ``make test-sanitizers``.

Beside the kernels this sees what lies between them and Python: the checks of tensors in csrc/register_*.cpp, and every
tensor's own memory, because the allocations of torch are those of the address sanitizer. Python itself frees little at
its end, so leaks are not asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis

from gcng import build, libraries

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 60  # of each fuzz test
FILES = ("layout", "topk", "pairs", "synthesis", "synthesis_order", "far_memory")
TESTS = "fuzzed or refused or no_pairs or views or chain_lengths or far_memory"
# A tensor whose memory was cut behind its back: no check of shapes sees it.
OVERRUN = """
from tests.native import sanitized_binding
sanitized_binding.use(sys.argv[1])
import torch
from gcng.ops import native, native_pair_kernels
nodes, out = torch.zeros(8, 40), torch.zeros(64, 40)
nodes.untyped_storage().resize_(4 * 7 * 40)
native.cpu().pair_products(nodes, 8, 0, 8, 0, 8, out)
"""
RUN = """
from tests.native import sanitized_binding
sanitized_binding.use(sys.argv[1])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def use(folder: str) -> None:
    """Load the kernels from ``folder`` alone, and draw fewer examples; for the process that runs the tests."""
    libraries.package_folder = libraries.user_folder = lambda: Path(folder)
    from gcng.ops import native

    status = native.cpu_status()
    assert status.path is not None and str(status.path).startswith(folder), status
    begin = hypothesis.settings.__init__

    def with_fewer_examples(self: hypothesis.settings, *parents: hypothesis.settings, **options: object) -> None:
        if "max_examples" in options:
            options["max_examples"] = min(options["max_examples"], EXAMPLES)
        begin(self, *parents, **options)

    hypothesis.settings.__init__ = with_fewer_examples


def build_library(command: list[str], options: list[str], kernels: list[str], folder: Path) -> Path:
    """Link the registrations and the objects of the kernels into a library; returns its folder."""
    torch, sources = build.torch_folder(), ROOT / "csrc"
    stable = f"-DTORCH_TARGET_VERSION=0x{build.TORCH_TARGET[0]:02x}{build.TORCH_TARGET[1]:02x}000000000000"
    registration = [*command, stable, "-isystem", str(torch / "include")]
    info = {"sources": libraries.source_hash(sources), "compiler": command[0], "flags": " ".join(options)}
    record = build._write_build_info(folder / "build_info.cpp", info)
    files = [(registration, path) for path in sorted(sources.glob("register_*.cpp"))]
    files.append(([*command, "-Wno-attributes"], record))
    with ThreadPoolExecutor(build.num_jobs()) as workers:
        jobs = [workers.submit(build.compile_object, words, path, folder / f"{path.stem}.o") for words, path in files]
        objects = [str(job.result()) for job in jobs]
    place = folder / "library"
    place.mkdir(exist_ok=True)
    linked = ["-L", str(torch / "lib"), "-ltorch_cpu", "-lc10", "-pthread"]
    library = place / list(libraries.cpu_libraries())[-1]
    build.run_compiler([*build.compiler(), *options, "-shared", *kernels, *objects, *linked, "-o", str(library)])
    return place


def preloaded() -> str | None:
    """What a process that is no sanitizer's own has to load first; None where the compiler has no shared run time."""
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [*build.compiler(), f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        paths.append(done.stdout.strip())
    return " ".join(paths) if all(os.path.isabs(path) for path in paths) else None


def run_python(code: str, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code under the sanitizers."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", str(place), *arguments],
        cwd=ROOT, env={**os.environ, **options, "LD_PRELOAD": preloaded() or ""},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def check(place: Path) -> list[str]:
    """What went wrong: a test with a report, or a mistake without one."""
    if preloaded() is None:
        print(f"binding: not run, {build.compiler()[0]} has no shared libasan")
        return []
    done = run_python(RUN, place, *(f"tests/test_native_{name}.py" for name in FILES), "-k", TESTS)
    print(f"address,undefined from Python\n{done.stdout[-600:]}{done.stderr}", flush=True)
    wrong = [] if done.returncode == 0 else [f"binding: a test failed:\n{done.stdout[-4000:]}"]
    done = run_python(OVERRUN, place)
    caught = done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    print(f"  planted overrun of a tensor: {'reported' if caught else 'NOT reported'}")
    return wrong if caught else [*wrong, f"binding: a planted overrun was not reported:\n{done.stdout}{done.stderr}"]
