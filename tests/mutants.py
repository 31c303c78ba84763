"""The seeded mutants: which mistakes the gate must refuse, and the cases on which it has to notice them.

Owns :data:`OPERATIONS` (an honest blocked implementation, its definition and its cases) and :data:`MUTANTS`
(one planted mistake each, most of them found in published kernels). The implementations are in
``tests/mutants_rows.py`` and ``tests/mutants_pairs.py``. A new kernel mistake that a user meets becomes a new
mutant here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gcng import reference
from gcng.reference.attention import negative_attention
from gcng.reference.class_cross_entropy import linear_cross_entropy
from tests import cases
from tests import mutants_pairs as pairs
from tests import mutants_rows as rows
from tests.closeness import Closeness
from tests.run_case import run_case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Inputs of one operation with everything that the driver needs to run them."""

    name: str
    make: Callable[[int], dict[str, Any]]  # inputs from a seed
    dtypes: tuple[torch.dtype, ...] = DTYPES
    layout: str = "contiguous"
    upstream: str = "contiguous"
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of run_case


@dataclass(frozen=True)
class Operation:
    """An implementation with a ``bug`` argument and the definition that it must equal."""

    name: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    wide_output: bool = False  # a float32 result from 16-bit inputs
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of run_case

    def run(
        self, case: Case, dtype: torch.dtype, *, bug: str = "", seed: int = 0, **options: Any
    ) -> list[Closeness]:
        """One case through the gate."""
        wide = dtype if dtype == torch.float64 else torch.float32
        mutated = {"bug": bug} if bug else {}
        options = {**self.options, **case.options, **options}
        if dtype != torch.float16:
            options.pop("baseline_dtype", None)
        return run_case(
            f"{self.name} {bug or 'honest'} on {case.name}",
            lambda **inputs: self.function(**inputs, **mutated),
            self.definition,
            case.make(seed),
            dtype=dtype,
            differentiable=self.differentiable,
            seed=seed + 1,
            input_layout=case.layout,
            upstream_layout=case.upstream,
            other_inputs=case.make(seed + 1) if case.layout == "contiguous" else None,
            output_dtypes=[wide] if self.wide_output else None,
            **options,
        )

    def all_runs(self) -> Iterator[tuple[Case, torch.dtype]]:
        """Every case in every dtype."""
        return ((case, dtype) for case in self.cases for dtype in case.dtypes)


# Factors wider than the gate's own where the baseline's error is a draw of very few roundings: tests must not
# depend on the order in which some processor adds. The mistakes are larger by orders of magnitude.
#
# A lead of 10 leaves 1 - p = 5e-5 of every probability: so many digits are gone whoever computes.
_CONFIDENT = {
    "op_caps": {torch.float32: 5e-3, torch.float16: 5e-3},
    "float64_bound": 1e-9,
    "factor": 4.0,
    "row_factor": 12.0,
}
# Equal rows share one rounding error, and their gradients cancel.
_DEGENERATE = {
    "op_caps": {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2},
    "float64_bound": 1e-11,
    "factor": 8.0,
    "row_factor": 12.0,
}
# The 1e-6 of the distances, squared, is 0 in float16: the definition divides by it.
_NO_FLOAT16 = {"baseline_dtype": torch.float32}


def _classification_cases() -> Iterator[Case]:
    by_name = {case.name: case for case in cases.CLASSIFICATIONS}

    def make(shape: str, values: str, reduction: str, **rest: Any) -> Case:
        def inputs(seed: int) -> dict[str, Any]:
            return cases.classification_inputs(by_name[shape], values, seed=seed) | {"reduction": reduction}

        return Case(f"{shape}, {values}, {reduction}", inputs, **rest)

    for values in cases.CLASSIFICATION_VALUES:
        options = _CONFIDENT if values == "confident" else {}
        yield make("tails", values, "none" if values in ("confident", "ties") else "mean", options=options)
    for shape in ("power_plus_one", "exact", "single_class", "single_row", "many_labels", "all_ignored"):
        yield make(shape, "diffuse", "mean", dtypes=(torch.float32, torch.bfloat16))
    for upstream in ("contiguous", "row_strided", "offset", "expanded"):
        yield make("tails", "diffuse", "none", dtypes=(torch.float32,), upstream=upstream)
    for layout in ("transposed", "row_strided", "column_slice"):
        yield make("exact", "diffuse", "none", dtypes=(torch.float32,), layout=layout)
    yield make("many_chunks", "diffuse", "mean", dtypes=(torch.float32, torch.bfloat16, torch.float16))


