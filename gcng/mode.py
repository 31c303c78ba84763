"""The reference switch: which definition the ops compute with.

Owns the one run-time switch of gcng. Everything else (device, budget, dtype) is decided from the arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Switch(threading.local):
    # A thread-local attribute and not a ContextVar: Dynamo can trace and guard it.
    reference = False


_switch = _Switch()


@contextmanager
def reference_mode() -> Iterator[None]:
    """Route every op through the dense definition in :mod:`gcng.reference`, in this thread.

    For debugging and comparison: memory grows with N * N * D, and autograd (double backward included) is
    torch's own. Nests.

    Example:
        >>> with gcng.reference_mode():
        ...     loss = criterion(embeddings, labels)
    """
    before = _switch.reference
    _switch.reference = True
    try:
        yield
    finally:
        _switch.reference = before


def in_reference_mode() -> bool:
    """Whether the caller runs inside :func:`reference_mode`."""
    return _switch.reference
