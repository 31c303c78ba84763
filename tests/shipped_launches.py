"""The launches that a training step of the criterion starts on a GPU, recorded from the ops themselves.

The criterion runs forward and backward on meta tensors, under a mode that calls the implementation of an op where
torch would call its fake. Every launch is then the one that ships: a kernel, a dtype or a schedule that an op begins
to use is compiled by tests/test_triton_compiles.py without being written down anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gcng
from gcng.kernels.launch import RecordedLaunch, recorded_launches
from gcng.memory import MemoryPlan
from gcng.ops import dispatch
from gcng.ops.triton_path import triton_everywhere

WIDTHS = (64, 128, 256, 384, 512, 768, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Implementations are registered for every backend, fakes for meta: asked for as a CPU tensor would ask.
_ANY_BACKEND = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class Step:
    """One training step.

    Args:
        width: D. dtype: of embeddings and parameters; under ``autocast`` those are float32 and edges have it.
        tf32: whether float32 products may use it. layers: L. samples: K.
        batch: N; kernels for many rows differ from those for few. kept: whether all stashes are, or none.
        ragged: classes of 1 to 8 samples instead of K, and tiles of few pairs. dropout: of the edge layers.
    """

    width: int
    dtype: torch.dtype
    autocast: bool = False
    tf32: bool = False
    layers: int = 1
    batch: int = 96
    samples: int = 2
    kept: bool = True
    ragged: bool = False
    dropout: float = 0.1

    @property
    def labels(self) -> torch.Tensor:
        """Of the samples, (N,) int64."""
        if not self.ragged:
            return torch.arange(self.batch) // self.samples
        counts = torch.tensor((1, 5, 2, 7, 3, 8, 4, 1, 6)).repeat(self.batch)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)[: self.batch]

    def __str__(self) -> str:
        named = f"{str(self.dtype).removeprefix('torch.')} {self.width}"
        return named + " autocast" * self.autocast + " tf32" * self.tf32


class _Implementations(TorchDispatchMode):
    """Runs the implementation of each gcng op on meta tensors; ``narrow``: what autocast makes of a field's base."""

    def __init__(self, narrow: torch.dtype | None) -> None:
        super().__init__()
        self.narrow = narrow

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: Any = None) -> Any:
        if function.namespace != "gcng":
            return function(*arguments, **(options or {}))
        names = [argument.name for argument in function._schema.arguments]
        if self.narrow is not None and "base" in names:
            place = names.index("base")
            arguments = (*arguments[:place], arguments[place].to(self.narrow), *arguments[place + 1 :])
        return function.redispatch(_ANY_BACKEND, *arguments, **(options or {}))


def record(step: Step, architecture: int) -> list[RecordedLaunch]:
    """All launches of the step as on a GPU of ``architecture`` (90 for sm_90)."""
    stored = torch.float32 if step.autocast else step.dtype
    with torch.device("meta"):
        criterion = gcng.losses.GCAHNGLoss(step.width, 1000, step.layers, dropout=step.dropout).to(stored)
        z = torch.empty(step.batch, step.width, dtype=stored).requires_grad_()
    pairs = step.batch**2 // 12 if step.ragged else max(2048, step.batch**2 // 4)
    plan, labels = MemoryPlan(pairs, *[step.kept] * 3), step.labels
    with (
        mock.patch.object(gcng.nn.CorrelationGraph, "memory_plan", lambda self, embeddings: plan),
        # Without the implementations below, meta tensors are a mistake that the criterion names.
        mock.patch.object(gcng.losses.GCAHNGLoss, "_check", lambda *_: None),
        recorded_launches(architecture, tf32=step.tf32) as recording,
        triton_everywhere(), dispatch.forced_kernels(*dispatch.TRITON),
        _Implementations(step.dtype if step.autocast else None),
    ):  # fmt: skip
        criterion.metric_terms(z, labels).total.backward()
        criterion.classifier_loss(z, labels).backward()
        criterion.generator_terms(z, labels).total.backward()
    return recording.launches


def always() -> Iterator[Step]:
    """What every run of the tests compiles."""
    for width, dtype in ((512, torch.bfloat16), (128, torch.bfloat16), (1024, torch.bfloat16)):
        yield from (Step(width, dtype, kept=kept) for kept in (True, False))
    for autocast, layers in ((True, 1), (False, 2)):
        yield Step(512, torch.bfloat16, autocast, layers=layers)
    for dtype in (torch.float32, torch.float16):
        yield from (Step(512, dtype, kept=kept) for kept in (True, False))


def every(dtype: str, width: str) -> Iterator[Step]:
    """Every step of a width and a dtype: stashes or none, one layer or two, few rows or many, other classes."""
    stored = getattr(torch, dtype)
    kinds = ({"tf32": False}, {"tf32": True}) if stored == torch.float32 else ({}, {"autocast": True})
    for kind in kinds:
        for kept in (True, False):
            yield from (Step(int(width), stored, layers=layers, kept=kept, **kind) for layers in (1, 2))
        yield Step(int(width), stored, batch=1026, **kind)
        yield from (Step(int(width), stored, samples=samples, **kind) for samples in (3, 8))