def _batch_cases(
    make: Callable[[cases.Batch, str, int], dict[str, Any]],
    values: tuple[str, ...],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Case]:
    def case(batch: cases.Batch, pattern: str, **rest: Any) -> Case:
        return Case(f"{batch.name}, {pattern}", lambda seed: make(batch, pattern, seed), **rest)

    first, *others = cases.BATCHES
    for pattern in values:
        yield case(first, pattern, options=(options or {}).get(pattern, {}))
    for batch in others:
        yield case(batch, "normal", dtypes=(torch.float64, torch.float32, torch.bfloat16))
    for layout in ("transposed", "row_strided", "column_slice", "offset"):
        yield case(others[1], "normal", dtypes=(torch.float32,), layout=layout, upstream=layout)
    for upstream in ("expanded", "stride_zero"):
        yield case(others[1], "normal", dtypes=(torch.float32,), upstream=upstream)


def _norm_inputs(shape: cases.Matrix, values: str, seed: int) -> dict[str, Any]:
    gain = 1 + cases.normal(shape.width, seed=seed, name="gain", scale=0.3)
    shift = cases.normal(shape.width, seed=seed, name="shift")
    return {"x": cases.matrix(shape, values, seed=seed), "weight": gain, "bias": shift}


def _norm_cases() -> Iterator[Case]:
    def case(shape: cases.Matrix, values: str, **rest: Any) -> Case:
        return Case(f"{shape.name}, {values}", lambda seed: _norm_inputs(shape, values, seed), **rest)

    first, *others = cases.MATRICES
    for values in ("normal", "small", "large", "constant_row", "zero_row", "duplicates", "one_hot"):
        yield case(first, values, options=_DEGENERATE if values == "one_hot" else {})
    for shape in others:
        # One channel has no variance: two gradients are 0, and noise in float64.
        flat = {"scale_floors": {"grad x": 1.0, "grad weight": 1.0}} if shape.width == 1 else {}
        yield case(shape, "normal", dtypes=(torch.float32, torch.bfloat16), options=flat)
    # A spread of 1 on a level of 1e4: four digits are lost before anything is computed.
    lost = {"op_caps": {torch.float32: 5e-2}, "float64_bound": 1e-10}
    yield case(first, "offset", dtypes=(torch.float64, torch.float32), options=lost)
    for layout in ("transposed", "row_strided", "column_slice", "offset", "expanded"):
        yield case(first, "normal", dtypes=(torch.float32,), layout=layout, upstream=layout)


def _message_inputs(batch: cases.Batch, values: str, seed: int) -> dict[str, Any]:
    n, width = batch.size, batch.width
    e = cases.normal(n, n, width, seed=seed, name="edges")
    if values == "correlation":
        e = reference.initial_edges(reference.center_normalize(cases.embeddings(batch, seed=seed)))
    weight = cases.normal(width + 3, width, seed=seed, name="e2n", scale=width**-0.5)
    return {"e": e, "weight": weight, "bias": cases.normal(width + 3, seed=seed, name="e2n bias")}


def _mix_inputs(batch: cases.Batch, values: str, seed: int) -> dict[str, Any]:
    n, width = batch.size, batch.width
    layout = reference.class_layout(batch.labels(seed))
    return {
        "e": cases.normal(n, n, width, seed=seed, name="edges"),
        "turned": cases.normal(
            n, width, seed=seed, name="turned", scale=4.0 if values == "confident" else 1.0
        ),
        "shift": cases.normal(n, seed=seed, name="shift"),
        "value": cases.normal(n, width, seed=seed, name="value"),
        "identity": reference.node_identity(batch.labels(seed), layout.rank),
        "seed": 2**40 + 17,
        "p": 0.0 if values == "no_dropout" else 0.25,
    }


def _attention(batch: cases.Batch, values: str, seed: int) -> dict[str, Any]:
    return cases.attention_inputs(batch, values, seed=seed)


def _synthesis(batch: cases.Batch, values: str, seed: int) -> dict[str, Any]:
    return cases.synthesis_inputs(batch, values, seed=seed)


