"""The synthesis in CUDA C++ and in Triton, side by side: seconds of each pass, and the bytes that it has to move.

One block of all N anchors against all classes, as one tile of an iteration has it. Every form is first held to the
float64 truth, then forms take turns, pass after pass, each with a cold cache. Bytes are counted as follows, K samples
to a class, everything but the gates in float32:

- forward (values not wanted, inner products and norms are): every gate read once;
- backward, for gradients of values, inner products and norms: every gate read once, every element of the gradient of
  the gates read and written once, since a pass adds to it, and every element of the values and of their gradient, one
  for K gates, read once. `gate_bytes` leaves the last two out.

What depends on no gate (embeddings, two numbers a pair) is not counted, and neither is what a form reads again. The
geometry of the pairs is a pass of its own, which reads no gates.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rates
from benchmarks.machine import ROOT
from benchmarks.operations import PRECISIONS, SEED
from benchmarks.results import open_results, spread
from benchmarks.settings import Setting
from gcng.ops import native, triton_path
from gcng.ops.cuda_synthesis_kernels import CudaSynthesisKernels
from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, Synthesis, SyntheticGradients, TorchSynthesisKernels
from gcng.ops.triton_synthesis_kernels import TritonSynthesisKernels
from tests.closeness import assert_close_to_truth

CUDA, TRITON = "CUDA C++", "Triton"
SETTING, TINY = Setting(1, 512, 1024), Setting(1, 16, 8)
GATES = ("bfloat16", "float32")
ROUNDS = 15
TRUTH_ROWS = 64  # anchors at once in float64
KAPPA = 0.5
COLD_BYTES = 2**32  # read before a pass: more than any cache, and long enough to start a pass from the host meanwhile
CAPS = {torch.float32: 1e-4}  # as the tests of both forms have it
GATE_GRADIENT, EMBEDDING_GRADIENT = "gate gradient", "embedding gradient"


@dataclass(frozen=True)
class Problem:
    """One block: z (N, D), mix (K, K - 1), kappa 0-dim, gates (N, N, D), and gradients (N, M, D), (N, M), (N, M)."""

    setting: Setting
    z: Tensor
    mix: Tensor
    kappa: Tensor
    gates: Tensor
    grads: SyntheticGradients

    @property
    def everything(self) -> slice:
        """All nodes."""
        return slice(0, self.setting.samples)

    def synthesis(self, kernels: TorchSynthesisKernels, dtype: torch.dtype) -> Synthesis:
        """What does not depend on the gates, in a dtype."""
        boundaries = range(0, self.setting.samples + 1, self.setting.samples_per_class)
        return Synthesis(self.z.to(dtype), boundaries, self.kappa.to(dtype), self.mix.to(dtype), kernels)

    def side(self, synthesis: Synthesis, anchors: slice) -> Side:
        """Some anchors against all classes."""
        return Side(synthesis, anchors, self.everything, slice(None), mirrored=False)

    def upstream(self, anchors: slice, dtype: torch.dtype) -> SyntheticGradients:
        """The gradients of some anchors."""
        return SyntheticGradients(*(grad[anchors].to(dtype) for grad in self.grads))


def make_problem(setting: Setting, gates: torch.dtype, device: torch.device) -> Problem:
    """Random numbers, drawn where they are needed: half a billion gates take seconds on a host."""
    N, M, D, K = setting.samples, setting.batch_classes, setting.embedding_size, setting.samples_per_class
    generator = torch.Generator(device).manual_seed(SEED)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    # Around class centers, so that most negatives are farther than the positive, as in a batch.
    spread_out = 2 * draw(M, D).repeat_interleave(K, 0) + draw(N, D)
    return Problem(
        setting,
        z=D**-0.5 * spread_out,
        mix=torch.rand(K, K - 1, generator=generator, device=device),
        kappa=torch.tensor(KAPPA, device=device),
        gates=torch.rand(N, N, D, generator=generator, device=device, dtype=gates),
        grads=SyntheticGradients(draw(N, M, D), draw(N, M), draw(N, M)),
    )


def forms(device: torch.device | str) -> dict[str, TorchSynthesisKernels | str]:
    """Both forms, and in place of one that cannot run the reason; on a CPU one is compiled for it, one interpreted.

    CUDA C++ comes first: dispatch takes it wherever it is built.
    """
    place = torch.device(device)
    if place.type == "cuda":
        index = torch.cuda.current_device() if place.index is None else place.index
        cuda = native.cuda_status(index).cause or CudaSynthesisKernels()
        cause = triton_path.device_cause(index)
    else:
        library = on_host()
        cuda = CudaSynthesisKernels(library=library) if library else "no g++ to compile csrc/cuda for the host with"
        cause = "" if os.environ.get("TRITON_INTERPRET") == "1" else "no GPU; TRITON_INTERPRET=1 interprets the kernels"
    return {CUDA: cuda, TRITON: cause or TritonSynthesisKernels()}


@functools.cache
def on_host() -> ctypes.CDLL | None:
    """The launchers of csrc/cuda compiled for the host, as tests/test_cuda_synthesis.py has them; None without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "synthesis.so"
        sources = map(str, sorted((ROOT / "csrc" / "cuda").glob("synthesis*.cu")))
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE"]  # as the tests have them
        folders = ["-I", str(ROOT / "tests/cuda_on_host"), "-I", str(ROOT / "csrc")]
        command = [compiler, *flags, *folders, "-x", "c++", *sources, "-o", str(target)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(target))


