"""Peak memory of one iteration above the interpreter, in a process of its own.

    python -m benchmarks.memory --provider blocked --samples 160 --embedding-size 512 --layers 1

prints one JSON object. The process imports everything, runs a tiny warm-up iteration, notes its resident set,
resets the kernel's high-water mark where that is permitted, makes weights and inputs, runs ONE iteration, and
reads the high-water mark. The peak above the interpreter is the difference, weights and gradients included.
`ru_maxrss` is not used: a child process inherits the value of the parent that started it.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.settings import MEMORY_PROVIDERS, Setting

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = {"embedding_size": 16, "samples": 8}
# A row is not started when it is predicted to need more than this share of the available memory.
USABLE_SHARE = 0.9


def available_bytes() -> int:
    """Memory that a new process can take: the kernel's estimate, or what a cgroup limit leaves."""
    available = _meminfo("MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def predicted_bytes(setting: Setting, measured: dict[Setting, int]) -> int | None:
    """Peak of a dense provider from its measured peak at the largest smaller N, times the growth of N^2."""
    smaller = [
        other
        for other in measured
        if other.samples < setting.samples
        and (other.embedding_size, other.num_layers) == (setting.embedding_size, setting.num_layers)
    ]
    if not smaller:
        return None
    largest = max(smaller, key=lambda other: other.samples)
    return round(measured[largest] * (setting.samples / largest.samples) ** 2)


def measure_in_subprocess(provider: str, setting: Setting, threads: int) -> dict:
    """Runs this module for one provider and setting; the status says whether it finished."""
    command = [
        *(sys.executable, "-m", "benchmarks.memory", "--provider", provider, "--threads", str(threads)),
        *("--samples", str(setting.samples), "--embedding-size", str(setting.embedding_size)),
        *("--layers", str(setting.num_layers), "--dropout", str(setting.dropout)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return {"status": "measured", **json.loads(done.stdout)}
    if done.returncode == -9:
        return {"status": "killed"}
    raise RuntimeError(f"{' '.join(command[1:])} failed with exit code {done.returncode}:\n{done.stderr}")


def measure_here(provider: str, setting: Setting, threads: int) -> dict:
    """Measures in this process, which must be fresh. Linux only (reads /proc)."""
    import torch

    from benchmarks.iteration import make_batch, make_provider, run_iteration

    torch.set_num_threads(threads)
    warm_up = Setting(num_layers=1, **WARM_UP)
    run_iteration(make_provider(provider, warm_up), make_batch(warm_up))
    gc.collect()
    before = _own_status("VmRSS")
    reset = _reset_high_water_mark()
    target, batch = make_provider(provider, setting), make_batch(setting)
    outcome = run_iteration(target, batch)
    finite = all(bool(torch.isfinite(loss)) for loss in outcome.losses.values())
    if not finite:
        raise RuntimeError(f"benchmarks.memory: a loss of {provider} at {setting.name} is not finite")
    peak = _own_status("VmHWM")
    return {"peak_bytes": peak - before, "interpreter_bytes": before, "high_water_mark_reset": reset}


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _own_status(key: str) -> int:
    return _kilobytes(Path("/proc/self/status"), key)


def _meminfo(key: str) -> int:
    return _kilobytes(Path("/proc/meminfo"), key)


def _kilobytes(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no line {key}; measurements of memory need Linux")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the child process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--provider", choices=MEMORY_PROVIDERS, required=True)
    parser.add_argument("--samples", type=int, required=True, help="N, with two samples per class")
    parser.add_argument("--embedding-size", type=int, required=True, help="D")
    parser.add_argument("--layers", type=int, default=1, help="L")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    setting = Setting(options.layers, options.embedding_size, options.samples, dropout=options.dropout)
    print(json.dumps(measure_here(options.provider, setting, options.threads)))


if __name__ == "__main__":
    main()
