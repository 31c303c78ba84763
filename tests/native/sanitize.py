"""Runs the stand-alone tests of csrc/cpu under sanitizers: ``make test-sanitizers``.

Builds the torch-free kernels with the drivers beside this file, once with address and undefined-behavior sanitizers and
once with the thread sanitizer, runs all cases, and makes sure that a planted mistake of each kind is reported. With the
first also runs tests of the extension from Python (sanitized_binding.py).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gcng import build
from tests.native import sanitized_binding

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Of the fastest build only the optimization is missing: vector code of this machine is what runs here, too.
FLAGS = ("-std=c++20", "-O2", "-g", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-Wall", "-Wextra", "-Werror")
# The GNU compiler warns of uninitialized values in its own <algorithm> and <vector> where a sanitizer is on.
QUIET = ("-Wno-maybe-uninitialized",)
# Sanitizer -> rounds of every case, and planted mistake -> what its report says.
JOBS = {
    "address,undefined": (500, {"overrun": "heap-buffer-overflow", "overflow": "signed integer overflow"}),
    "thread": (200, {"race": "data race"}),
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build_driver(sanitizer: str, workers: ThreadPoolExecutor) -> tuple[Path, Path | None]:
    """Compile kernels and drivers with one sanitizer; objects that nothing changed for are kept.

    Returns:
        The driver, and with the address sanitizer the folder of a library of the same kernels for Python.
    """
    folder = ROOT / "build" / "sanitizers" / sanitizer.split(",")[0]
    machine = ["-march=native"] if platform.machine() == "x86_64" else []
    options = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [*build.compiler(), *FLAGS, *QUIET, *machine, *options, "-I", str(ROOT / "csrc"), "-I", str(HERE)]
    with build.locked(folder, build.LOCK_TIMEOUT):
        kernels, drivers = (sorted(place.glob("*.cpp")) for place in (ROOT / "csrc" / "cpu", HERE))
        jobs = [
            workers.submit(build.compile_object, command, path, folder / f"{path.stem}.o")
            for path in (*kernels, *drivers)
        ]
        objects = [str(job.result()) for job in jobs]
        driver, library = folder / "driver", None
        build.run_compiler([*build.compiler(), *options, *objects, "-pthread", "-o", str(driver)])
        if sanitizer.startswith("address"):
            library = sanitized_binding.build_library(command, options, objects[: len(kernels)], folder)
    return driver, library


def run_driver(driver: Path, word: str) -> subprocess.CompletedProcess[str]:
    """Run a driver with its one argument: a number of rounds, or the name of a mistake."""
    environment = {**os.environ, **OPTIONS}
    return subprocess.run([driver, word], capture_output=True, text=True, env=environment, timeout=900, check=False)


def check(sanitizer: str, driver: Path, rounds: int, planted: dict[str, str]) -> list[str]:
    """What went wrong: a case with a report, or a mistake without one."""
    start = time.monotonic()
    done = run_driver(driver, str(rounds))
    print(f"{sanitizer} ({time.monotonic() - start:.1f} s)\n{done.stdout}{done.stderr}", flush=True)
    wrong = [f"{sanitizer}: a case failed"] if done.returncode or not done.stdout else []
    for mistake, report in planted.items():
        done = run_driver(driver, mistake)
        caught = done.returncode != 0 and report in done.stderr
        print(f"  planted {mistake}: {'reported' if caught else 'NOT reported'}")
        wrong += [] if caught else [f"{sanitizer}: planted {mistake} was not reported:\n{done.stdout}{done.stderr}"]
    return wrong


def main() -> int:
    """Build and run everything; 1 if anything is wrong."""
    wrong: list[str] = []
    try:
        with ThreadPoolExecutor(build.num_jobs()) as workers:
            for sanitizer, (rounds, planted) in JOBS.items():
                driver, library = build_driver(sanitizer, workers)
                wrong += check(sanitizer, driver, rounds, planted)
                wrong += sanitized_binding.check(library) if library else []
    except build.BuildError as error:
        wrong.append(str(error))
    print("\n".join(wrong) or "sanitizers: no report, and every planted mistake was found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
