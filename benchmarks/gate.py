"""The closeness gate before any timing: what every provider gives, against one float64 truth.

Owns what of an iteration is compared, and which caps a precision has; the rules are those of `tests/closeness.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import operations
from benchmarks.iteration import Outcome
from benchmarks.operations import PRECISIONS, Operation
from benchmarks.settings import Setting
from tests.closeness import CAPS, FEW, TF32_CAP, ClosenessError, assert_close_to_truth, relative_error

# What shows that a peer computes the same thing: its accuracy is its own business, and is shown in the tables.
SAME_FORMULA = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}
# The forms written for the benchmarks run in every dtype: float64 at a small size, where rounding explains nothing,
# shows that their formula is the same.
WRITTEN_HERE = ("published", "reference")
# What a sum of n terms may be off by, one after the other in float32, is n units of rounding; a few such sums meet.
SUM_ROUNDING = 4 * 2.0**-24
# Caps of precisions that are no dtype: operands of products have fewer digits than what is stored.
OPERAND_CAPS = {"tf32": TF32_CAP, "autocast": CAPS[torch.bfloat16]}
# Half a unit in the last place of an operand. A single number can be right to more digits than that by luck, which sets
# no standard for another way to compute it.
OPERAND_ROUNDING = {"tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-9, "autocast": 2.0**-9}


def iteration_arrays(outcome: Outcome) -> dict[str, Tensor]:
    """What is compared: the spread in place of J_div, near 0 by cancellation; no gradient that is 0."""
    arrays = {f"loss {name}": loss for name, loss in outcome.losses.items() if name != "diversity"}
    arrays["loss spread"] = 1 - outcome.losses["diversity"] / 0.01
    for name, gradient in outcome.gradients.items():
        # Mathematically zero in both phases: the key bias shifts both logits alike.
        if not ("/edge" in name and name.endswith(".k.b")):
            arrays[f"gradient {name}"] = gradient
    return arrays


def assert_gcng_close(
    operation: Operation,
    provider: str,
    arrays: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    precision: str,
) -> float:
    """Fail unless every array of a provider is about as accurate as plain torch; returns the worst relative L2 error.

    Args:
        arrays, truth, baseline: by name; the truth in float64, the baseline by the dense definition where that fits.

    Raises:
        ClosenessError: the rules of the first array that is not close, or the names of missing arrays.
    """
    _check_names(provider, arrays, truth)
    dtype = PRECISIONS[precision]
    cap = (operation.caps or {}).get(precision, OPERAND_CAPS.get(precision))
    caps = None if cap is None else {dtype: cap}
    factor, row_factor = operation.factors
    worst = 0.0
    for key, value in truth.items():
        ours, wanted = arrays[key].cpu(), value.cpu()
        # In a wider dtype than the test's is fine: gcng returns float32 losses of 16-bit embeddings.
        readings = assert_close_to_truth(
            f"{provider} {key}", ours, wanted, _standard(baseline[key].cpu(), wanted, precision), dtype=dtype,
            output_dtype=ours.dtype, op_caps=caps, factor=factor, row_factor=row_factor,
        )  # fmt: skip
        worst = max(worst, readings.reading("hard cap"))
    return worst


def _standard(baseline: Tensor, truth: Tensor, precision: str) -> Tensor:
    """The baseline, whose error in a few numbers counts as one rounding of an operand at least."""
    rounding = OPERAND_ROUNDING.get(precision)
    if rounding is None or truth.numel() >= FEW:
        return baseline
    lucky = (baseline.double() - truth).abs() < rounding * truth.abs()
    return torch.where(lucky, truth * (1 + rounding), baseline.double()).to(baseline.dtype)


def gradient_limit(operation: Operation, provider: str, setting: Setting, precision: str) -> float:
    """The relative L2 error up to which a gradient of an iteration counts as that of the same formula at this size.

    SAME_FORMULA, as for everything else; none for the forms written here where the sums over N² pairs are so long that
    their rounding explains more than that. Their formula is proven by :func:`formula_error`, the same code is held to
    SAME_FORMULA at smaller sizes, and at this one its losses are. Batch normalization takes from each pair's gradient
    the mean over all pairs: by `nn.BatchNorm1d` in float32 the gradient of a norm's shift is off by 1 % at N = 320 and
    by 40 % at N = 640 (D = 128, `published` in benchmarks/results/amd-epyc-2-cores.json; gcng: 0.003 and 0.004 %). How
    accurate a form is belongs into the tables.
    """
    limit = SAME_FORMULA[PRECISIONS[precision]]
    written = operation.name == "iteration" and _eager(provider) in WRITTEN_HERE and precision != "float64"
    return math.inf if written and SUM_ROUNDING * setting.samples**2 > limit else limit


@functools.cache
def formula_error(operation_name: str, provider: str, setting: Setting) -> float:
    """How far a form written here is from another one in float64 at a small size; 0 for every other provider.

    Args:
        setting: its L and K decide which formulas take part; its size does not.

    Raises:
        ClosenessError: over SAME_FORMULA in float64, so it computes something else.
    """
    operation, name = operations.load(operation_name), _eager(provider)
    if name not in WRITTEN_HERE:
        return 0.0
    tiny, K = operation.tiny, setting.samples_per_class
    samples = K * max(4, -(-tiny.samples // K))
    small = replace(tiny, num_layers=setting.num_layers, samples_per_class=K, samples=samples)
    other = next(n for n in (*WRITTEN_HERE[::-1], "gcng") if n in operation.providers and n != name)
    ours, truth = (operation.prepare(n, small, "float64").arrays() for n in (name, other))
    return assert_same_formula(f"{name} beside {other} at {small.name}:", ours, truth, "float64")


def _eager(provider: str) -> str:
    """The provider whose code a compiled one compiles."""
    return provider.removesuffix("-compiled")


def assert_same_formula(
    provider: str,
    arrays: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    precision: str,
    of_gradients: float | None = None,
) -> float:
    """Fail where a peer computes something else; returns its worst relative L2 error.

    Args:
        of_gradients: limit for the gradients of an iteration, that of :func:`gradient_limit`; SAME_FORMULA by default,
            as for everything else. What is not finite is refused in any case.
    """
    _check_names(provider, arrays, truth)
    worst, usual = 0.0, SAME_FORMULA[PRECISIONS[precision]]
    for key, value in truth.items():
        limit = usual if of_gradients is None or not key.startswith("gradient ") else of_gradients
        error = relative_error(arrays[key].cpu(), value.cpu()) if bool((value != 0).any()) else 0.0
        if not (error <= limit and math.isfinite(error)):
            raise ClosenessError(f"{provider} {key}: relative L2 error {error:.1e}, over {limit:.0e} for {precision}")
        worst = max(worst, error)
    return worst


def _check_names(provider: str, arrays: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    missing = truth.keys() - arrays.keys()
    if missing:
        raise ClosenessError(f"{provider} has no {sorted(missing)}, which the truth has")
