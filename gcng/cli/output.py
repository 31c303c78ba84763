"""Printing results: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from gcng.training.records import json_ready


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print named values to stdout: one JSON object, or aligned lines."""
    if as_json:
        print(json.dumps(json_ready(result), indent=2, allow_nan=False))
        return
    width = max((len(str(name)) for name in result), default=0)
    for name, value in result.items():
        print(f"{name:<{width}}  {format_value(value)}")


def format_value(value: Any) -> str:
    """A value in a table: four significant places for numbers with a point, nested values on one line."""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {format_value(item)}" for name, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value)) or "none"
    return "none" if value is None else str(value)


def note(text: str) -> None:
    """A line for the reader, on stderr."""
    print(text, file=sys.stderr, flush=True)
