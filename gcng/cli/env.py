"""``gcng env``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from typing import Any

from gcng._version import __version__
from gcng.cli.output import print_result
from gcng.training.errors import EXIT_DONE

PACKAGES = (
    *("torch", "numpy", "triton", "torchvision", "timm", "pillow", "matplotlib", "tensorboard", "pyyaml"),
    *("pytorch-metric-learning", "pytest", "pytest-benchmark"),
)


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and what gcng runs on them."""
    import torch

    import gcng
    from gcng.explanation import extension_in_use

    explanation = gcng.explain()
    result: dict[str, Any] = {
        "gcng": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {
            "built_for": torch.version.cuda or "none",
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "extension": extension_in_use(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("GCNG_")},
        "explain": explanation if arguments.json else "",
    }
    if not arguments.json:
        del result["explain"]
    print_result(result, as_json=arguments.json)
    if not arguments.json:
        print(f"\n{explanation}")
    return EXIT_DONE


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