def passes(problem: Problem, synthesis: Synthesis, anchors: slice, sums: EmbeddingGradients) -> dict[str, Tensor]:
    """What all passes give for some anchors; the gradients of embeddings are added to ``sums``."""
    side, dtype = problem.side(synthesis, anchors), synthesis.z.dtype
    gates, grads = problem.gates[anchors], problem.upstream(anchors, dtype)
    if type(synthesis.kernels) is TorchSynthesisKernels:
        gates = gates.to(dtype)
    full, lean = side.synthesize(gates), side.synthesize(gates, need_values=False)
    grad_gates = gates.new_zeros(gates.shape, dtype=dtype)
    side.add_gate_gradient(full, grads, grad_gates)
    side.backward(gates, grads, sums)
    return {"values": full.values, "dots": lean.dots, "squares": lean.squares, "grad gates": grad_gates}


def worst_error(problem: Problem, kernels: TorchSynthesisKernels) -> float:
    """The largest relative L2 error of a form against float64.

    Raises:
        ClosenessError: a result that is less accurate than plain torch in float32.
    """
    ours = problem.synthesis(kernels, torch.float32)
    gradients = EmbeddingGradients(ours)
    found = passes(problem, ours, problem.everything, gradients)
    plain = [problem.synthesis(TorchSynthesisKernels(), dtype) for dtype in (torch.float64, torch.float32)]
    sums = [EmbeddingGradients(one) for one in plain]
    errors = []

    def compare(name: str, result: Tensor, truth: Tensor, baseline: Tensor) -> None:
        errors.append(assert_close_to_truth(name, result, truth, baseline, op_caps=CAPS).reading("hard cap"))

    for start in range(0, problem.setting.samples, TRUTH_ROWS):
        anchors = slice(start, min(start + TRUTH_ROWS, problem.setting.samples))
        truth, baseline = (passes(problem, one, anchors, sum_) for one, sum_ in zip(plain, sums, strict=True))
        for name, expected in truth.items():
            compare(name, found[name][anchors], expected, baseline[name])
    compare("grad z", gradients.z, *(one.z for one in sums))
    compare("grad positive distance", gradients.positive_distance, *(one.positive_distance for one in sums))
    return max(errors)


