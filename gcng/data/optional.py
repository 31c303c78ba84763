"""Optional packages: imported where they are used, with a one-line hint when they are absent."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, install: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted module name, e.g. ``"PIL.Image"``.
        install: what ``pip install`` needs to be told, e.g. ``"pillow"``.
        purpose: who needs it, the subject of the error message.

    Raises:
        ModuleNotFoundError: the package is absent; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, something that it needs is not: its own message says more
        raise ModuleNotFoundError(
            f"{purpose} needs the package {install}, which is not installed: pip install {install}",
            name=error.name,
        ) from error
