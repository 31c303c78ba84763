"""The closeness gate: what "equal to the definition" means for every test and every benchmark.

Truth is the reference in float64 on the inputs already rounded to the test dtype; the baseline is the same
reference, eager, in the test dtype. An implementation may lose about as much accuracy as plain torch does and
nothing more, so bounds follow the data, the dtype and the size, and never a tolerance chosen by hand.

Owns the gate (:func:`assert_close_to_truth`) and the check that accumulation does not lose accuracy with its
length (:func:`assert_error_does_not_grow`). ``tests/run_case.py`` runs an implementation through it,
gradients included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0  # relative L2 and largest error: at most twice the baseline's
ROW_FACTOR = 3.0  # worst row: at most three times the baseline's worst row
CAPS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TF32_CAP = 1e-3  # pass as op_caps={torch.float32: TF32_CAP} where tf32 operands are allowed
SCALE_BIAS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
FLOAT64_FLOOR = 1e-13  # in float64 the truth is the baseline, whose error counts as this much
FLOOR = 1e-7  # added to the limits of the other dtypes
FEW = 64  # arrays below this size have too few elements for the baseline's error to be typical ...
FEW_FLOOR = 6e-7  # ... so ten float32 roundings are added instead
SMALL_ROW = 1e-3  # rows below this share of the typical row norm are measured against that share


class ClosenessError(AssertionError):
    """An implementation is not close enough to the truth, or breaks the contract of an op."""


@dataclass(frozen=True)
class Rule:
    """One measured rule: the reading, its limit, and where the limit comes from."""

    name: str
    measured: float
    limit: float
    origin: str

    @property
    def holds(self) -> bool:
        """Whether the reading is within the limit; NaN never is."""
        return self.measured <= self.limit


@dataclass(frozen=True)
class Closeness:
    """All readings for one array: what a benchmark records and a failed test prints."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rules: tuple[Rule, ...]
    worst: str

    @property
    def failed(self) -> tuple[Rule, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.holds)

    def reading(self, name: str) -> float:
        """The reading of the rule ``name``."""
        return next(rule.measured for rule in self.rules if rule.name == name)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.dtype}, shape {self.shape}"]
        for rule in self.rules:
            mark, sign = ("  ok  ", "<=") if rule.holds else ("  FAIL", "> ")
            lines.append(
                f"{mark} {rule.name:14s} {rule.measured:.3e} {sign} {rule.limit:.3e}  ({rule.origin})"
            )
        return "\n".join([*lines, f"  worst element {self.worst}"])


def _norms(x: Tensor, truth: Tensor, scale_floor: float) -> tuple[float, float, float]:
    """Relative L2 error, largest error over largest value, worst relative error of a row (last axis)."""
    error = x - truth

    def relative(top: float, bottom: float) -> float:
        return 0.0 if top == 0 else (top / bottom if bottom > 0 else math.inf)

    l2 = relative(error.norm().item(), max(truth.norm().item(), scale_floor * math.sqrt(truth.numel())))
    largest = relative(error.abs().max().item(), max(truth.abs().max().item(), scale_floor))
    if truth.dim() < 2:
        return l2, largest, 0.0
    rows = truth.reshape(-1, truth.shape[-1]).norm(dim=1)
    floor = max(SMALL_ROW * rows.square().mean().sqrt().item(), scale_floor * math.sqrt(truth.shape[-1]))
    row_error = error.reshape(-1, truth.shape[-1]).norm(dim=1)
    share = torch.where(row_error == 0, torch.zeros_like(rows), row_error / rows.clamp(min=floor))
    return l2, largest, share.max().item()


def _scale_rule(
    ours: Tensor, truth: Tensor, dtype: torch.dtype, stored: torch.dtype, widen: float, scale_floor: float
) -> Rule:
    """A systematic factor hides below per-element noise but not in the projection on the truth."""
    power = max(truth.square().sum().item(), scale_floor**2 * truth.numel())
    bias = abs(((ours - truth) * truth).sum().item()) / power if power > 0 else 0.0
    # Roundings to the storage dtype move the projection by about this much when few elements dominate.
    peaked = math.sqrt(truth.pow(4).sum().item()) / power if power > 0 else 0.0
    limit = max(SCALE_BIAS[dtype] * widen, 2 * torch.finfo(stored).eps * peaked)
    origin = f"{SCALE_BIAS[dtype]:.0e} for {dtype}, or the roundings of few elements"
    return Rule("scale bias", bias, limit, origin)


