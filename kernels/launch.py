"""How every kernel starts: device guard, empty grids, options that an environment variable cannot change.

Owns the one call into triton (:func:`launch`), what launch tables may depend on (:func:`architecture`,
:func:`input_precision`, and the shapes), and :func:`recorded_launches`, which runs a launcher on meta tensors and
keeps its launches instead of starting them: what is compiled ahead of time is then what ships.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import knobs

# The interpreter has no architecture; it runs the tiles of this one.
INTERPRETER_ARCHITECTURE = 90
MAXIMUM_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Schedule:
    """What the compiler is told beside the tile sizes, which a subclass for each kernel adds."""

    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch that was kept instead of started."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # in the order of the kernel's parameters
    schedule: Schedule


@dataclass
class Recording:
    """What :func:`recorded_launches` yields: the pretended machine, and the launches in their order."""

    architecture: int
    tf32: bool
    launches: list[RecordedLaunch] = field(default_factory=list)


@dataclass(frozen=True)
class CompilationCase:
    """One row of a module's ``compilation_cases()``: a call of a launcher on meta tensors.

    Args:
        name: unique within the module; says dtype and shape.
        call: runs the launcher, without arguments. It may run several times.
        tf32: whether float32 operands may be multiplied in tf32, as the torch setting would say.
        without_tensor_cores: names of kernels that need not multiply by the fastest instructions of the
            architecture, fed by asynchronous copies: tiles or rows too small for them, on purpose.
        spills: kernel name -> local memory instructions (LDL + STL) accepted outside its innermost product loop,
            where it needs more than tests/ahead_of_time.py lets pass.
    """

    name: str
    call: Callable[[], Any]
    tf32: bool = False
    without_tensor_cores: frozenset[str] = frozenset()
    spills: dict[str, int] = field(default_factory=dict)


_recording: Recording | None = None


@contextlib.contextmanager
def recorded_launches(architecture: int, *, tf32: bool = False) -> Iterator[Recording]:
    """Keep launches instead of starting them, as if on a GPU of ``architecture`` (90 for sm_90)."""
    global _recording
    previous, _recording = _recording, Recording(architecture, tf32)
    try:
        yield _recording
    finally:
        _recording = previous


def unspecialized(numbers: Sequence[str], tensors: Sequence[str]) -> dict[str, Sequence[str]]:
    """Options of ``triton.jit`` for parameters that change from tile to tile or from batch to batch.

    Compiling for the divisors of such numbers, and for the alignment of tensors that may start in the middle of another
    one, would compile a kernel many times. Those tensors should hold one number for a pair or a row: rows of channels
    are read and written 16 bytes at a time where they are aligned. Names that a kernel does not have are ignored.
    """
    return {"do_not_specialize": numbers, "do_not_specialize_on_alignment": tensors}


def is_interpreted() -> bool:
    """Whether kernels run in triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return bool(knobs.runtime.interpret)


def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90: what a launch table may know about the machine."""
    if _recording is not None:
        return _recording.architecture
    if device.type == "cpu":
        return INTERPRETER_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: "tf32" for float32 where torch's own products may use it, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    if _recording is not None:
        return "tf32" if _recording.tf32 else "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _device_of(name: str, arguments: Iterable[Any]) -> torch.device:
    devices = [x.device for x in arguments if isinstance(x, Tensor)]
    if not devices or devices.count(devices[0]) != len(devices):
        found = sorted({str(device) for device in devices})
        raise ValueError(f"{name}: the tensors of a launch must share one device, got {found}")
    return devices[0]


def _guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one; nothing where it is, since a small batch waits for every launch."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, schedule: Schedule, **constants: Any) -> None:
    """Start one kernel on the device of its tensors.

    Args:
        kernel: a ``triton.jit`` function. grid: one to three extents; one of zero starts nothing. Extents that follow
            the data belong into the first.
        arguments: the parameters that are no constexpr, in their order; None for an absent tensor.
        schedule: warps and stages. constants: the constexpr parameters.

    Raises:
        ValueError: extents beyond what a GPU can start, or tensors on several devices.
        RuntimeError: CPU tensors outside the interpreter.
    """
    if 0 in grid:
        return
    name = kernel.fn.__name__
    if any(extent > limit for extent, limit in zip(grid, MAXIMUM_GRID, strict=False)):
        raise ValueError(f"{name}: a grid of {grid} is beyond {MAXIMUM_GRID}; split the call")
    device = _device_of(name, arguments)
    if _recording is not None:
        runtime = [parameter for parameter in kernel.arg_names if parameter not in constants]
        named = dict(zip(runtime, arguments, strict=True)) | constants
        ordered = {parameter: named[parameter] for parameter in kernel.arg_names}
        _recording.launches.append(RecordedLaunch(kernel, grid, ordered, schedule))
        return
    if device.type == "cpu" and not is_interpreted():
        raise RuntimeError(f"{name}: expected tensors on a GPU, got {device}; set TRITON_INTERPRET=1 to interpret it")
    options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages, "enable_fp_fusion": True}
    with _guard(device):
        kernel[grid](*arguments, **constants, **options)
