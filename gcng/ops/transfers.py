"""What goes from the host to a GPU, without a wait and kept for as long as a CUDA graph may read it, and comes back."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

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
    return (x if pinned else x.pin_memory()).to(device, non_blocking=True)


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
    kept: OrderedDict[Any, tuple[T, Any]] = OrderedDict()
    captured: dict[Any, tuple[T, Any]] = {}

    @functools.wraps(make)
    def find(key: tuple[int, ...], device: torch.device) -> T:
        place = key, device
        with lock:
            entry = captured.get(place) or kept.get(place)
            if entry is None:
                with torch.inference_mode(False):  # a training may find what an evaluation has made
                    made = make(key, device)
                entry = kept[place] = made, _Made(device) if device.type == "cuda" else None
            elif place in kept:
                kept.move_to_end(place)
            if capturing(device):
                captured[place] = entry
            elif entry[1] is not None:
                entry[1].wait(entry[0])
            while len(kept) > KEPT:
                kept.popitem(last=False)
        return entry[0]

    return find


class _Made:
    """When and where tensors were made on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.current_stream(device)
        self.event = torch.cuda.Event()
        self.event.record(self.stream)

    def wait(self, tensors: Any) -> None:
        """Let the current stream read the tensors: behind what made them, and before their memory is used again."""
        stream = torch.cuda.current_stream(self.device)
        if stream == self.stream:
            return
        stream.wait_event(self.event)
        for x in tensors:
            if isinstance(x, Tensor):
                x.record_stream(stream)
