"""What a benchmark of an op consists of: inputs, providers by name, the work it takes, and how one call is run.

Owns the one setup that speed, memory and accuracy share: :meth:`Operation.prepare` makes a provider ready on given
inputs, :class:`Ready` runs it, forward and backward timed apart, and hands out the arrays that the closeness gate sees.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.settings import Setting

T, R = TypeVar("T"), TypeVar("R")

SEED = 20250101
CACHE_BYTES = 2**28  # written before a timed call on a GPU: more than any L2
OPERATIONS = (
    "iteration",
    "correlation",
    "attention",
    "messages",
    "edges",
    "gates",
    "synthesis",
    "class_cross_entropy",
    "retrieval",
)
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.float32,  # with products in bfloat16
}


class Unavailable(Exception):
    """A provider that cannot run here: its package is missing, or it lacks the device, the dtype or the size."""


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations and bytes of one pass: what no formulation leaves out."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call by name; ``leaves`` are differentiated. Floating tensors are rounded to ``dtype``."""

    setting: Setting
    tensors: Mapping[str, Tensor]
    leaves: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Copies in a dtype on a device, the leaves asking for gradients."""
        moved = {
            name: x.detach().to(device, dtype if x.is_floating_point() else x.dtype, copy=True)
            for name, x in self.tensors.items()
        }
        for name in self.leaves:
            moved[name].requires_grad_()
        return Inputs(self.setting, moved, self.leaves)


@dataclass(frozen=True)
class Form:
    """One provider on given inputs.

    Args:
        forward: returns the outputs, the first of which is differentiated.
        canonical: first output -> the layout that all providers share. upstream: a gradient in that layout -> one of
            the provider's own output.
        leaves: what is differentiated where that is not the inputs themselves (another layout of them), by name;
            fold: gradient of such a leaf -> that of the input, by name.
        backward: whether there is a backward to time. arrays: replaces what the gate compares.
        compared: False where it computes something else and is shown for scale.
        mode: context of everything, for example the dense definition.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    canonical: Callable[[Tensor], Tensor] = lambda x: x
    upstream: Callable[[Tensor], Tensor] = lambda x: x
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    fold: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    backward: bool = True
    arrays: Callable[[], dict[str, Tensor]] | None = None
    compared: bool = True
    mode: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


Build = Callable[[Inputs], Form]


