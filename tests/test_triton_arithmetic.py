"""The arithmetic that kernels share, the interpreter that they are tested in, and the traps set for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gcng.reference import dropout
from tests.closeness import assert_close_to_truth
from tests.run_case import equal_bits
from tests.triton_interpreter import check_isolated, guarded, is_interpreting, run_isolated, spread_rows

triton = pytest.importorskip("triton", exc_type=ImportError)
import triton.language as tl  # noqa: E402

from gcng.kernels import arithmetic, launch  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def gelu_kernel(x_ptr, value_ptr, derivative_ptr, alone_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    value, derivative = arithmetic.gelu_and_derivative(x, EXACT)
    arithmetic.store(value_ptr + index, value, None)
    arithmetic.store(derivative_ptr + index, derivative, None)
    arithmetic.store(alone_ptr + index, arithmetic.gelu(x, EXACT), None)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PLAIN: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATOR: tl.constexpr):
    index = tl.arange(0, BLOCK)
    square = index[:, None] * BLOCK + index[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    total = tl.zeros((BLOCK, BLOCK), ACCUMULATOR)
    if PLAIN:
        total = tl.dot(a, b, total, input_precision="tf32")
    else:
        total = arithmetic.dot(a, b, total, "ieee")
    tl.store(out_ptr + square, total)


@triton.jit
def operand_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, arithmetic.operand(tl.load(x_ptr + index), PRECISION))


@triton.jit
def copy_kernel(x_ptr, out_ptr, stride, num_columns, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
    x = tl.load(x_ptr + row * stride + column, mask=(column < num_columns) | (not MASKED), other=0.0)
    arithmetic.store(out_ptr + row * num_columns + column, x, mask=column < num_columns)


@triton.jit
def dropout_kernel(seed, layer, threshold, scale, rows_ptr, columns_ptr, row_ptr, column_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    rows, columns = tl.load(rows_ptr + index), tl.load(columns_ptr + index)
    row_scale, column_scale = arithmetic.dropout_pairs(seed, layer, threshold, scale, rows, columns)
    tl.store(row_ptr + index, row_scale)
    tl.store(column_ptr + index, column_scale)


def run(kernel, grid: int, *arguments, **constants) -> None:
    launch.launch(kernel, (grid,), *arguments, schedule=launch.Schedule(), **constants)


def gelu_truth(x: Tensor) -> tuple[Tensor, Tensor]:
    distribution = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    return x * distribution, distribution + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_and_derivative_of_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = torch.nn.functional.gelu(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.float64, True), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)]
)
def test_gelu_is_as_accurate_as_torch(dtype: torch.dtype, exact: bool, scale: float) -> None:
    x = (scale * torch.randn(4096, dtype=torch.float64)).to(dtype)
    wide = x if dtype == torch.float64 else x.float()
    value, derivative, alone = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    run(gelu_kernel, 1, wide, value, derivative, alone, EXACT=exact, BLOCK=4096)
    truths, baselines = gelu_truth(x.double()), gelu_and_derivative_of_torch(x)
    assert_close_to_truth("gelu", value, truths[0], baselines[0])
    assert_close_to_truth("gelu'", derivative, truths[1], baselines[1])
    assert torch.equal(alone, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dot_sums_in_the_wide_type(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 32, 32, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(32, 32, dtype=wide)
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    run(dot_kernel, 1, a, b, out, PLAIN=False, BLOCK=32, ACCUMULATOR=accumulator)
    truth = a.double() @ b.double()
    assert_close_to_truth("a @ b", out, truth, a.to(wide) @ b.to(wide), dtype=wide)


def test_round_to_bfloat16() -> None:
    """Ties, both signs, infinities, NaN, zeros, the largest finite number: all bits as torch rounds them."""
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, 1e-40, 1.00390625, 1.01171875])
    x = torch.cat([special, torch.randn(2039)])
    out = torch.empty(2048, dtype=torch.bfloat16)
    run(copy_kernel, 1, x, out, 2048, 2048, BLOCK=2048, MASKED=True, WIDE=True)
    same = (out.view(torch.int16) == x.bfloat16().view(torch.int16)) | (out.isnan() & x.isnan())
    assert same.all()


def test_operands_of_tf32_products_are_rounded_to_the_nearest() -> None:
    """11 bits of every number, ties to even, and nothing left that a tensor core would cut off."""
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 2 - 2**-11])
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.4028235e38, 1e-40])
    x = torch.cat([ties, special, torch.randn(1012), torch.randn(1024).exp2() * 1e30])
    rounded, as_it_was = torch.empty(2, 2048)
    run(operand_kernel, 1, x, rounded, PRECISION="tf32", BLOCK=2048)
    run(operand_kernel, 1, x, as_it_was, PRECISION="ieee", BLOCK=2048)
    assert equal_bits(as_it_was, x)
    assert not (rounded[~rounded.isnan()].view(torch.int32) & 0x1FFF).any()
    assert rounded[:7].tolist() == [1.0, 1 + 2**-9, -1.0, 2.0, 0.0, 0.0, math.inf]
    assert rounded[4:6].signbit().tolist() == [False, True] and rounded[8].isnan()
    assert rounded[7] == -math.inf and rounded[9] == math.inf and rounded[10] == -math.inf
    mantissa, exponent = x[12:].double().frexp()
    assert torch.equal(rounded[12:].double(), ((mantissa * 2**11).round() / 2**11).ldexp(exponent))
    # Cut off instead, every number would be smaller, by 2^-12 of itself on average.
    assert abs(float((rounded[12:].double() / x[12:].double()).mean()) - 1) < 2**-16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layer", [0, 3])
def test_dropout_has_the_bits_of_the_reference(layer: int, dtype: torch.dtype) -> None:
    identities = dropout.node_identity(torch.arange(-8, 8), torch.arange(16) % 3)
    rows, columns = torch.cartesian_prod(identities, identities).unbind(1)
    for seed in (0, -1, 2**63 - 1, 0x0123456789ABCDEF):
        expected = dropout.dropout_pairs(torch.tensor(seed), layer, 0.3, rows, columns)
        got = torch.empty(2, 256, dtype=dtype)
        threshold, scale = round(0.3 * 2**32), 1 / (1 - 0.3)
        run(
            dropout_kernel, 1, seed, layer, threshold, scale, rows.contiguous(), columns.contiguous(), got[0], got[1],
            BLOCK=256,
        )  # fmt: skip
        for part, truth in zip(got, expected, strict=True):
            # The scale reaches a kernel as a float32 number; which weights are dropped is exact.
            assert torch.equal(part == 0, truth == 0)
            torch.testing.assert_close(part.double(), truth, rtol=1e-7, atol=0)


def test_interpreter_multiplies_bit_patterns_of_bfloat16() -> None:
    """Why ``arithmetic.dot`` exists. Once this fails its bfloat16 branch can go."""
    a = torch.randn(32, 32).bfloat16()
    out = torch.empty(32, 32)
    run(dot_kernel, 1, a, a, out, PLAIN=True, BLOCK=32, ACCUMULATOR=tl.float32)
    truth = a.double() @ a.double()
    assert not (out.double() - truth).norm() < truth.norm()


def test_interpreter_does_not_round_to_tf32() -> None:
    """Why accuracy in tf32 cannot be judged here."""
    a, b = torch.randn(2, 32, 32)
    out = torch.empty(32, 32)
    run(dot_kernel, 1, a, b, out, PLAIN=True, BLOCK=32, ACCUMULATOR=tl.float32)
    truth = a.double() @ b.double()
    assert (out.double() - truth).norm() < 1e-6 * truth.norm()


GUARDED = """
import torch
from tests.test_triton_arithmetic import copy_kernel, run
from tests.triton_interpreter import guarded
x, out = guarded(torch.randn(3, 20)), guarded(torch.empty(3, 20))
run(copy_kernel, 3, x, out, 20, 20, BLOCK=32, MASKED={masked}, WIDE=True)
assert torch.equal(x, out)
"""


def test_guard_page_lets_correct_kernels_pass() -> None:
    check_isolated(GUARDED.format(masked=True))


def test_guard_page_ends_a_process_that_reads_beyond_the_tensor() -> None:
    done = run_isolated(GUARDED.format(masked=False))
    assert done.returncode < 0, done.stderr


def test_guarded_tensor_keeps_values_and_shape() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(guarded(x), x)
    assert guarded(x[:0]).shape == (0, 5)


def test_offsets_beyond_32_bits() -> None:
    """The overflow check sees an address computed in int32; the same in int64 is right."""
    values = torch.randn(2, 8)
    x = spread_rows(values, 2**31 + 16)
    assert torch.equal(x, values)
    out = torch.empty(2, 8)
    run(copy_kernel, 2, x, out, 2**31 + 16, 8, BLOCK=8, MASKED=True, WIDE=True)
    assert torch.equal(out, values)
    y = spread_rows(torch.randn(3, 8), 2**30 + 16)
    with pytest.raises(Exception, match="overflow"):
        run(copy_kernel, 3, y, torch.empty(3, 8), 2**30 + 16, 8, BLOCK=8, MASKED=True, WIDE=False)


def test_launch_refuses_what_it_cannot_start() -> None:
    x = torch.randn(4)
    launch.launch(copy_kernel, (0, 70000), x, x, 4, 4, schedule=launch.Schedule(), BLOCK=4, MASKED=True, WIDE=True)
    with pytest.raises(ValueError, match=r"copy_kernel: a grid of \(1, 70000\) is beyond"):
        launch.launch(copy_kernel, (1, 70000), x, x, 4, 4, schedule=launch.Schedule(), BLOCK=4, MASKED=True, WIDE=True)
    with pytest.raises(ValueError, match="must share one device"):
        run(copy_kernel, 1, x, x.to("meta"), 4, 4, BLOCK=4, MASKED=True, WIDE=True)


def test_recorded_launches_start_nothing() -> None:
    x = torch.randn(4)
    out = torch.zeros(4)
    with launch.recorded_launches(80, tf32=True) as recording:
        run(copy_kernel, 1, x, out, 4, 4, BLOCK=4, MASKED=True, WIDE=True)
        assert launch.architecture(x.device) == 80
        assert launch.input_precision(torch.float32) == "tf32"
    assert launch.architecture(x.device) == launch.INTERPRETER_ARCHITECTURE
    assert [list(kept.arguments)[:3] for kept in recording.launches] == [["x_ptr", "out_ptr", "stride"]]
    assert not out.any()


def test_tf32_follows_the_setting_of_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert launch.input_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launch.input_precision(torch.float32) == "tf32"
        assert launch.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_marked_tests_are_interpreted() -> None:
    assert is_interpreting()
    assert launch.is_interpreted()
