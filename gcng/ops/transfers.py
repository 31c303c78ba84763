"""What goes from the host to a GPU, without a wait and kept for as long as a CUDA graph may read it, and comes back."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

KEPT = 16  # keys of :func:`kept_on_device`


def capturing(device: torch.device) -> bool:
    """Whether what is called on a device now is recorded into a CUDA graph; not what is traced, which runs later."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def sent(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``x.to(device, dtype)``; a copy from the host to a GPU is queued behind the work there, and nobody waits for it.

    Raises:
        RuntimeError: a CUDA graph is being captured, whose replays would read host memory that is long gone.
    """
    if device.type != "cuda" or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.to(device, dtype)
    x = x if dtype is None else x.to(dtype=dtype)
    pinned = x.is_pinned()
    if not pinned and capturing(device):
        raise RuntimeError(
            "gcng: a CUDA graph captures no copy from the host; before the capture, run the step once with these "
            "classes, and pass labels and mix on the GPU and a gcng.BatchLayout beside them"
        )
    if pinned:
        return x.to(device, non_blocking=True)
    with torch.cuda.device(device):  # pinned under another one, memory would open a context there
        return x.pin_memory().to(device, non_blocking=True)


def fetched(x: Tensor) -> Tensor:
    """``x.cpu()``: waits once for a GPU. As it is where there is nothing to read yet, in a trace or without numbers."""
    return x if torch.compiler.is_compiling() or x.is_meta else x.cpu()


def kept_on_device(make: Callable[[tuple[int, ...], torch.device], T]) -> Callable[[tuple[int, ...], torch.device], T]:
    """Decorator for ``make(key, device)``, which puts a tuple with tensors on a device: the last keys' are kept.

    An op of a training step finds what the one before it has put there, and a CUDA graph captures no copy from the
    host. What a graph has read stays for ever, as its replays read it again. A stream that did not make the tensors
    waits for them.
    """
    lock = threading.Lock()  # autograd runs a backward on a GPU in a thread of its own
    kept: OrderedDict[Any, Shared[T]] = OrderedDict()
    captured: dict[Any, Shared[T]] = {}

    @functools.wraps(make)
    def find(key: tuple[int, ...], device: torch.device) -> T:
        place = key, device
        with lock:
            entry = captured.get(place) or kept.get(place)
            if entry is None:
                with torch.inference_mode(False):  # a training may find what an evaluation has made
                    entry = kept[place] = Shared(make(key, device), device)
            elif place in kept:
                kept.move_to_end(place)
            if capturing(device):
                captured[place] = entry
            while len(kept) > KEPT:
                kept.popitem(last=False)
            return entry.tensors()

    return find


class Shared(Generic[T]):
    """A tuple with tensors just put on a device, for whatever stream asks for it."""

    def __init__(self, made: T, device: torch.device) -> None:
        self._made, self._device, self._stream = made, device, None
        if device.type == "cuda" and not torch.compiler.is_compiling():
            self._stream, self._event = torch.cuda.current_stream(device), torch.cuda.Event()
            self._event.record(self._stream)

    def tensors(self) -> T:
        """The tuple; the current stream waits for what made it, and its memory is not used again before that stream.

        Not while a CUDA graph is captured, which an event from outside would end: whoever captures has synchronized.
        """
        if self._stream is None or capturing(self._device):
            return self._made
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_event(self._event)
            for x in self._made:
                if isinstance(x, Tensor) and x.is_cuda:  # of a layout the class starts stay on the host
                    x.record_stream(stream)
        return self._made