_MESSAGE_CASES = tuple(_batch_cases(_message_inputs, ("normal", "correlation")))
_ATTENTION_VALUES = ("normal", "confident", "large", "duplicates", "all_equal", "zero_row")
_ATTENTION_OPTIONS = {
    "confident": _CONFIDENT,
    "large": _CONFIDENT,
    "all_equal": _DEGENERATE | {"scale_floors": {"grad q": 0.1, "grad k": 0.1}},
}
_SYNTHESIS_VALUES = ("normal", "small", "duplicates", "constant_row")
_SYNTHESIS_CASES = tuple(
    _batch_cases(_synthesis, _SYNTHESIS_VALUES, dict.fromkeys(_SYNTHESIS_VALUES, _NO_FLOAT16))
)

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "linear_cross_entropy",
            rows.linear_cross_entropy,
            linear_cross_entropy,
            ("x", "weight", "bias"),
            tuple(_classification_cases()),
            wide_output=True,
            # The loss of a confident row cancels to 1e-5: it is measured against 1 nat.
            options={"scale_floors": {"output 0": 1.0}},
        ),
        Operation(
            "negative_attention",
            rows.negative_attention,
            negative_attention,
            ("q", "k", "v"),
            tuple(_batch_cases(_attention, _ATTENTION_VALUES, _ATTENTION_OPTIONS)),
            # Rows of 8 to 16 channels: the worst of them is an extreme of few roundings.
            options={"row_factor": 6.0},
        ),
        Operation(
            "activation_norm",
            pairs.activation_norm,
            reference.activation_norm,
            ("x", "weight", "bias"),
            tuple(_norm_cases()),
        ),
        Operation("messages", pairs.messages, reference.messages, ("e", "weight", "bias"), _MESSAGE_CASES),
        Operation(
            "edge_mix",
            pairs.edge_mix,
            pairs.edge_mix_definition,
            ("e", "turned", "shift", "value"),
            tuple(_batch_cases(_mix_inputs, ("normal", "confident", "no_dropout"))),
            # Sums over partners of one sign and the other: with two samples little is left.
            options={"scale_floors": {"grad shift": 1.0}},
        ),
        Operation(
            "synthesis",
            pairs.synthesis,
            pairs.synthesis_definition,
            ("embeddings", "gate"),
            _SYNTHESIS_CASES,
            # The gradient of a gate has the factor dn - dp, which cancels where distances are close.
            options={"scale_floors": {"grad gate": 0.1}},
        ),
        Operation(
            "constant_gate_synthesis",
            pairs.constant_gate_synthesis,
            pairs.constant_gate_definition,
            ("embeddings", "gate"),
            _SYNTHESIS_CASES[:1],
        ),
    )
}

