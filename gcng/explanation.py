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
from gcng.ops import native
from gcng.ops.triton_path import triton_cause

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

    Never initializes CUDA beyond asking whether a device is there.
    """
    has_cuda = torch.version.cuda is not None
    devices = torch.cuda.device_count() if has_cuda else 0
    budget = default_budget(available_memory())
    lines = [
        f"gcng {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads; default memory budget {format_bytes(budget)}",
        *(f"  {op}: {cpu_path(op)}" for op in OPS),
    ]
    if devices:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(devices))
        lines += [f"cuda: {names}", *(f"  {op}: {cuda_path(op)}" for op in OPS)]
    else:
        reason = "no device is visible" if has_cuda else f"torch {torch.__version__} was built without CUDA"
        lines.append(f"cuda: not available, {reason}")
    lines += [f"triton: {triton_cause() or 'usable'}", *extension_lines()]
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


def cuda_path(op: str) -> str:
    """What an op runs on CUDA tensors."""
    if in_reference_mode():
        return "dense reference: gcng.reference_mode() is on"
    if triton_cause():
        return f"blocked torch path, slower: {triton_cause()}"
    if op == "synthesis" and native.cuda_status().path is not None:
        return "CUDA C++ kernels; float64: blocked torch path"
    return "Triton kernels, products in cuBLAS; float64: blocked torch path"


def extension_lines() -> list[str]:
    """One line each for the compiled CPU and CUDA kernels: what is loaded, for which processors, or why nothing is."""
    cpu, cuda = native.cpu_status(), native.cuda_status()
    flags = cpu.flags or "for any processor"
    return [
        f"C++ kernels: {cpu.path}, compiled {flags}" if cpu.path else f"C++ kernels: none; {cpu.cause}",
        f"CUDA C++ kernels: {cuda.path}, compiled for {cuda.flags}" if cuda.path else f"CUDA C++ kernels: {cuda.cause}",
    ]