def calls(problem: Problem, kernels: TorchSynthesisKernels, grad_gates: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by the name of the pass."""
    synthesis, everything = problem.synthesis(kernels, torch.float32), problem.everything
    side, sums = problem.side(synthesis, everything), EmbeddingGradients(synthesis)
    full = side.synthesize(problem.gates)
    return {
        "geometry": lambda: kernels.geometry(synthesis, everything, everything),
        "forward": lambda: side.synthesize(problem.gates, need_values=False),
        GATE_GRADIENT: lambda: side.add_gate_gradient(full, problem.grads, grad_gates),
        EMBEDDING_GRADIENT: lambda: side.backward(problem.gates, problem.grads, sums),
    }


def work(problem: Problem) -> dict[str, dict[str, float]]:
    """Bytes of the passes, counted as this module says."""
    gates, elements = problem.gates, float(problem.gates.numel())
    values = 4 * elements / problem.setting.samples_per_class
    read, added = elements * gates.element_size(), 2 * 4 * elements
    return {
        "forward": {"bytes": read, "gate_bytes": read},
        "backward": {"bytes": read + added + 2 * values, "gate_bytes": read + added},
        GATE_GRADIENT: {"bytes": added + 2 * values, "gate_bytes": added},
        EMBEDDING_GRADIENT: {"bytes": read + values, "gate_bytes": read},
    }


def seconds_of(call: Callable[[], object], cold: Tensor) -> float:
    """Seconds of a call: on a GPU on the device alone, after what was read last has left the caches."""
    if not cold.is_cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    # Read, not written: lines to write back would go on into the pass. Twice, so that the host is ahead of the device.
    cold.sum(), cold.sum()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(
    setting: Setting, gates: str, device: str, rounds: int = ROUNDS, *, cold_bytes: int = COLD_BYTES,
    copy_bytes: int | None = None,
) -> Iterator[dict]:  # fmt: skip
    """One entry for each form: the spread of each pass with its bytes, and the copy rate between the rounds."""
    place = torch.device(device)
    problem, ready, entries = make_problem(setting, PRECISIONS[gates], place), {}, {}
    grad_gates = torch.zeros(problem.gates.shape, device=place)
    for name, kernels in forms(device).items():
        entries[name] = entry = {"form": name, "gates": gates, "setting": setting.name}
        try:
            if isinstance(kernels, str):
                raise RuntimeError(kernels)
            entry["relative_error"] = worst_error(problem, kernels)
            ready[name] = calls(problem, kernels, grad_gates)
        except Exception as error:  # not there, not close, too little memory, no code for this device
            entry["reason"] = str(error).strip() or type(error).__name__
    cold = torch.zeros(cold_bytes // 4, device=place)
    seconds = {name: {one: [] for one in (*made, "backward")} for name, made in ready.items()}
    copies = []
    for turn in range(rounds + 1):
        copies.append(rates.copy_rate(device, copy_bytes)["bytes"])
        for name, made in ready.items():
            found = {one: seconds_of(call, cold) for one, call in made.items()}
            found["backward"] = found[GATE_GRADIENT] + found[EMBEDDING_GRADIENT]
            for one in found if turn else ():  # the first turn warms up
                seconds[name][one].append(found[one])
    counted = work(problem)
    for name, times in seconds.items():
        entries[name]["copy_bytes"] = statistics.median(copies[1:])
        entries[name]["passes"] = {one: {**spread(spent), **counted.get(one, {})} for one, spent in times.items()}
    yield from entries.values()


def main(arguments: list[str] | None = None) -> int:
    """Measures the forms into a results file."""
    options, results = open_results(arguments, __doc__, "bandwidth")
    setting, sizes = SETTING, {}
    if options.smoke:
        setting, sizes = TINY, {"rounds": 2, "cold_bytes": 2**16, "copy_bytes": 2**16}
    found: list[dict] = []
    for gates in GATES:
        found += measure(setting, gates, options.device, **sizes)
        results.replace("bandwidth", found)
    results.finish("bandwidth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