def _worst(ours: Tensor, truth: Tensor, baseline: Tensor) -> str:
    index = int((ours - truth).abs().argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), truth.shape))
    values = [x.reshape(-1)[index].item() for x in (ours, truth, baseline)]
    return f"{place}: ours {values[0]:.9g}, truth {values[1]:.9g}, baseline {values[2]:.9g}"


def _check_kind(name: str, ours: Tensor, truth: Tensor, baseline: Tensor, dtype: torch.dtype | None) -> None:
    """Type, dtype, shape and device of the result, before any number is looked at."""
    if not isinstance(ours, Tensor):
        raise ClosenessError(f"{name}: expected a tensor, got {type(ours).__name__}")
    wanted = baseline.dtype if dtype is None else dtype
    if ours.dtype != wanted:
        raise ClosenessError(f"{name}: dtype is {ours.dtype}, expected {wanted}")
    if not (ours.shape == truth.shape == baseline.shape):
        shapes = tuple(ours.shape), tuple(truth.shape), tuple(baseline.shape)
        raise ClosenessError(f"{name}: shape is {shapes[0]}, truth has {shapes[1]}, baseline {shapes[2]}")
    if ours.device != baseline.device:
        raise ClosenessError(f"{name}: device is {ours.device}, expected {baseline.device}")


def _check_finite(name: str, ours: Tensor, truth: Tensor, baseline: Tensor, declared: bool) -> Tensor:
    """Refuse values that are not finite unless declared; returns the mask of elements to measure."""
    for who, x in (("truth", truth), ("baseline", baseline), ("ours", ours)):
        bad = ~torch.isfinite(x)
        if bool(bad.any()) and not declared:
            first = tuple(bad.nonzero()[0].tolist())
            raise ClosenessError(
                f"{name}: {int(bad.sum())} values of {who} are not finite, the first at {first}"
            )
    same = (
        (ours == truth)
        | (torch.isnan(ours) & torch.isnan(truth))
        | (torch.isfinite(ours) & torch.isfinite(truth))
    )
    if not bool(same.all()):
        first = tuple((~same).nonzero()[0].tolist())
        raise ClosenessError(
            f"{name}: not finite in other places than the truth, first at {first}: "
            f"ours {ours[first].item()}, truth {truth[first].item()}"
        )
    return torch.isfinite(truth)


def _measure(
    name: str,
    ours: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype,
    op_caps: Mapping[torch.dtype, float] | None,
    float64_bound: float | None,
    scale_floor: float,
    factor: float,
    row_factor: float,
) -> Closeness:
    """All rules on finite float64 copies; ``ours`` still has its own dtype."""
    stored, wide = ours.dtype, ours.double()
    cap = (op_caps or {}).get(dtype, CAPS[dtype])
    if dtype == torch.float64 and float64_bound is not None:
        cap = float64_bound
    floor = FLOOR
    if dtype == torch.float64:
        floor = FLOAT64_FLOOR if float64_bound is None else float64_bound
    elif truth.numel() < FEW:
        floor = FEW_FLOOR
    measured = _norms(wide, truth, scale_floor)
    base = _norms(baseline, truth, scale_floor)
    # Nobody who stores in this dtype can do better than the truth rounded once.
    rounded = _norms(truth.to(stored).double(), truth, scale_floor)
    rules = []
    for rule, times, ours_error, base_error, one_rounding in zip(
        ("relative L2", "largest error", "worst row"),
        (factor, factor, row_factor),
        measured,
        base,
        rounded,
        strict=True,
    ):
        limit = times * max(base_error, one_rounding, floor if dtype == torch.float64 else 0.0)
        limit += 0.0 if dtype == torch.float64 else floor
        origin = f"{times:g} x baseline {base_error:.3e}, one rounding {one_rounding:.3e}, floor {floor:.0e}"
        rules.append(Rule(rule, ours_error, limit, origin))
    rules.append(_scale_rule(wide, truth, dtype, stored, max(1.0, cap / CAPS[dtype]), scale_floor))
    cap_limit = max(cap, factor * rounded[0])
    rules.append(
        Rule("hard cap", measured[0], cap_limit, f"relative L2 in {dtype}, whatever the baseline does")
    )
    return Closeness(name, dtype, tuple(truth.shape), tuple(rules), _worst(wide, truth, baseline))


