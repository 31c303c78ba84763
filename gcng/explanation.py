"""What runs on which device, and why not more: ``gcng.explain()``."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

from gcng._version import __version__
from gcng.memory import available_memory, default_budget, format_bytes
from gcng.mode import in_reference_mode

OPS = (
    "correlation", "attention", "messages", "edges", "gates", "synthesis", "class_cross_entropy", "retrieval",
)  # fmt: skip


def explain() -> str:
    """A text of a few lines: versions, devices, the path that each op takes on them and the reason.

    Never initializes CUDA beyond asking whether a device is there.
    """
    has_cuda = torch.version.cuda is not None
    devices = torch.cuda.device_count() if has_cuda else 0
    triton = "installed" if importlib.util.find_spec("triton") else "not installed"
    blocked = "blocked torch path: no kernel for this device is part of this version"
    if in_reference_mode():
        blocked = "dense reference: gcng.reference_mode() is on"
    budget = default_budget(available_memory())
    lines = [
        f"gcng {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads; default memory budget {format_bytes(budget)}",
        *(f"  {op}: {blocked}" for op in OPS),
    ]
    if devices:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(devices))
        lines += [f"cuda: {names}", *(f"  {op}: {blocked}" for op in OPS)]
    else:
        reason = "no device is visible" if has_cuda else f"torch {torch.__version__} was built without CUDA"
        lines.append(f"cuda: not available, {reason}")
    lines += [
        f"triton: {triton}; no Triton kernel is part of this version",
        "C++/CUDA extension: none is part of this version, nothing to build",
    ]
    return "\n".join(lines)
