"""Run one implementation through one case: values, gradients and the contract of an op.

Owns :func:`run_case`, which computes ours, the baseline and the truth with all gradients and puts every array
through the closeness gate; the memory layouts that inputs and upstream gradients come in; and what an op must
not do besides: write to inputs, to saved tensors or to the upstream gradient, keep tensors on its context,
read memory that nobody wrote, carry state from call to call, or give other bits when it is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.closeness import Closeness, ClosenessError, assert_close_to_truth

LAYOUTS = ("contiguous", "transposed", "row_strided", "column_slice", "offset", "expanded")
UPSTREAM_LAYOUTS = (*LAYOUTS, "stride_zero")


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; NaN equals the same NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; elements that do not belong to the result are NaN.

    ``expanded`` and ``stride_zero`` change the values: all rows become the first, all elements become the
    first. Layouts that need more dimensions than ``x`` has, or more rows, give a contiguous copy.
    """
    if layout not in UPSTREAM_LAYOUTS:
        raise ValueError(f"lay_out: layout {layout!r} is unknown; choose one of {UPSTREAM_LAYOUTS}")
    x = x.detach()
    filler = math.nan if x.is_floating_point() else 0 if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    if layout == "offset":
        buffer = x.new_full((x.numel() + 1,), filler)[1:].view(x.shape)
        return buffer.copy_(x)
    if x.dim() == 0 or x.numel() == 0 or (layout == "transposed" and x.dim() < 2):
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if layout == "row_strided":
        return x.new_full((2 * x.shape[0], *x.shape[1:]), filler)[::2].copy_(x)
    if layout == "column_slice":
        return x.new_full((*x.shape[:-1], x.shape[-1] + 5), filler)[..., 3:-2].copy_(x)
    if layout == "expanded":
        row = x[:1].clone(memory_format=torch.contiguous_format)
        return torch.as_strided(row, x.shape, (0, *row.stride()[1:]))
    if layout == "stride_zero":
        return torch.as_strided(x.reshape(-1)[:1].clone(), x.shape, (0,) * x.dim())
    return x.clone(memory_format=torch.contiguous_format)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN (integers with their maximum): what is never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@dataclass
class Pass:
    """One forward and backward: outputs, gradients by input name, and what the forward kept."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    saved: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def differentiate(
        self, leaves: Mapping[str, Any], upstream: Sequence[Tensor | None]
    ) -> dict[str, Tensor | None]:
        """Gradients of all leaves that require one, the graph kept; upstream None leaves an output out."""
        wanted = {n: x for n, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
        used = [
            (y, g) for y, g in zip(self.outputs, upstream, strict=True) if g is not None and y.requires_grad
        ]
        if not wanted or not used:
            return dict.fromkeys(wanted)
        outputs = [y for y, _ in used]
        weights = [g if g.dtype == y.dtype else g.to(y.dtype) for y, g in used]
        found = torch.autograd.grad(
            outputs, list(wanted.values()), weights, retain_graph=True, allow_unused=True
        )
        return dict(zip(wanted, found, strict=True))


def _forward(function: Callable[..., Any], leaves: Mapping[str, Any]) -> Pass:
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(x: Tensor) -> Tensor:
        saved.append((x.detach(), x.detach().clone()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = function(**leaves)
    return Pass(outputs if isinstance(outputs, tuple) else (outputs,), saved=saved)


def tensors_on_context(outputs: Sequence[Tensor]) -> list[str]:
    """Names of tensors kept as attributes of autograd nodes, where hooks and version checks miss them."""
    found, seen, queue = [], set(), [y.grad_fn for y in outputs if y.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        for key, value in getattr(node, "__dict__", {}).items():
            parts = value if isinstance(value, (tuple, list)) else (value,)
            if any(isinstance(part, Tensor) for part in parts):
                found.append(f"{node.name()}.{key}")
        queue += [following for following, _ in node.next_functions if following is not None]
    return found


def _leaves(
    inputs: Mapping[str, Any],
    differentiable: Sequence[str],
    layout: str | Mapping[str, str],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Fresh inputs in a layout; floating tensors in ``dtype`` if given."""
    leaves = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            wanted = layout if isinstance(layout, str) else layout.get(name, "contiguous")
            if wanted in ("expanded", "stride_zero") and not x.is_floating_point():
                wanted = "contiguous"
            x = lay_out(x, wanted)
            x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
            x = x.detach().requires_grad_(name in differentiable)
        leaves[name] = x
    return leaves


