"""Checks that every op test repeats: compiled equals eager, no second derivative, nothing large allocated.

Owns :func:`check_compiled`, :func:`check_refuses_double_backward` and :class:`LargestTensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.run_case import equal_bits


def leaves_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that can have a gradient."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}


def outputs_and_gradients(
    function: Callable[..., Any], inputs: dict[str, Any], *, differentiate: bool = True, seed: int = 3
) -> list[Tensor]:
    """Outputs, then gradients of all floating inputs for a random upstream gradient of the first output."""
    inputs = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    leaves = leaves_of(inputs)
    for x in leaves.values():
        x.requires_grad_(differentiate)
    outputs = tree_leaves(function(**inputs))
    if not differentiate:
        return outputs
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        outputs[0].dtype
    )
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs[0], list(leaves.values()), upstream))


def check_compiled(
    function: Callable[..., Any], many_inputs: Sequence[dict[str, Any]], *, differentiate: bool = True
) -> None:
    """``torch.compile(fullgraph=True, dynamic=True)`` gives the bits of eager in at most two compilations."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    # The cache on disk knows an op by its name only: it would serve what an earlier version compiled.
    with torch._inductor.config.patch(force_disable_caches=True):
        for inputs in many_inputs:
            eager = outputs_and_gradients(function, inputs, differentiate=differentiate)
            traced = outputs_and_gradients(compiled, inputs, differentiate=differentiate)
            for expected, got in zip(eager, traced, strict=True):
                assert equal_bits(expected, got), f"differs from eager by {(expected - got).abs().max()}"
    assert 1 <= counter.frame_count <= 2


def check_refuses_double_backward(function: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    """``create_graph=True`` must raise at once, with the way out in the message."""
    inputs = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    for x in leaves_of(inputs).values():
        with pytest.raises(NotImplementedError, match=r"double backward .* use gcng\.reference_mode\(\)"):
            torch.autograd.grad(function(**inputs).sum(), x, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation inside the block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                # A view or an expansion allocates nothing beyond its storage.
                self.elements = max(self.elements, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return result
