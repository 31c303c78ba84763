"""From the arguments of a command to overrides of the configuration."""

from __future__ import annotations

import argparse


def all_overrides(arguments: argparse.Namespace) -> list[str]:
    """``--section.key``, ``--set`` and the short forms, in this order: the short forms win."""
    overrides = list(arguments.overrides)
    for name, key in (("seed", "run.seed"), ("device", "run.device"), ("output", "run.output")):
        value = getattr(arguments, name, None)
        if value is not None and not (name == "output" and arguments.command != "train"):
            overrides.append(f"{key}={value}")
    return overrides
