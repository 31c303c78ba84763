"""gcng: globally correlation-aware hard negative generation at scale.

``import gcng`` loads nothing but this file; torch comes with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

from gcng._version import __version__

_MODULES = (
    "cli", "data", "evaluation", "functional", "kernels", "losses", "memory", "models", "nn", "ops", "recipes",
    "reference", "training",
)  # fmt: skip
_NAMES = {
    "BatchLayout": "gcng.batch_layout",
    "empty_cache": "gcng.ops.recycled",
    "estimate_memory": "gcng.memory",
    "explain": "gcng.explanation",
    "reference_mode": "gcng.mode",
}

__all__ = ["BatchLayout", "__version__", "empty_cache", "estimate_memory", "explain", "reference_mode", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"gcng.{name}")
    raise AttributeError(f"module 'gcng' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
