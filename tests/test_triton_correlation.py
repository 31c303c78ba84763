"""The Triton kernels of (1), interpreted: closeness, constant rows, layouts, non-finite rows, addresses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import correlation as kernels
from gcng.ops import correlation as op
from gcng.reference import correlation as definition
from tests import cases
from tests.closeness import Closeness
from tests.op_checks import outputs_and_gradients
from tests.run_case import UPSTREAM_LAYOUTS, equal_bits, run_case
from tests.triton_interpreter import check_isolated, spread_rows

pytestmark = pytest.mark.interpreter

MATRICES = {case.name: case for case in cases.MATRICES}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class _CenterNormalize(torch.autograd.Function):
    """The launchers as an op of autograd, which is how gcng/ops calls them."""

    @staticmethod
    def forward(ctx, x):
        unit, inverse_norm = kernels.center_normalize_forward(x)
        ctx.save_for_backward(unit, inverse_norm)
        return unit

    @staticmethod
    def backward(ctx, grad):
        return kernels.center_normalize_backward(grad, *ctx.saved_tensors)


def center_normalize(x: Tensor) -> Tensor:
    return _CenterNormalize.apply(x)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows and 16 channels: several in both directions, with remainders."""
    monkeypatch.setattr(kernels.RowSchedule, "for_width", lambda width: kernels.RowSchedule(4, 1, 16, 16))


def readings(shape: str, values: str, dtype: torch.dtype, **options) -> list[Closeness]:
    return run_case(
        f"center_normalize on {shape}, {values}",
        center_normalize,
        definition.center_normalize,
        {"x": cases.matrix(MATRICES[shape], values)},
        dtype=dtype,
        differentiable=["x"],
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["normal", "small", "large", "constant_row", "zero_row", "duplicates", "one_hot"])
def test_close_to_truth(values: str, dtype: torch.dtype, small_tiles) -> None:
    assert readings("tails", values, dtype)


@pytest.mark.parametrize("values", ["normal", "constant_row"])
def test_close_to_truth_in_float16(values: str, small_tiles) -> None:
    assert readings("tails", values, torch.float16)


@pytest.mark.parametrize("shape", ["exact", "single_row", "long", "wide"])
def test_close_to_truth_on_the_shipped_tiles(shape: str) -> None:
    assert readings(shape, "normal", torch.float32)


@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
def test_close_to_truth_in_every_layout(layout: str, small_tiles) -> None:
    # One value for all elements is the direction of the mean, which has no gradient.
    floor = {"grad x": 1.0} if layout == "stride_zero" else {}
    inputs = "contiguous" if layout == "stride_zero" else layout
    assert readings("exact", "normal", torch.float32, input_layout=inputs, upstream_layout=layout, scale_floors=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 100, 4096, 4097, 10000])
def test_equals_the_blocked_path_at_every_width(width: int, dtype: torch.dtype) -> None:
    """More rows than a program has; beyond 4096 channels a row takes several steps."""
    rows = kernels.RowSchedule.for_width(width).block_i + 2
    x, grad = torch.randn(2, rows, width, dtype=torch.float64).to(dtype).unbind(0)
    x[1] = 0.7
    got = kernels.center_normalize_forward(x)
    got += (kernels.center_normalize_backward(grad, *got),)
    expected = op._center_normalize(x)
    expected += (op._center_normalize_backward(grad, *expected),)
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps * float(theirs.abs().max()))
        assert torch.equal(ours == 0, theirs == 0)


@pytest.mark.parametrize("value", [0.0, 0.7, -1e4, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_rows_give_zero(value: float, dtype: torch.dtype, small_tiles) -> None:
    x = torch.randn(9, 37, dtype=dtype)
    x[2] = value
    unit, grad = outputs_and_gradients(center_normalize, {"x": x})
    assert not unit[2].any()
    assert not grad[2].any()
    others = torch.arange(9) != 2
    assert equal_bits(unit[others], center_normalize(x[others]))
    assert grad[others].any(1).all()


def test_the_floor_is_that_of_the_blocked_path(small_tiles) -> None:
    """Rows whose entries differ by one rounding have no direction; from 100 on they have."""
    x = torch.ones(40, 9)
    x[:, 0] += torch.finfo(torch.float32).eps * torch.arange(1, 41).square()
    unit = center_normalize(x)
    assert torch.equal(unit.any(1), op.center_normalize(x).any(1))
    assert 0 < int(unit.any(1).sum()) < 40


def test_non_finite_stays_in_its_row(small_tiles) -> None:
    x = torch.randn(9, 21)
    clean = center_normalize(x)
    x[1, 2], x[4, 20] = math.nan, math.inf
    unit, inverse_norm = kernels.center_normalize_forward(x)
    assert torch.equal(unit.isnan(), op._center_normalize(x)[0].isnan())
    assert not unit[[1, 4]].isfinite().any()
    assert inverse_norm[[1, 4]].tolist() == [[0.0], [0.0]]
    kept = torch.tensor([0, 2, 3, 5, 6, 7, 8])
    assert equal_bits(unit[kept], clean[kept])
    grad = torch.randn(9, 21)
    expected = kernels.center_normalize_backward(grad, clean, inverse_norm)
    grad[3, 1] = math.nan
    got = kernels.center_normalize_backward(grad, clean, inverse_norm)
    assert got[3].isnan().all()
    assert equal_bits(got[[0, 2, 5, 6]], expected[[0, 2, 5, 6]])


def test_no_rows() -> None:
    for result in outputs_and_gradients(center_normalize, {"x": torch.randn(0, 5)}):
        assert result.shape == (0, 5)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 512, 4096, 4097, 2**20])
def test_schedule(width: int) -> None:
    schedule = kernels.RowSchedule.for_width(width)
    assert 16 <= schedule.block_d <= 4096
    assert schedule.block_d & (schedule.block_d - 1) == schedule.block_i & (schedule.block_i - 1) == 0
    assert schedule.block_i * schedule.block_d <= 4096


GUARDED = """
import torch
from gcng.kernels import correlation as kernels
from tests.triton_interpreter import guard_allocations, guarded
kernels.RowSchedule.for_width = lambda width: kernels.RowSchedule(4, 1, 8, 16)
x, grad = torch.randn(11, 37), torch.randn(11, 37)
def run(grad, x):
    unit, inverse_norm = kernels.center_normalize_forward(x)
    return unit, inverse_norm, kernels.center_normalize_backward(grad, unit, inverse_norm)
expected = run(grad, x)
guard_allocations()
got = run(guarded(grad), guarded(x))
assert all(torch.equal(a, b) for a, b in zip(expected, got))
"""


def test_no_access_outside_the_tensors() -> None:
    check_isolated(GUARDED)


def test_offsets_beyond_32_bits(small_tiles) -> None:
    """Rows spread over more than 2^31 elements, where the overflow check is on."""
    x, grad = torch.randn(3, 20).to(torch.float16), torch.randn(3, 20).to(torch.float16)
    unit, inverse_norm = kernels.center_normalize_forward(x)
    far, far_inverse_norm = kernels.center_normalize_forward(spread_rows(x, 2**30 + 8))
    assert equal_bits(far, unit)
    assert equal_bits(far_inverse_norm, inverse_norm)
    expected = kernels.center_normalize_backward(grad, unit, inverse_norm)
    got = kernels.center_normalize_backward(spread_rows(grad, 2**30 + 8), unit, inverse_norm)
    assert equal_bits(got, expected)
