"""The driver: layouts, the contract of an op, and what it compares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.closeness import ClosenessError
from tests.run_case import (
    LAYOUTS,
    UPSTREAM_LAYOUTS,
    equal_bits,
    lay_out,
    poisoned_memory,
    random_upstream,
    run_case,
)


def two_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A definition with two outputs that use their inputs differently."""
    return torch.nn.functional.linear(x, weight), (x * x).sum(-1)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(9, 7, generator=generator), "weight": torch.randn(5, 7, generator=generator)}


class Product(torch.autograd.Function):
    """``x * y`` with mistakes on request."""

    @staticmethod
    def forward(ctx, x, y, bug):
        ctx.save_for_backward(x, y)
        ctx.bug = bug
        if bug == "keeps tensor":
            ctx.kept = [x * y]
        if bug == "unwritten":
            return torch.empty_like(x).copy_(torch.cat([(x * y)[:-1], torch.empty_like(x[-1:])]))
        return x * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        if ctx.bug == "writes saved":
            y.data.mul_(1.5)
        if ctx.bug == "random":
            grad = grad * (1 + 1e-7 * torch.rand_like(grad))
        if ctx.bug == "not linear":
            return grad * y + 1e-7, grad * x, None
        if ctx.bug == "missing gradient":
            return grad * y, None, None
        if ctx.bug == "needs all" and not all(ctx.needs_input_grad[:2]):
            return grad * y + 1e-3, grad * x + 1e-3, None
        return grad * y, grad * x, None


def run_product(bug: str, **options) -> None:
    values = {"x": inputs()["x"], "y": inputs()["x"].flip(0)}
    run_case(
        "product",
        lambda x, y: Product.apply(x, y, bug),
        lambda x, y: x * y,
        values,
        dtype=torch.float32,
        differentiable=("x", "y"),
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upstream", UPSTREAM_LAYOUTS)
def test_definition_passes_its_own_case_in_every_layout(dtype, upstream):
    for layout in LAYOUTS:
        readings = run_case(
            "linear", two_outputs, two_outputs, inputs(), dtype=dtype, differentiable=("x", "weight"),
            input_layout=layout, upstream_layout=upstream, subsets=layout == "contiguous",
        )  # fmt: skip
        names = [reading.name for reading in readings]
        assert names[:4] == [f"linear: {what}" for what in ("output 0", "output 1", "grad x", "grad weight")]
        # The second output does not depend on the weight: nothing to compare there.
        assert names[4:] == [
            f"linear: output {index} alone: grad {key}" for index, key in ((0, "x"), (0, "weight"), (1, "x"))
        ]


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("keeps tensor", "tensors kept outside save_for_backward"),
        ("writes saved", "backward twice: gradient of x has other bits"),
        ("random", "backward twice: gradient of x has other bits"),
        ("not linear", "gradient of x is not linear in the upstream gradient"),
        ("missing gradient", "grad y is missing"),
        ("needs all", "only x requires a gradient: gradient of x has other bits"),
        ("unwritten", "7 values of ours are not finite, the first at \\(8, 0\\)"),
    ],
)
def test_contract_is_checked(bug, message):
    run_product("", subsets=True)
    with pytest.raises(ClosenessError, match=message):
        run_product(bug, subsets=True)


def test_state_between_calls_is_noticed():
    remembered: list[Tensor] = []

    def first_input_forever(x: Tensor) -> Tensor:
        if not remembered:
            remembered.append(x.detach().clone())
        return x + remembered[0]

    x = {"x": inputs()["x"]}
    run_case("state", first_input_forever, lambda x: x + x.detach(), x, dtype=torch.float32)
    remembered.clear()
    with pytest.raises(ClosenessError, match="output 0"):
        run_case(
            "state", first_input_forever, lambda x: x + x.detach(), x, dtype=torch.float32,
            other_inputs={"x": x["x"].flip(0)},
        )  # fmt: skip