# operation -> bug -> what a reader should know about it
_BUGS = {
    "linear_cross_entropy": {
        "tail_unmasked": "padded classes at logit 0 take part of the mass",
        "tail_after_maximum": "padding is masked after the maximum: saturated negative logits underflow",
        "no_maximum": "exp without subtracting the maximum",
        "bias_per_width_block": "bias added once per block of channels; invisible while D fits one block",
        "floor_grid": "grid rounded down: the last block of classes never runs",
        "last_row_dropped": "off by one in the row count",
        "last_rows_not_summed": "weight gradient without the last, partial block of rows",
        "last_block_unwritten": "one block of the gradient is never written",
        "upstream_ignored": "backward takes the upstream gradient for 1",
        "upstream_first_only": "only grad_output[0] is read",
        "upstream_assumed_contiguous": "strides of the upstream gradient are not looked at",
        "mean_gradient_undivided": "1/N of the mean is missing in the gradient",
        "gradient_scaled": "all gradients 2 % too large",
        "one_element_off": "one element of one gradient off by 0.5/N",
        "sums_in_storage": "weight gradient summed in the storage dtype",
        "rounded_before_one": "probability rounded to the storage dtype before 1 is subtracted",
        "ignored_counted": "ignored rows count in the mean",
        "all_ignored_divided": "no valid row divides by zero",
        "label_narrowed": "labels cast to a narrow integer",
        "stale_row_mask": "a cached mask of valid rows is reused for another batch of the same size",
        "buffer_kept": "a gradient buffer is not cleared between calls",
        "tensor_on_context": "a tensor kept as an attribute of the context",
        "writes_input": "the input serves as the buffer of its own gradient",
        "writes_saved": "backward changes a saved tensor",
        "writes_upstream": "backward scales the upstream gradient in place",
    },
    "negative_attention": {
        "mask_inverted": "attends to the own class",
        "diagonal_counted": "a sample is its own negative",
        "positives_counted": "no mask",
        "scale_missing": "1/sqrt(h) missing",
        "key_scale_missing": "1/sqrt(h) missing in one of three gradients",
        "zero_logit_missing": "softmax without the extra zero logit",
        "empty_row_shift": "the maximum of a row without negatives is -inf",
        "no_maximum": "exp without subtracting the maximum",
        "tail_unmasked": "padded senders at logit 0 take part of the mass",
        "last_block_dropped": "grid rounded down: the last senders are never seen",
        "inner_product_dropped": "softmax backward without its row term",
        "value_gradient_overwritten": "every block of receivers overwrites the value gradient",
        "sender_receiver_swapped": "queries and keys swapped: s[b, a] for s[a, b]",
        "normalized_over_receivers": "softmax over the wrong axis",
        "heads_interleaved": "heads and samples mixed up in the output",
    },
    "activation_norm": {
        "mean_term_dropped": "backward without the mean term",
        "variance_term_dropped": "backward without the variance term",
        "eps_outside_root": "eps added to the standard deviation",
        "variance_unbiased": "D - 1 for D",
        "variance_from_squares": "E[x²] - E[x]² cancels",
        "weight_from_wrong_operand": "gain gradient from gelu(x) instead of its normalized rows",
        "gelu_tanh": "the tanh form of gelu",
        "slope_of_output": "gelu' taken at gelu(x)",
        "norm_before_gelu": "gelu(LN(x)) for LN(gelu(x))",
        "sums_in_storage": "gain gradient summed in the storage dtype",
        "last_rows_not_summed": "gain gradient without the last, partial block of rows",
        "output_transposed": "right numbers in column-major memory",
    },
    "messages": {
        "tail_unmasked": "padded partners send gelu(bias)",
        "endpoints_swapped": "sum over the row endpoint",
        "self_excluded": "the self pair left out",
        "last_block_dropped": "grid rounded down: the last partners are never seen",
        "slope_approximated": "backward with the derivative of another gelu",
    },
    "edge_mix": {
        "sigmoid_slope": "s for s (1 - s)",
        "scale_missing": "1/sqrt(D) missing",
        "endpoints_swapped": "weights of the two endpoints swapped",
        "dropout_seed_changed": "backward recomputes with another dropout mask",
        "dropout_not_rescaled": "kept weights not divided by 1 - p",
        "dropout_by_position": "dropout keyed by position in the batch instead of the node",
        "residual_dropped": "backward without the residual path",
        "logit_detached": "an edge gets no gradient through its weights",
    },
    "synthesis": {
        "mix_swapped": "lam for 1 - lam in the chain",
        "mix_row_of_first": "every anchor uses the mixing numbers of rank 0",
        "near_branch_missing": "negatives nearer than the positive are pushed away",
        "tie_is_far": "dp = dn takes the wrong branch: value right, gradient wrong",
        "eps_missing": "1e-6 of the distances missing: equal samples have distance 0",
        "last_channel_dropped": "distance without the last channel",
        "gate_transposed": "gate[n, a] for gate[a, n]",
        "positive_previous": "positive of rank k - 1 for k + 1; invisible while K = 2",
        "distances_detached": "distances taken as constants",
        "gate_detached": "no gradient reaches the gate",
        "kappa_missing_in_gradient": "gate gradient without its factor kappa",
    },
    "constant_gate_synthesis": {"detach_missing": "a constant of the metric phase receives a gradient"},
}


_ROUNDING_BUGS = {"sums_in_storage", "rounded_before_one"}  # right in float32, by their nature


@dataclass(frozen=True)
class Mutant:
    """One planted mistake."""

    operation: Operation
    bug: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Where it has to show: not in float64, in which everything does; a GPU has float32 and less."""
        return torch.bfloat16 if self.bug in _ROUNDING_BUGS else torch.float32

    def __str__(self) -> str:
        return f"{self.operation.name}-{self.bug}"


MUTANTS = tuple(
    Mutant(OPERATIONS[name], bug, reason) for name, bugs in _BUGS.items() for bug, reason in bugs.items()
)
