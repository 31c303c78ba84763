"""Peak memory of a part of a process: the kernel's high-water mark above the resident set at the start."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts when it is made. ``peak_bytes()`` is None where the system does not tell (not Linux).

    What runs inside `aside` does not count, where the kernel lets a process reset its mark.
    """

    def __init__(self) -> None:
        _give_back()
        self.start = _status_bytes("VmRSS")
        self.reset_permitted = _reset_mark()
        self._peak = self.start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the memory that the body takes, and gives back, out of the measurement."""
        self._note()
        yield
        _give_back()
        _reset_mark()

    def peak_bytes(self) -> int | None:
        """Largest resident set so far, above the one at the start."""
        self._note()
        return None if self.start is None else self._peak - self.start

    def _note(self) -> None:
        mark = _status_bytes("VmHWM")
        if mark is not None:
            self._peak = max(self._peak, mark)


def _give_back() -> None:
    """Return freed memory to the system: what the C library holds back would hide what comes next."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int | None:
    if not STATUS.exists():
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return None if found is None else int(found.group(1)) * 1024


def _reset_mark() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True
