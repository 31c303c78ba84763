"""nvcc makes machine code of csrc/cuda for every architecture, without a warning and without a register spill.

Needs the CUDA toolkit and no GPU. What the kernels compute is tested on the host (tests/test_cuda_synthesis.py) and on
a GPU (tests marked gpu).
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gcng import build

ROOT = Path(__file__).resolve().parents[1]
SOURCES = build.cuda_sources(ROOT / "csrc")
ARCHITECTURES = ("80", "90a", "100a")
# What ptxas -v says of a kernel: its name, its stack, its registers.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
MAX_REGISTERS = 168  # three blocks of 128 threads on a multiprocessor


def compiler() -> str:
    try:
        return build.cuda_compiler()
    except build.BuildError as error:
        pytest.skip(f"{error}")


def reports(path: Path, architecture: str, target: Path) -> list[dict[str, str]]:
    """Compile a file; what ptxas says of every kernel in it."""
    flags = [*build.CUDA_FLAGS, "-Werror=all-warnings", "-Xptxas=-v", "-Xptxas=-warn-spills,-warn-lmem-usage"]
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [compiler(), *flags, code, "-I", str(ROOT / "csrc"), "-c", str(path), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [match.groupdict() for match in REPORT.finditer(done.stdout + done.stderr)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_and_spills(path: Path, tmp_path: Path) -> None:
    compiler()
    entries = set(re.findall(r"__global__ .*?(\w+_kernel)\(", path.read_text(encoding="utf-8"), re.DOTALL))
    with ThreadPoolExecutor(2) as workers:
        jobs = {a: workers.submit(reports, path, a, tmp_path / f"{a}.o") for a in ARCHITECTURES}
        found = {architecture: job.result() for architecture, job in jobs.items()}
    for architecture, kernels in found.items():
        seen = {entry for entry in entries if any(entry in kernel["name"] for kernel in kernels)}
        assert seen == entries, f"sm_{architecture} lacks {entries - seen}"
        for kernel in kernels:
            assert kernel["target"] == f"sm_{architecture}"
            spilled = int(kernel["stores"]) + int(kernel["loads"]) + int(kernel["stack"])
            assert spilled == 0, kernel
            assert int(kernel["registers"]) <= MAX_REGISTERS, kernel


def test_there_are_sources() -> None:
    assert {"synthesis", "synthesis_gradient"} <= {path.stem for path in SOURCES}


def test_a_spill_is_found(tmp_path: Path) -> None:
    """The check itself: a kernel that needs more registers than it may have."""
    compiler()
    sums = "\n".join(f"  x[{i}] = x[{i}] * x[{(i * 7 + 1) % 60}];" for i in range(60))
    text = f"""
__global__ void __launch_bounds__(1024, 2) greedy_kernel(float* to, const float* from) {{
  float x[60];
#pragma unroll
  for (int i = 0; i < 60; ++i) x[i] = from[i * 1024 + threadIdx.x];
  __syncthreads();
{sums}
#pragma unroll
  for (int i = 0; i < 60; ++i) to[i * 1024 + threadIdx.x] = x[i];
}}
"""
    path = tmp_path / "greedy.cu"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match="(?i)spill"):
        reports(path, "90a", tmp_path / "greedy.o")


def test_no_atomics() -> None:
    """Results repeat bit for bit: every sum has one owner and one order."""
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        assert "atomic" not in path.read_text(encoding="utf-8"), path.name
