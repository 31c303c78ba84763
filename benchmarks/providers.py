"""How an op becomes providers: gcng with and without its extension, the definition eager and compiled, peers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import Build, Form, Inputs, Unavailable


@contextlib.contextmanager
def without_extension() -> Iterator[None]:
    """Blocked torch, whatever is built and whatever the device."""
    with contextlib.ExitStack() as stack:
        for name in ("gcng.ops.native", "gcng.ops.triton_path"):
            module = _module(name)
            if hasattr(module, "disabled"):
                stack.enter_context(module.disabled())
        pair, synthesis = _module("gcng.ops.pair_kernels"), _module("gcng.ops.synthesis_tiles")
        torch_kernels = pair.TorchPairKernels(), synthesis.TorchSynthesisKernels()
        stack.enter_context(_module("gcng.ops.dispatch").forced_kernels(*torch_kernels))
        yield


def extension(device: torch.device | str) -> str:
    """What runs beside blocked torch on a device: a name for the results file, "none" where nothing does."""
    native = _module("gcng.ops.native")
    if native is None:
        return "none"
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found = {
            "triton": _module("gcng.ops.triton_path").runs_on(index, quiet=True),
            "gcng_cuda": native.cuda(index, quiet=True) is not None,
        }
        return ", ".join(name for name, is_used in found.items() if is_used) or "none"
    status = native.cpu_status()
    return "none" if status.path is None else status.path.stem


def _module(name: str) -> Any | None:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def in_gcng(build: Build) -> dict[str, Build]:
    """A build through gcng's ops as two providers: with the extension, and without."""

    def blocked(inputs: Inputs) -> Form:
        device = next(iter(inputs.tensors.values())).device
        if extension(device) == "none":
            raise Unavailable("the same as gcng: no extension is loaded")
        return replace(build(inputs), mode=without_extension)

    return {"gcng": build, "gcng-no-extension": blocked}


def dense(definition: Callable[[Inputs], Tensor], **layout: Any) -> dict[str, Build]:
    """The dense definition as two providers: eager, and under torch.compile."""

    def compiled(inputs: Inputs) -> Form:
        torch.compiler.reset()
        call = torch.compile(definition, dynamic=False)
        return Form(lambda: (call(inputs),), **layout)

    return {"reference": lambda inputs: Form(lambda: (definition(inputs),), **layout), "reference-compiled": compiled}


def need(module: str, package: str) -> Any:
    """A peer's module; :class:`Unavailable` names the package that is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error
