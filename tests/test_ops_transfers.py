"""What goes from the host to a GPU: no wait, no copy in a CUDA graph, nothing let go that a graph reads."""

from __future__ import annotations

import contextlib

import pytest
import torch

import gcng
from gcng.ops import transfers
from gcng.ops.layout import class_major_beside
from gcng.ops.transfers import KEPT, kept_on_device, sent

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Stream:
    def __init__(self):
        self.waited_for = []

    def wait_event(self, event):
        self.waited_for.append(event)


class Event:
    def record(self, stream):
        self.stream = stream


class Recorded(torch.Tensor):
    """A tensor on the CPU that stands for one on a GPU."""

    is_cuda = True

    def record_stream(self, stream):
        self.__dict__.setdefault("streams", []).append(stream)


class entered(contextlib.nullcontext):
    """Stands for torch.cuda.device: which one was current last."""

    last = None

    def __enter__(self):
        entered.last = self.enter_result


@pytest.fixture
def gpu(monkeypatch):
    """The functions of torch.cuda that are asked, without a GPU."""

    class Switch:
        capturing, stream = False, Stream()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Switch.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Switch.stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", entered)
    return Switch


@pytest.fixture
def copies(monkeypatch):
    """Copies to a GPU, as (pinned, non_blocking); each gives what it was given."""
    made, to, pinned = [], torch.Tensor.to, set()

    def recorded(self, *arguments, **named):
        if arguments and arguments[0] == GPU:
            made.append((id(self) in pinned, named.get("non_blocking", False)))
            return self
        return to(self, *arguments, **named)

    def pin(self):
        copy = self.clone()
        pinned.add(id(copy))
        made.append(copy)  # keeps the id
        return copy

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: id(self) in pinned)
    return lambda: [one for one in made if isinstance(one, tuple)]


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for(gpu, copies):
    x = torch.arange(5)
    assert sent(x, GPU, torch.float64).dtype == torch.float64
    assert copies() == [(True, True)]
    assert entered.last == GPU  # pinned under another device, memory would open a context there


def test_between_other_devices_it_is_the_usual_copy(copies):
    x = torch.arange(5)
    assert sent(x, CPU) is x
    assert sent(x, CPU, torch.float32).dtype == torch.float32
    assert sent(x, torch.device("meta")).is_meta
    assert copies() == []


def test_a_capture_refuses_a_copy_from_memory_that_nobody_keeps(gpu, copies):
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="captures no copy from the host; before the capture, run the step once"):
        sent(torch.arange(5), GPU)
    assert copies() == []
    pinned = torch.arange(5).pin_memory()
    sent(pinned, GPU)
    assert copies() == [(True, True)]
    with pytest.raises(RuntimeError, match="captures no copy from the host"):
        sent(pinned, GPU, torch.float32)  # its rounded copy is not the caller's


def test_a_pinned_tensor_of_another_dtype_is_pinned_again(gpu, copies):
    sent(torch.arange(5).pin_memory(), GPU, torch.float32)
    assert copies() == [(True, True)]


def counted():
    calls = []

    @kept_on_device
    def tensors(key, device):
        calls.append(key)
        return torch.tensor(key).as_subclass(Recorded), "no tensor"

    return tensors, calls


@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_keys_seen_last_are_kept_and_the_oldest_is_let_go(gpu, device):
    tensors, calls = counted()
    first = tensors((0,), device)
    for key in range(1, KEPT):
        tensors((key,), device)
    assert tensors((0,), device) is first and len(calls) == KEPT
    tensors((KEPT,), device)  # 1 goes, 0 was asked for later
    assert tensors((0,), device) is first and len(calls) == KEPT + 1
    assert tensors((1,), device) and len(calls) == KEPT + 2


def test_what_a_cuda_graph_has_read_is_never_let_go(gpu):
    tensors, calls = counted()
    first = tensors((0,), GPU)
    gpu.capturing = True
    assert tensors((0,), GPU) is first
    gpu.capturing = False
    for key in range(1, 3 * KEPT):
        tensors((key,), GPU)
    made = len(calls)
    assert tensors((0,), GPU) is first and len(calls) == made


def test_another_stream_waits_for_the_one_that_made_it(gpu):
    tensors, _ = counted()
    home = gpu.stream
    made = tensors((0,), GPU)
    tensors((0,), GPU)
    assert home.waited_for == [] and not hasattr(made[0], "streams")
    gpu.stream = other = Stream()
    assert tensors((0,), GPU) is made
    assert [event.stream for event in other.waited_for] == [home]
    assert made[0].streams == [other]  # the allocator does not reuse it before this stream has read it
    gpu.capturing, gpu.stream = True, Stream()
    tensors((0,), GPU)  # an event from outside would end the capture; whoever captures has synchronized before
    assert gpu.stream.waited_for == []


def test_a_layout_makes_another_stream_wait(gpu, copies):
    labels = torch.tensor([3, 1, 3, 1])
    batch, home = gcng.BatchLayout(labels), gpu.stream
    first = class_major_beside("test", labels, batch, GPU)
    assert class_major_beside("test", labels, batch, GPU) is first and home.waited_for == []
    gpu.stream = Stream()
    assert class_major_beside("test", labels, batch, GPU) is first  # its class starts, on the host, have no streams
    assert [event.stream for event in gpu.stream.waited_for] == [home]


def test_nothing_of_torch_cuda_is_asked_for_the_cpu(monkeypatch):
    def forbidden(*_):
        raise AssertionError("asked for a GPU")

    for name in ("is_current_stream_capturing", "current_stream", "Event", "is_available"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    tensors, calls = counted()
    assert tensors((3,), CPU) is tensors((3,), CPU) and calls == [(3,)]
    assert not transfers.capturing(CPU)
