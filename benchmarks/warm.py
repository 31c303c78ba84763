"""Compiles the kernels that the GPU suite will launch, on all cores, into Triton's cache.

    python -m benchmarks.warm                      # for the GPU of this machine
    python -m benchmarks.warm --architecture 90    # for another one; needs no GPU

A process compiles a kernel when it first launches it, one after the other, and a training step has about 60: minutes
in which a GPU waits. Launches are recorded from the ops on meta tensors and go through the path of a launch, up to the
launch itself, so that what is compiled has the key under which a launch looks for it. The most valuable kernels come
first; one that does not compile is named, and fails again where it is launched.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests import shipped_launches
from tests.ahead_of_time import program
from tests.shipped_launches import Step

WARP = 32


def steps() -> Iterator[Step]:
    """Training steps of the suite's tests and rows, those of the targets first."""
    half, single = torch.bfloat16, torch.float32
    for kept in (True, False):  # with the kernels for many rows
        yield Step(512, half, batch=1024, kept=kept, dropout=0.0)
    for width, dtype, more in (
        (512, half, {}), (512, single, {}), (128, single, {}), (128, single, {"kept": False}), (128, half, {}),
        (512, single, {"tf32": True}), (512, half, {"autocast": True}), (64, half, {}), (64, single, {}),
        (256, half, {}), (1024, half, {}), (128, single, {"tf32": True}), (128, half, {"autocast": True}),
        (384, half, {}), (768, half, {}),
    ):  # fmt: skip
        yield Step(width, dtype, dropout=0.0, **more)


def launches_of(wanted: Iterator[Step], architecture: int) -> list[Any]:
    """The launches of steps, each program once."""
    found: dict[tuple, Any] = {}
    for step in wanted:
        for launch in shipped_launches.record(step, architecture):
            found.setdefault(program(launch), launch)
    return list(found.values())


def compile_launch(launch: Any) -> None:
    """Compile as a launch would; the driver must be that of :func:`pretend`."""
    options = {"num_warps": launch.schedule.num_warps, "num_stages": launch.schedule.num_stages}
    launch.kernel.run(grid=(1,), warmup=True, **launch.arguments, **options, enable_fp_fusion=True)


def pretend(architecture: int) -> None:
    """Triton asks a driver for the target only: this one needs no GPU, and opens no context on one."""
    target = GPUTarget("cuda", architecture, WARP)
    asked = {"get_current_target": target, "get_current_device": 0, "get_current_stream": 0}
    driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in asked.items()}))


def _compile_share(launches: list[Any], architecture: int) -> int:
    """Compile some launches in a process of their own; how many failed."""
    pretend(architecture)
    failed = 0
    for launch in launches:
        try:
            compile_launch(launch)
        except Exception as error:
            failed += 1
            words = f"{launch.kernel.fn.__name__}: {type(error).__name__}: {str(error)[:300]}"
            print(words, file=sys.stderr, flush=True)
    return failed


def warm(launches: list[Any], architecture: int, processes: int) -> int:
    """Compile launches in forked processes, which share what was recorded; how many processes had a failure."""
    children = []
    for share in range(processes):
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = 1 if _compile_share(launches[share::processes], architecture) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)  # not through the parent's handlers
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 where a kernel did not compile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, help="compute capability as one number; default: that of the GPU")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--smoke", action="store_true", help="a few kernels of a small step: does it run?")
    options = parser.parse_args(arguments)
    start, architecture = time.monotonic(), options.architecture
    if architecture is None:
        major, minor = (9, 0) if options.smoke else torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    few = [Step(16, torch.float32, batch=8, dropout=0.0)]
    launches = launches_of(iter(few) if options.smoke else steps(), architecture)
    launches = launches[:4] if options.smoke else launches
    print(f"{len(launches)} kernels recorded in {time.monotonic() - start:.0f} s", flush=True)
    failed = warm(launches, architecture, options.processes)
    print(f"compiled for sm_{architecture} in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
