"""Where a result was measured: machine, versions, source revision."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

PEERS = ("triton", "pytorch-metric-learning", "cut-cross-entropy", "liger-kernel", "faiss-cpu")
ROOT = Path(__file__).resolve().parents[1]
REVISION = ROOT / "REVISION"
# What decides a number; what is generated from numbers, or says something about them, does not.
MEASURED = ("gcng", "csrc", "kernels", "benchmarks", ":!benchmarks/results", ":!benchmarks/notes.toml")
BUSY = 0.5  # load average above which the machine is not idle


def machine(device: str = "cpu") -> dict:
    """Processor, cores that this process may use, memory in bytes; the GPU where that is measured."""
    found = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "capability": capability}
    return found


def versions() -> dict:
    """Versions of everything that a number depends on, and the BLAS that torch was built with."""
    import numpy
    import torch

    from gcng._version import __version__

    blas = re.search(r"(oneAPI Math Kernel Library|OpenBLAS|Arm Performance Libraries)[^\n]*", torch.__config__.show())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gcng": __version__,
        "blas": blas.group(0).strip() if blas else "unknown",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "none",
        **{name: _version(name) for name in PEERS},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def changed_files() -> list[str]:
    """Files that a number depends on and that differ from the commit, new ones included."""
    lines = _git("status", "--porcelain", "--untracked-files=all", "--", *MEASURED).splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


@functools.cache
def _source() -> dict:
    """Taken once: what a process has imported does not follow later commits."""
    commit = _git("rev-parse", "HEAD")
    if not commit and REVISION.exists():  # a copy without its repository: `git rev-parse HEAD > REVISION` beside it
        return {"commit": REVISION.read_text(encoding="utf-8").strip(), "modified": None}
    return {"commit": commit or "unknown", "modified": bool(changed_files()) if commit else None}


def revision() -> dict:
    """Commit of the source as this process first asked, whether the measured files differed from it, and the time."""
    return {**_source(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def is_of_this_source(stamped: dict) -> bool:
    """Whether what has this stamp is of this source; False where nobody knows, with changes or without a commit."""
    here = revision()
    known = here["commit"] != "unknown" and here["modified"] is False and stamped.get("modified") is False
    return known and stamped.get("commit") == here["commit"]


def gpu_error() -> str:
    """What a GPU says after an error, in one line: nothing where it can go on, the cause where this process cannot."""
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def load_average() -> float:
    """Processes that wanted a core during the last minute; far above 0 before a measurement, it spoils it."""
    return os.getloadavg()[0]


def file_name(described: dict) -> str:
    """A file name for results of a machine, e.g. amd-epyc-2-cores.json."""
    if "gpu" in described:
        return "-".join(re.findall(r"[a-z0-9]+", described["gpu"].lower())) + ".json"
    model = re.sub(r"\([^)]*\)|CPU|@.*|Processor", " ", described["cpu"])
    words = re.findall(r"[a-z0-9]+", model.lower())
    return "-".join([*words, str(described["cores"]), "cores"]) + ".json"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is not installed, as beside an unpacked archive."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