@dataclass(frozen=True)
class Operation:
    """An op under measurement; every ``bench_<op>.py`` holds one as ``OPERATION``.

    Args:
        name: of the op. make_inputs: float64 tensors of a setting on the CPU, from a fixed seed.
        providers: name -> build; the first is the baseline of the gate. truth: provider that runs in float64.
        work: useful operations and bytes of each pass, (setting, bytes of a number) -> {"forward": Work, ...}.
        dense_providers: those whose memory is predicted, and which are not run where it does not fit; growth: what
            their memory is proportional to.
        small: what ``pytest benchmarks`` measures; tiny: for smoke runs. caps by precision, factors: of the
            gate, where not the usual ones. arrays_skipped: arrays that are zero in theory.
    """

    name: str
    make_inputs: Callable[[Setting], Inputs]
    providers: Mapping[str, Build]
    work: Callable[[Setting, int], dict[str, Work]]
    truth: tuple[str, ...]
    dense_providers: frozenset[str] = frozenset()
    growth: Callable[[Setting], float] = lambda setting: setting.samples**2 * setting.embedding_size
    small: Setting = Setting(1, 64, 40)
    tiny: Setting = Setting(1, 16, 8)
    caps: Mapping[str, float] | None = None
    factors: tuple[float, float] = (2.0, 3.0)
    arrays_skipped: frozenset[str] = frozenset()

    def prepare(
        self,
        provider: str,
        setting: Setting,
        precision: str = "float32",
        device: torch.device | str = "cpu",
        *,
        rounded_to: str | None = None,
    ) -> Ready:
        """A provider on the inputs of a setting.

        Args:
            precision: of PRECISIONS. rounded_to: precision that the inputs are rounded to first, for a truth that
                sees the numbers of another precision.

        Raises:
            Unavailable: it cannot run here. ValueError: an unknown name.
        """
        if provider not in self.providers:
            raise ValueError(f"{self.name}: provider is {provider!r}; it must be one of {', '.join(self.providers)}")
        if precision not in PRECISIONS:
            raise ValueError(f"{self.name}: precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
        inputs = drawn(self.make_inputs, setting, torch.device(device))
        if rounded_to is not None:
            inputs = inputs.to(PRECISIONS[rounded_to], torch.device("cpu"))
        inputs = inputs.to(PRECISIONS[precision], torch.device(device))
        with precision_mode(precision, torch.device(device)):
            return Ready(self, provider, precision, inputs, self.providers[provider](inputs))


@dataclass
class Ready:
    """A provider that can be called."""

    operation: Operation
    provider: str
    precision: str
    inputs: Inputs
    form: Form
    _upstream: Tensor | None = field(default=None, repr=False)

    @property
    def differentiates(self) -> bool:
        """Whether :meth:`run` has a backward."""
        return self.form.backward and bool(self.inputs.leaves)

    def run(self) -> dict[str, float]:
        """One call: seconds of "forward", and of "backward" and "both" where there is a backward."""
        with self.mode():
            clock = Clock(self.device)
            clock.mark()
            outputs = self.form.forward()
            clock.mark()
            if self.differentiates:
                self.gradients(outputs[0])
                clock.mark()
            return clock.passes()

    def arrays(self) -> dict[str, Tensor]:
        """Outputs and gradients in the common layout, for the gate; also a warm-up."""
        with self.mode():
            if self.form.arrays is not None:
                return self.form.arrays()
            outputs = self.form.forward()
            found = {"output": self.form.canonical(outputs[0]).detach()}
            found |= {f"output {i}": x.detach() for i, x in enumerate(outputs[1:], 1)}
            if self.differentiates:
                for name, grad in zip(self.inputs.leaves, self.gradients(outputs[0]), strict=True):
                    found[f"grad {name}"] = self.form.fold.get(name, lambda x: x)(grad.detach())
            skipped = self.operation.arrays_skipped
            return {name: x for name, x in found.items() if name not in skipped}

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        with precision_mode(self.precision, self.device), self.form.mode():
            yield

    @property
    def device(self) -> torch.device:
        """Where the inputs lie."""
        return next(iter(self.inputs.tensors.values())).device

    def gradients(self, output: Tensor) -> tuple[Tensor, ...]:
        if self._upstream is None:
            shape = self.form.canonical(output.detach()).shape
            grad = drawn(upstream_gradient, shape, output.device)
            self._upstream = self.form.upstream(grad.to(output.device, output.dtype))
        leaves = [self.form.leaves.get(name, self.inputs[name]) for name in self.inputs.leaves]
        return torch.autograd.grad(output, leaves, self._upstream)


class Clock:
    """Marks between passes: wall time on the CPU, events and a cold cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []
        if device.type == "cuda":
            torch.empty(CACHE_BYTES, dtype=torch.int8, device=device).zero_()
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        """The end of a pass and the start of the next."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def passes(self) -> dict[str, float]:
        """Seconds by pass."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            spans = [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            spans = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        if len(spans) == 1:
            return {"forward": spans[0]}
        return {"forward": spans[0], "backward": spans[1], "both": sum(spans)}


@contextlib.contextmanager
def precision_mode(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16, or products of float32 in tf32, where the precision asks for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "autocast"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load(name: str) -> Operation:
    """The operation of ``bench_<name>.py``."""
    if name not in OPERATIONS:
        raise ValueError(f"operation is {name!r}; it must be one of {', '.join(OPERATIONS)}")
    return importlib.import_module(f"benchmarks.bench_{name}").OPERATION


def passes_of(ready: Ready) -> tuple[str, ...]:
    """Names of the passes that a call is timed by."""
    return ("forward", "backward", "both") if ready.differentiates else ("forward",)


def drawn(draw: Callable[[T], R], key: T, device: torch.device) -> R:
    """``draw(key)``; the same object as before where a GPU is next: there, drawing takes longer than what is measured.

    On a CPU, whose memory is measured, nothing is kept.
    """
    return _last_draws(draw, key) if device.type == "cuda" else draw(key)


@functools.lru_cache(maxsize=2)  # the inputs of a setting and the gradient that goes with them
def _last_draws(draw: Callable[[T], R], key: T) -> R:
    return draw(key)


def upstream_gradient(shape: tuple[int, ...]) -> Tensor:
    """What a backward starts from: values that every dtype holds, so that all providers see the same."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal float64 numbers times a scale, from a seed."""
    generator = torch.Generator().manual_seed(SEED + seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def batch_labels(setting: Setting) -> Tensor:
    """(N,) labels in slot order: M classes, K times."""
    return torch.arange(setting.batch_classes).repeat(setting.samples_per_class)
