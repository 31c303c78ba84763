"""What runs on which device, and why not more: ``gcng.explain()``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform

import torch

from gcng._version import __version__
from gcng.memory import available_memory, default_budget, format_bytes
from gcng.mode import in_reference_mode
from gcng.ops import dispatch, native
from gcng.ops.triton_path import device_cause, runs_on, triton_cause

OPS = (
    "correlation", "attention", "messages", "edges", "gates", "synthesis", "class_cross_entropy", "retrieval",
)  # fmt: skip
# C++ kernels that do not carry the name of the op that they serve, by how their names start.
SERVED = {
    "topk_": ("correlation", "retrieval"),
    "edge_": ("edges", "messages", "gates"),
    "pair_": ("edges", "messages", "gates"),
    "gate_": ("gates",),
}


def explain() -> str:
    """A text of a few lines: versions, devices, the path that each op takes on them and the reason.

    Asks CUDA devices for their names and compute capabilities, and allocates nothing on them.
    """
    has_cuda = torch.version.cuda is not None
    devices = torch.cuda.device_count() if has_cuda else 0
    budget = default_budget(available_memory())
    lines = [
        f"gcng {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads; default memory budget {format_bytes(budget)}",
        *(f"  {op}: {cpu_path(op)}" for op in OPS),
    ]
    alike: dict[tuple[str, ...], list[str]] = {}
    for index in range(devices):
        alike.setdefault(tuple(cuda_path(op, index) for op in OPS), []).append(torch.cuda.get_device_name(index))
    for paths, names in alike.items():
        lines += [f"cuda: {', '.join(names)}", *(f"  {op}: {path}" for op, path in zip(OPS, paths, strict=True))]
    if not devices:
        reason = "no device is visible" if has_cuda else f"torch {torch.__version__} was built without CUDA"
        lines.append(f"cuda: not available, {reason}")
    extension = extension_in_use()
    lines += [f"triton: {triton_cause() or 'usable'}"]
    lines += [f"C++ kernels: {extension['cpu']}", f"CUDA C++ kernels: {extension['cuda']}"]
    return "\n".join(lines)


def cpu_path(op: str) -> str:
    """What an op runs on the CPU: C++ kernels carry its name, or serve it under another."""
    if in_reference_mode():
        return "dense reference: gcng.reference_mode() is on"
    importlib.import_module("gcng.functional")  # its ops declare the kernels that they call
    kernels = []
    for start in (op, *(start for start, served in SERVED.items() if op in served)):
        names = [name for name in native.declared() if name.startswith(start)]
        kernels += names if len(names) < 2 else [f"{start.rstrip('_')}_*"]
    if not kernels:
        return "blocked torch path"
    if native.cpu_status().path is None:
        return f"blocked torch path, slower: the C++ kernels {', '.join(kernels)} are not loaded"
    return f"blocked path with the C++ kernels {', '.join(kernels)}"


def cuda_path(op: str, index: int) -> str:
    """What an op runs on the tensors of a CUDA device, from the functions that the ops ask."""
    if in_reference_mode():
        return "dense reference: gcng.reference_mode() is on"
    if op == "synthesis" and dispatch.cuda_synthesis(index, quiet=True) is dispatch.CUDA_SYNTHESIS:
        return "CUDA C++ kernels; float64: blocked torch path"
    if not runs_on(index, quiet=True):
        return f"blocked torch path, slower: {device_cause(index)}"
    return "Triton kernels, products in cuBLAS; float64: blocked torch path"


def extension_in_use() -> dict[str, str]:
    """What is loaded of the compiled kernels for "cpu" and for "cuda", for which processors, and why not more."""
    cpu = native.cpu_status()
    devices = range(torch.cuda.device_count() if torch.version.cuda is not None else 0)
    cuda = dict.fromkeys(native.cuda_status(index) for index in devices or [None])
    return {
        "cpu": _library(cpu, f"compiled {cpu.flags or 'for any processor'}"),
        "cuda": "; ".join(_library(status, f"compiled for {status.flags}") for status in cuda),
    }


def _library(status: native.Status, built_for: str) -> str:
    if status.path is None:
        return f"none; {status.cause}"
    return f"{status.path}, {built_for}" + (f"; not a better one: {status.skipped}" if status.skipped else "")