def assert_close_to_truth(
    name: str,
    ours: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    output_dtype: torch.dtype | None = None,
    op_caps: Mapping[torch.dtype, float] | None = None,
    float64_bound: float | None = None,
    scale_floor: float = 0.0,
    declared_nonfinite: bool = False,
    factor: float = FACTOR,
    row_factor: float = ROW_FACTOR,
) -> Closeness:
    """Fail unless ``ours`` is about as accurate as plain torch in the same dtype.

    Rules: relative L2 error and largest error at most ``factor`` times the baseline's, the worst row at most
    ``row_factor`` times the baseline's worst, no systematic scale, a hard cap for the dtype, finite values,
    and the right dtype, shape and device. A baseline that is right by luck counts as one rounding of the
    truth plus 1e-7.

    Args:
        name: what the array is, for the message, e.g. ``"grad weight"``.
        ours: the result under test. truth: float64, from the inputs rounded to the test dtype.
        baseline: the reference, eager, in the test dtype. All three of one shape.
        dtype: the test dtype, of the inputs; the baseline's by default.
        output_dtype: dtype that ``ours`` must have, when that is not the baseline's (a float32 loss of 16-bit
            inputs).
        op_caps: hard caps of an ill-conditioned case, in place of ``CAPS``; widens the scale rule alike.
        float64_bound: documented float64 bound in place of 1e-13 and 1e-12, e.g. 1e-11 for a whole pipeline.
        scale_floor: magnitude to measure against where the truth is zero by mathematics and noise in
            practice.
        declared_nonfinite: the case is about NaN or infinity: they must sit exactly where the truth has them.

    Returns:
        The readings, for a benchmark to record.

    Raises:
        ClosenessError: an AssertionError that lists every rule with its numbers and the worst element.
    """
    _check_kind(name, ours, truth, baseline, output_dtype)
    if truth.dtype != torch.float64 and truth.is_floating_point():
        raise ClosenessError(f"{name}: the truth must be float64, got {truth.dtype}")
    ours, truth, baseline = ours.detach(), truth.detach(), baseline.detach()
    if not ours.is_floating_point():
        if not torch.equal(ours, truth.to(ours.dtype)):
            raise ClosenessError(
                f"{name}: {int((ours != truth).sum())} of {ours.numel()} integers differ from the truth"
            )
        return Closeness(name, ours.dtype, tuple(ours.shape), (), "none")
    baseline = baseline.double()
    live = _check_finite(name, ours.double(), truth, baseline, declared_nonfinite)
    if not bool(live.all()):
        ours, truth, baseline = ours[live], truth[live], baseline[live]
    # Where only the baseline overflows it sets no standard: one rounding of the truth is left as the bound.
    baseline = torch.where(torch.isfinite(baseline), baseline, truth)
    dtype = dtype or ours.dtype
    if ours.numel() == 0:
        return Closeness(name, dtype, tuple(ours.shape), (), "none")
    result = _measure(
        name, ours, truth, baseline, dtype=dtype, op_caps=op_caps, float64_bound=float64_bound,
        scale_floor=scale_floor, factor=factor, row_factor=row_factor,
    )  # fmt: skip
    if result.failed:
        raise ClosenessError(f"not close enough to the truth\n{result}")
    return result


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Relative L2 error against a float64 truth."""
    return ((x.detach().double() - truth).norm() / truth.norm()).item()


def assert_error_does_not_grow(name: str, few: float, many: float, *, factor: float = 1.5) -> None:
    """Fail if the error ``many`` of 512 accumulation steps exceeds ``factor`` times the error ``few`` of 8.

    Sums kept in 16 bits pass every other rule while they are short; errors come from :func:`relative_error`.
    """
    if not many <= factor * few + FLOOR:
        raise ClosenessError(
            f"{name}: error grows with the number of accumulation steps, {few:.3e} with few and {many:.3e} "
            f"with many, at most {factor:g} times is allowed; keep sums in float32"
        )
