"""Where a result was measured: machine, versions, source revision."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict:
    """Processor, cores that this process may use, and memory in bytes."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict:
    """Versions of everything that a number depends on, and the BLAS that torch was built with."""
    import numpy
    import torch

    from gcng._version import __version__

    blas = re.search(
        r"(oneAPI Math Kernel Library|OpenBLAS|Arm Performance Libraries)[^\n]*", torch.__config__.show()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gcng": __version__,
        "blas": blas.group(0).strip() if blas else "unknown",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def revision() -> dict:
    """Commit of the source, whether the measured files differ from it, and the time."""
    changed = _git(
        "status", "--porcelain", "--", "gcng", "csrc", "kernels", "benchmarks", ":!benchmarks/results"
    )
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "modified": bool(changed),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load_average() -> float:
    """Processes that wanted a core during the last minute; far above 0 before a measurement, it spoils it."""
    return os.getloadavg()[0]


def file_name(described: dict) -> str:
    """A file name for results of a machine, e.g. amd-epyc-2-cores.json."""
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
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
