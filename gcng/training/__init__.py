"""The thin training wrapper: one documented step, and a trainer with crash-safe checkpoints around it.

Owns epochs, files and the update order. Losses and ops know nothing of it. Names are loaded on first use, so
that reading a configuration imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "CheckpointError": "errors",
    "CheckpointFolder": "checkpoint",
    "Config": "config",
    "ConfigError": "errors",
    "DivergedError": "errors",
    "Interrupted": "errors",
    "Optimizers": "step",
    "RunData": "datasets",
    "RunResult": "trainer",
    "StepTerms": "step",
    "Trainer": "trainer",
    "build_data": "datasets",
    "build_optimizers": "optimization",
    "build_schedulers": "optimization",
    "dry_run": "runs",
    "embed_dataset": "embedding",
    "evaluate": "embedding",
    "fit": "runs",
    "load_checkpoint": "checkpoint",
    "load_config": "config_io",
    "load_extractor": "embedding",
    "read_records": "records",
    "save_checkpoint": "checkpoint",
    "train_step": "step",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