def test_gradient_where_the_definition_has_none_must_be_zero():
    def definition(x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.detach()

    values = {"x": inputs()["x"], "gate": inputs()["x"].flip(0)}
    options = {"dtype": torch.float32, "differentiable": ("x", "gate")}
    run_case("gate", lambda x, gate: definition(x, gate) + 0 * gate, definition, values, **options)
    with pytest.raises(ClosenessError, match="grad gate must be zero"):
        run_case("gate", lambda x, gate: x * gate, definition, values, **options)


def test_number_of_outputs_and_writes_to_inputs_are_noticed():
    def writes(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        result = two_outputs(x, weight)
        weight.data.add_(1.0)
        return result

    with pytest.raises(ClosenessError, match="1 outputs, expected 2"):
        run_case("one", lambda x, weight: x @ weight.T, two_outputs, inputs(), dtype=torch.float32)
    with pytest.raises(ClosenessError, match="input weight was written to"):
        run_case("writes", writes, two_outputs, inputs(), dtype=torch.float32)


def test_baseline_of_another_dtype_is_rounded():
    def underflows(x: Tensor) -> Tensor:
        return x / (x * 0 + 1e-6).square().sum(-1, keepdim=True).sqrt()

    x = {"x": 1e-3 * inputs()["x"]}
    with pytest.raises(ClosenessError, match="baseline are not finite"):
        run_case("tiny", lambda x: underflows(x.float()).half(), underflows, x, dtype=torch.float16)
    readings = run_case(
        "tiny", lambda x: underflows(x.float()).half(), underflows, x, dtype=torch.float16,
        baseline_dtype=torch.float32,
    )  # fmt: skip
    assert readings[0].reading("relative L2") < 1e-3


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (6,), (), (0, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
def test_layouts_keep_shape_and_values(shape, layout):
    x = torch.arange(1.0, 1.0 + math.prod(shape)).view(shape)
    y = lay_out(x, layout)
    assert y.shape == x.shape and y.dtype == x.dtype
    if layout == "expanded" and x.numel() and x.dim():
        assert torch.equal(y, x[:1].expand_as(x)) and y.stride(0) == 0
    elif layout == "stride_zero" and x.numel() and x.dim():
        assert set(y.stride()) == {0} and bool((y == 1).all())
    else:
        assert torch.equal(y, x)


def test_layouts_are_what_they_say():
    x = inputs()["x"]
    strides = {layout: lay_out(x, layout).stride() for layout in UPSTREAM_LAYOUTS}
    assert strides == {
        "contiguous": (7, 1),
        "transposed": (1, 9),
        "row_strided": (14, 1),
        "column_slice": (12, 1),
        "offset": (7, 1),
        "expanded": (0, 1),
        "stride_zero": (0, 0),
    }
    assert lay_out(x, "offset").storage_offset() == 1
    for layout in ("row_strided", "column_slice", "offset"):
        y = lay_out(x, layout)
        memory = torch.as_strided(y, (y.untyped_storage().nbytes() // 4,), (1,), 0)
        assert int(memory.isnan().sum()) == len(memory) - x.numel() > 0
    with pytest.raises(ValueError, match="layout 'diagonal' is unknown"):
        lay_out(x, "diagonal")


def test_equal_bits_tells_what_equal_does_not():
    x = torch.tensor([0.0, math.nan])
    assert equal_bits(x, x.clone())
    assert not equal_bits(x, torch.tensor([-0.0, math.nan]))
    assert not equal_bits(x, x.double())
    assert not equal_bits(x, x[:1])


@pytest.mark.raw_memory
def test_poisoned_memory_fills_and_restores():
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert bool(torch.empty(50).isnan().all())
        assert bool((torch.empty(50, dtype=torch.int32) == torch.iinfo(torch.int32).max).all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_upstream_gradients_are_random_and_never_uniform():
    outputs = two_outputs(**inputs())
    first, second = random_upstream(outputs, torch.bfloat16, 5), random_upstream(outputs, torch.bfloat16, 5)
    for g, again in zip(first, second, strict=True):
        assert torch.equal(g, again) and torch.equal(g, g.bfloat16().double())
        assert len(g.unique()) > g.numel() // 2
    assert not torch.equal(first[0], random_upstream(outputs, torch.bfloat16, 6)[0])