def random_upstream(outputs: Sequence[Tensor], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """One random gradient per output, no two elements alike, representable in ``dtype``; float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype).double() for y in outputs
    ]
    return [g.to(y.device) for g, y in zip(drawn, outputs, strict=True)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ClosenessError(message)


def _same(
    name: str, what: str, first: Mapping[str, Tensor | None], second: Mapping[str, Tensor | None]
) -> None:
    for key, a in first.items():
        b = second[key]
        equal = a is b if a is None or b is None else equal_bits(a, b)
        _require(equal, f"{name}: {what}: gradient of {key} has other bits")


def _times_four(x: Tensor) -> Tensor:
    """4 x in the same memory layout: another layout may add in another order."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(4 * memory, x.shape, x.stride(), x.storage_offset())


def _check_scaling(
    name: str, first: Mapping[str, Tensor | None], scaled: Mapping[str, Tensor | None]
) -> None:
    """A backward is linear, and a power of two costs no rounding: the gradients must be 4 times the first."""
    for key, g in first.items():
        if g is None or g.dtype == torch.float16:  # its range is too short for the products of most ops
            continue
        wrong = (scaled[key] != 4 * g) & (g.abs() > 2**20 * torch.finfo(g.dtype).tiny)
        _require(not bool(wrong.any()), f"{name}: gradient of {key} is not linear in the upstream gradient")


def check_contract(
    name: str,
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    differentiable: Sequence[str],
    upstream: Sequence[Tensor],
    layout: str | Mapping[str, str] = "contiguous",
) -> Pass:
    """One pass of ``function`` with everything checked that needs no truth; returns outputs and gradients.

    Inputs, saved tensors and upstream gradients keep their bits; backward twice and the whole call twice give
    equal bits; 4 times the upstream gradient gives 4 times the gradients; no tensor hides on an autograd
    node; outputs are contiguous; a gradient exists exactly for what requires one.
    """
    leaves = _leaves(inputs, differentiable, layout, None)
    tensors = {key: x for key, x in leaves.items() if isinstance(x, Tensor)}
    before = {key: x.detach().clone() for key, x in tensors.items()}
    upstream_before = [g.clone() for g in upstream]
    done = _forward(function, leaves)
    _require(
        len(done.outputs) == len(upstream), f"{name}: {len(done.outputs)} outputs, expected {len(upstream)}"
    )
    hidden = tensors_on_context(done.outputs)
    _require(not hidden, f"{name}: tensors kept outside save_for_backward: {hidden}")
    for index, y in enumerate(done.outputs):
        _require(y.is_contiguous(), f"{name}: output {index} {tuple(y.shape)} has strides {y.stride()}")
    outputs_before = [y.detach().clone() for y in done.outputs]
    done.gradients = done.differentiate(leaves, upstream)
    _same(name, "backward twice", done.gradients, done.differentiate(leaves, upstream))
    _check_scaling(name, done.gradients, done.differentiate(leaves, [_times_four(g) for g in upstream]))
    for key, x in tensors.items():
        _require(equal_bits(x, before[key]), f"{name}: input {key} was written to")
        _require(x.grad is None, f"{name}: input {key} had its .grad filled by a call that returns gradients")
    for index, (x, kept) in enumerate(done.saved):
        _require(
            equal_bits(x, kept), f"{name}: saved tensor {index} of shape {tuple(x.shape)} was written to"
        )
    for index, (g, kept) in enumerate(zip(upstream, upstream_before, strict=True)):
        _require(equal_bits(g, kept), f"{name}: the upstream gradient of output {index} was written to")
    again = _forward(function, leaves)
    for index, (y, first) in enumerate(zip(again.outputs, outputs_before, strict=True)):
        _require(equal_bits(y, first), f"{name}: output {index} has other bits in the second call")
        _require(
            equal_bits(done.outputs[index], first), f"{name}: output {index} changed after it was returned"
        )
    _same(name, "second call", done.gradients, again.differentiate(leaves, upstream))
    return done


def check_subsets(
    name: str,
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    differentiable: Sequence[str],
    upstream: Sequence[Tensor],
    full: Pass,
    layout: str | Mapping[str, str] = "contiguous",
) -> None:
    """Every input alone must get the bits that it gets with the others; without gradients the same values."""
    for wanted in differentiable:
        leaves = _leaves(inputs, [wanted], layout, None)
        alone = _forward(function, leaves).differentiate(leaves, upstream)
        _same(name, f"only {wanted} requires a gradient", alone, full.gradients)
    with torch.no_grad():
        outputs = _forward(function, _leaves(inputs, differentiable, layout, None)).outputs
    for y, first in zip(outputs, full.outputs, strict=True):
        _require(not y.requires_grad, f"{name}: an output requires a gradient under no_grad")
        _require(equal_bits(y, first.detach()), f"{name}: other bits under no_grad")


@dataclass
class _Comparison:
    """Collects the readings of one case."""

    name: str
    dtype: torch.dtype
    scale_floors: Mapping[str, float]
    gate: Mapping[str, Any]
    rounded_baseline: bool
    readings: list[Closeness] = field(default_factory=list)

    def add(
        self, what: str, ours: Tensor | None, truth: Tensor | None, low: Tensor | None, kind: torch.dtype
    ) -> None:
        """One array through the gate; what the definition does not depend on must be missing or zero."""
        if truth is None:
            zero = ours is None or not bool(ours.any())
            _require(zero, f"{self.name}: {what} must be zero, the definition does not depend on it")
            return
        _require(ours is not None, f"{self.name}: {what} is missing")
        low = torch.zeros_like(truth, dtype=self.dtype) if low is None else low
        if self.rounded_baseline and low.is_floating_point():
            low = low.to(self.dtype)
        floor = self.scale_floors.get(what, 0.0)
        label = f"{self.name}: {what}"
        self.readings.append(
            assert_close_to_truth(
                label, ours, truth, low, dtype=self.dtype, output_dtype=kind, scale_floor=floor, **self.gate
            )
        )


def run_case(
    name: str,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    differentiable: Sequence[str] = (),
    seed: int = 0,
    input_layout: str | Mapping[str, str] = "contiguous",
    upstream_layout: str = "contiguous",
    output_dtypes: Sequence[torch.dtype | None] | None = None,
    baseline_dtype: torch.dtype | None = None,
    other_inputs: Mapping[str, Any] | None = None,
    subsets: bool = False,
    scale_floors: Mapping[str, float] | None = None,
    **gate: Any,
) -> list[Closeness]:
    """Ours, baseline and truth on one case, with all gradients; every array through the gate.

    Args:
        function, reference: called with ``inputs`` as keywords; return a tensor or a tuple of tensors.
        inputs: tensors of any floating dtype (they are rounded to ``dtype`` first), integer tensors, values.
        differentiable: names of the inputs that require a gradient.
        input_layout: one of ``LAYOUTS`` for all tensors, or a layout per name.
        upstream_layout: one of ``UPSTREAM_LAYOUTS``. Upstream gradients are random and differ per element;
            with several outputs, each also gets its own alone.
        output_dtypes: expected dtypes where they differ from the baseline's (None: the baseline's).
        baseline_dtype: dtype of the reference behind the baseline, rounded to ``dtype`` afterwards, for a
            definition that is not finite in 16 bits; ``dtype`` by default.
        other_inputs: inputs of the same shapes for a call before the first, which must leave no trace.
        subsets: also differentiate every input alone, and run without gradients.
        scale_floors: ``scale_floor`` of the gate per array name (``"output 0"``, ``"grad x"``).
        gate: further arguments of ``assert_close_to_truth``.

    Returns:
        Readings for ``output 0``, ... and ``grad <name>``, ...
    """
    rounded = _leaves(_leaves(inputs, (), "contiguous", dtype), (), input_layout, None)
    exact_leaves = _leaves(rounded, differentiable, "contiguous", torch.float64)
    low_leaves = _leaves(rounded, differentiable, "contiguous", baseline_dtype or dtype)
    truth, low = _forward(reference, exact_leaves), _forward(reference, low_leaves)
    kinds = list(output_dtypes or [None] * len(truth.outputs))
    kinds = [
        kind or (y.dtype if baseline_dtype is None else dtype)
        for kind, y in zip(kinds, low.outputs, strict=True)
    ]
    drawn = random_upstream(truth.outputs, dtype, seed)
    upstream = [lay_out(g.to(kind), upstream_layout) for g, kind in zip(drawn, kinds, strict=True)]
    contract = {"differentiable": differentiable, "upstream": upstream}
    with poisoned_memory():
        if other_inputs is not None:
            before = _leaves(other_inputs, differentiable, input_layout, dtype)
            _forward(function, before).differentiate(before, upstream)
        ours = check_contract(name, function, rounded, layout=input_layout, **contract)
        if subsets:
            check_subsets(name, function, rounded, layout=input_layout, full=ours, **contract)
    comparison = _Comparison(name, dtype, scale_floors or {}, gate, baseline_dtype is not None)
    for index, kind in enumerate(kinds):
        outputs = (which.outputs[index] for which in (ours, truth, low))
        comparison.add(f"output {index}", *outputs, kind)
    alone = range(len(kinds)) if len(kinds) > 1 else ()
    for used in (None, *alone):
        part = [g if used in (None, index) else None for index, g in enumerate(upstream)]
        exact = truth.differentiate(exact_leaves, part)
        base = low.differentiate(low_leaves, part)
        mine = ours.gradients
        if used is not None:
            fresh = _leaves(rounded, differentiable, input_layout, None)
            with poisoned_memory():
                mine = _forward(function, fresh).differentiate(fresh, part)
        label = "grad" if used is None else f"output {used} alone: grad"
        for key in differentiable:
            comparison.add(f"{label} {key}", mine[key], exact[key], base[key], dtype)
    return comparison.readings
