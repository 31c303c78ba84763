"""Ctrl-C and SIGTERM: finish the step, save, leave; a second signal leaves at once.

Owns the signal handlers for the time of a run and puts the earlier ones back.
"""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopOnSignal:
    """Within the block, the first SIGINT or SIGTERM sets ``requested``; the second ends the process (code
    130).

    Outside the main thread, where Python allows no handlers, ``requested`` can still be set by
    :meth:`request`.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def request(self) -> None:
        """Ask for a stop after the running step."""
        self.requested = True

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(130)  # the user insists; nothing may delay it, not even cleanup
        self.requested = True


@contextmanager
def children_spared() -> Iterator[None]:
    """Processes started inside the block do not get SIGINT and SIGTERM; this one gets them after it.

    A terminal or a job scheduler signals the whole process group. Loader processes that died of it would break
    the running step off; so only this process reacts, and ends them when it leaves, by a signal that no process
    can block. The SIGTERM of ``multiprocessing`` would not end one whose iterator an exception still holds, and
    the exit would wait for it forever.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where signals reach no other process
        yield
        return
    earlier = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopOnSignal.signals)  # children inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in set(multiprocessing.active_children()) - earlier:
            # Those of a priority run before multiprocessing terminates and joins what is left.
            multiprocessing.util.Finalize(process, _end, (process._popen,), exitpriority=10)


def _end(process: Any) -> None:
    """Kill what still runs at the exit."""
    if process.poll() is not None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # that of torch raises where a loader process was killed
    process.kill()
