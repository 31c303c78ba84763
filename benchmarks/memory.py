"""Peak memory of one call, above what the process had before: resident set on the CPU, allocations on a GPU.

On the CPU every number comes from a process of its own, forked from a server that has imported everything and computed
nothing. It runs a tiny call, notes its resident set, resets the kernel's high-water mark where that is permitted, makes
weights and inputs, runs ONE call, and reads the high-water mark. Weights, inputs and gradients are in the difference.
`ru_maxrss` is not used: a child process inherits the value of the parent that started it.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import operations
from benchmarks.operations import Operation, Unavailable
from benchmarks.settings import Setting

# A row is not started when it is predicted to need more than this share of the available memory.
USABLE_SHARE = 0.9


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that a new process can take: the kernel's estimate, or what a cgroup limit leaves; a GPU's free memory."""
    if torch.device(device).type == "cuda":
        # What torch has in its cache counts as used there, and is given to the next allocation all the same.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = _meminfo("MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def predicted_bytes(operation: Operation, setting: Setting, measured: dict[Setting, int]) -> int | None:
    """Peak of a dense provider from its measured peaks: that of the nearest smaller size, times what grows.

    None where no setting was measured that has the same number of layers.
    """
    grows = {s: operation.growth(s) for s in measured if s.num_layers == setting.num_layers and s != setting}
    if not grows:
        return None
    wanted = operation.growth(setting)
    smaller = [s for s in grows if grows[s] <= wanted] or list(grows)
    # The same width first, then the nearest size.
    nearest = min(smaller, key=lambda s: (s.embedding_size != setting.embedding_size, abs(grows[s] - wanted)))
    return round(measured[nearest] * wanted / grows[nearest])


def measure(
    operation: str, provider: str, setting: Setting, precision: str, device: str = "cpu", threads: int = 2
) -> dict:
    """One row: status "measured" with its bytes, "killed", or "unavailable" and "failed" with a reason."""
    if torch.device(device).type == "cuda":
        return _measure_on_gpu(operation, provider, setting, precision, device)
    receiver, sender = _context().Pipe(duplex=False)
    arguments = (sender, operation, provider, setting, precision, threads)
    process = _context().Process(target=_measure_here, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        row = receiver.recv()
    except EOFError:
        row = None
    process.join()
    if row is not None:
        return row
    if process.exitcode == -9:
        return {"status": "killed"}
    raise RuntimeError(
        f"the process that measures memory of {operation} {setting.name} {provider} ended with {process.exitcode}"
    )


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory", *(f"benchmarks.bench_{n}" for n in operations.OPERATIONS)])
    return context


def _measure_here(sender: Connection, name: str, provider: str, setting: Setting, precision: str, threads: int) -> None:
    """The child: must be a fresh process. Linux only (reads /proc)."""
    torch.set_num_threads(threads)
    operation = operations.load(name)
    try:
        operation.prepare(provider, operation.tiny, precision).run()
        gc.collect()
        before = _own_status("VmRSS")
        reset = _reset_high_water_mark()
        operation.prepare(provider, setting, precision).run()
        peak = _own_status("VmHWM")
    except Unavailable as reason:
        sender.send({"status": "unavailable", "reason": str(reason)})
        return
    except Exception as error:
        sender.send({"status": "failed", "reason": one_line(error)})
        return
    sender.send(
        {
            "status": "measured",
            "peak_bytes": peak - before,
            "interpreter_bytes": before,
            "high_water_mark_reset": reset,
        }
    )


def _open_blas(device: torch.device, dtype: torch.dtype) -> None:
    """A product before anything is counted: the first one of a process takes a workspace that stays."""
    x = torch.ones(64, 64, device=device, dtype=dtype)
    torch.mm(x, x)


def _measure_on_gpu(name: str, provider: str, setting: Setting, precision: str, device: str) -> dict:
    operation = operations.load(name)
    _open_blas(torch.device(device), operations.PRECISIONS[precision])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        ready = operation.prepare(provider, setting, precision, device)
        with ready.mode():
            outputs = ready.form.forward()
            if ready.differentiates:
                ready.gradients(outputs[0])
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return {"status": "out of memory", "available_bytes": available_bytes(device)}
    except Unavailable as reason:
        return {"status": "unavailable", "reason": str(reason)}
    except Exception as error:
        return {"status": "failed", "reason": one_line(error)}
    return {"status": "measured", "peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


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
