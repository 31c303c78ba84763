"""center_normalize (1) and correlation_topk: closeness, constant rows, ties, classes, contract, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import gcng
from gcng.ops import nearest
from gcng.ops.correlation import center_normalize, correlation_topk
from gcng.ops.nearest import nearest_rows
from gcng.reference import correlation as definition
from tests import cases
from tests.closeness import Closeness
from tests.op_checks import LargestTensor, check_compiled, check_refuses_double_backward, outputs_and_gradients
from tests.run_case import LAYOUTS, UPSTREAM_LAYOUTS, equal_bits, lay_out, run_case

MATRICES = {case.name: case for case in cases.MATRICES}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "TILE_QUERIES", 5)
    monkeypatch.setattr(nearest, "TILE_REFERENCES", 7)


def readings(shape: str, values: str, dtype: torch.dtype, **options) -> list[Closeness]:
    """center_normalize through the closeness gate."""
    x = cases.matrix(MATRICES[shape], values)
    return run_case(
        f"center_normalize on {shape}, {values}",
        center_normalize,
        definition.center_normalize,
        {"x": x},
        dtype=dtype,
        differentiable=["x"],
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["normal", "small", "large", "constant_row", "zero_row", "duplicates", "one_hot"])
def test_close_to_truth(values: str, dtype: torch.dtype) -> None:
    assert readings("tails", values, dtype)


@pytest.mark.parametrize("shape", ["exact", "single_row", "long", "wide"])
def test_close_to_truth_in_every_shape(shape: str) -> None:
    assert readings(shape, "normal", torch.float32)


@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
def test_close_to_truth_in_every_layout(layout: str) -> None:
    # One value for all elements is the direction of the mean, which has no gradient.
    floor = {"grad x": 1.0} if layout == "stride_zero" else {}
    inputs = "contiguous" if layout == "stride_zero" else layout
    assert readings("exact", "normal", torch.float32, input_layout=inputs, upstream_layout=layout, scale_floors=floor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    x, grad = lay_out(torch.randn(40, 24, dtype=dtype), layout), lay_out(torch.randn(40, 24, dtype=dtype), layout)
    results = []
    for leaf, upstream in ((x, grad), (x.contiguous(), grad.contiguous())):
        unit = center_normalize(leaf.requires_grad_())
        results.append((unit, *torch.autograd.grad(unit, leaf, upstream)))
    assert all(equal_bits(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.7, -1e4, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_rows_give_zero(value: float, dtype: torch.dtype) -> None:
    x = torch.randn(6, 37, dtype=dtype)
    x[2] = value
    unit, grad = outputs_and_gradients(center_normalize, {"x": x})
    assert not unit[2].any()
    assert not grad[2].any()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert equal_bits(unit[others], center_normalize(x[others]))
    assert grad[others].any(1).all()


def test_single_channel_has_no_direction() -> None:
    unit, grad = outputs_and_gradients(center_normalize, {"x": torch.randn(5, 1)})
    assert not unit.any()
    assert not grad.any()


def test_non_finite_stays_in_its_row() -> None:
    x = torch.randn(6, 5)
    clean = center_normalize(x)
    x[1, 2], x[4, 0] = math.nan, math.inf
    unit = center_normalize(x)
    assert unit.isnan().any(1).tolist() == [False, True, False, False, True, False]
    kept = torch.tensor([0, 2, 3, 5])
    assert equal_bits(unit[kept], clean[kept])


def test_gradcheck_of_center_normalize() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    x[3] = 0.25
    # Finite differences step off the constant row; its gradient is 0 by definition.
    free = x[[0, 1, 2, 4]].requires_grad_()
    assert torch.autograd.gradcheck(center_normalize, (free,), nondet_tol=0.0)


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_opcheck_of_center_normalize(rows: int) -> None:
    op = torch.ops.gcng.center_normalize.default
    torch.library.opcheck(op, (torch.randn(rows, 5, requires_grad=True),))
    torch.library.opcheck(op, (torch.randn(5, rows + 1).T.requires_grad_(),))


def test_compiled_center_normalize_equals_eager() -> None:
    check_compiled(center_normalize, [{"x": torch.randn(n, 6)} for n in (4, 30, 11)])


def test_double_backward_of_center_normalize() -> None:
    inputs = {"x": torch.randn(3, 4, dtype=torch.float64)}
    check_refuses_double_backward(center_normalize, inputs)
    with gcng.reference_mode():
        assert torch.autograd.gradgradcheck(center_normalize, (inputs["x"].requires_grad_(),))


def random_search(n: int = 30, references: int = 41, *, dtype=torch.float64, classes: int = 4) -> dict:
    """Arguments of a search in other rows, with labels."""
    return {
        "x": torch.randn(n, 6, dtype=dtype),
        "labels": torch.randint(classes, (n,)),
        "ref": torch.randn(references, 6, dtype=dtype),
        "ref_labels": torch.randint(classes, (references,)),
    }


VARIANTS = [(), ("labels",), ("ref",), ("labels", "ref", "ref_labels")]


@pytest.mark.parametrize("given", VARIANTS)
@pytest.mark.parametrize("k", [1, 5, 60])
def test_topk_equals_the_definition(given: tuple[str, ...], k: int, small_tiles) -> None:
    inputs = random_search()
    chosen = {name: inputs[name] for name in given}
    values, indices = correlation_topk(inputs["x"], k, **chosen)
    expected_values, expected = definition.correlation_topk(inputs["x"], k, **chosen)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=4e-15)


@pytest.mark.parametrize("given", VARIANTS)
def test_topk_is_the_same_for_every_tile(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_search(dtype=torch.float32)
    chosen = {name: inputs[name] for name in given}
    whole = correlation_topk(inputs["x"], 50, **chosen)
    for queries, references in ((1, 2), (4, 41), (64, 3)):
        monkeypatch.setattr(nearest, "TILE_QUERIES", queries)
        monkeypatch.setattr(nearest, "TILE_REFERENCES", references)
        for a, b in zip(correlation_topk(inputs["x"], 50, **chosen), whole, strict=True):
            assert equal_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_values_are_pearson_coefficients(dtype: torch.dtype) -> None:
    x = torch.randn(25, 8, dtype=dtype)
    values, indices = correlation_topk(x, 24)
    assert values.dtype == torch.float32
    expected = torch.corrcoef(x.double()).gather(1, indices)
    assert (values.double() - expected).abs().max() <= 1.2e-7


def test_topk_leaves_out_self_and_class(small_tiles) -> None:
    inputs = random_search()
    labels = inputs["labels"]
    _, indices = correlation_topk(inputs["x"], 29)
    assert not (indices == torch.arange(30)[:, None]).any()
    assert bool((indices.sort(1).values >= 0).all())
    _, negatives = correlation_topk(inputs["x"], 30, labels=labels)
    for row in range(30):
        found = [i for i in negatives[row].tolist() if i >= 0]
        assert sorted(found) == [i for i in range(30) if labels[i] != labels[row]]


def test_topk_finds_a_shifted_and_scaled_copy() -> None:
    """Correlation ignores offset and positive scale, so a negative that is 3 x + 2 comes first with value 1."""
    x = torch.randn(12, 9, dtype=torch.float64)
    x[7] = 3 * x[2] + 2
    values, indices = correlation_topk(x, 1, labels=torch.arange(12))
    assert indices[2].item() == 7
    assert indices[7].item() == 2
    assert values[[2, 7]].flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-14)


def test_topk_ties_go_by_lower_index(small_tiles) -> None:
    """Channels in pairs x, -x: mean exactly 0, length exactly 4, correlations multiples of 1/4, most tied."""
    half = torch.randint(2, (40, 8), dtype=torch.float64) * 2 - 1
    x = torch.cat([half, -half], 1)
    values, indices = correlation_topk(x, 39)
    expected_values, expected = definition.correlation_topk(x, 39)
    assert (values[:, 1:] == values[:, :-1]).float().mean() > 0.5
    assert torch.equal(indices, expected)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-15)


def test_topk_constant_rows_correlate_with_nothing() -> None:
    x = torch.randn(8, 5)
    x[3] = 0.7
    values, indices = correlation_topk(x, 7)
    assert values[3].tolist() == [0.0] * 7
    assert indices[3].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert bool(values[indices == 3].eq(0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_topk_and_center_normalize_agree_on_what_is_constant(dtype: torch.dtype) -> None:
    """A row whose entries differ by one rounding has no direction; one that differs by 100 has."""
    x = torch.randn(4, 9, dtype=dtype)
    x[1:3] = 1.0
    x[1, 0] += torch.finfo(dtype).eps
    x[2, 0] += 100 * torch.finfo(dtype).eps
    assert center_normalize(x).any(1).tolist() == [True, False, True, True]
    values, indices = correlation_topk(x, 3)
    assert values[1].tolist() == [0.0] * 3
    assert indices[1].tolist() == [0, 2, 3]
    assert values[2].ne(0).sum() == 2


@pytest.mark.parametrize("n", [0, 1, 6])
def test_topk_without_candidates(n: int) -> None:
    values, indices = correlation_topk(torch.randn(n, 4), 3, labels=torch.zeros(n, dtype=torch.int64))
    assert values.tolist() == [[-math.inf] * 3] * n
    assert indices.tolist() == [[-1] * 3] * n


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_topk_label_dtypes(dtype: torch.dtype) -> None:
    inputs = random_search()
    expected = correlation_topk(inputs["x"], 4, labels=inputs["labels"])
    got = correlation_topk(inputs["x"], 4, labels=inputs["labels"].to(dtype))
    assert all(equal_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_topk_has_no_gradient() -> None:
    values, _ = correlation_topk(torch.randn(5, 4, requires_grad=True), 2)
    assert not values.requires_grad


@pytest.mark.parametrize("with_labels", [True, False])
def test_opcheck_of_topk(with_labels: bool) -> None:
    inputs = random_search(9, 12, dtype=torch.float32)
    labels = (inputs["labels"], inputs["ref_labels"]) if with_labels else (None, None)
    op = torch.ops.gcng.correlation_topk.default
    torch.library.opcheck(op, (inputs["x"], inputs["ref"], 3, None, *labels))
    torch.library.opcheck(op, (inputs["x"], inputs["x"], 3, torch.arange(9), None, None))


def test_compiled_topk_equals_eager() -> None:
    def search(x, labels, ref, ref_labels):
        negatives = correlation_topk(x, 3, labels=labels)
        return *negatives, *correlation_topk(x, 2, labels=labels, ref=ref, ref_labels=ref_labels)

    inputs = [random_search(n, m, dtype=torch.float32) for n, m in ((9, 12), (30, 8), (17, 40))]
    check_compiled(search, inputs, differentiate=False)


def test_topk_under_autocast_and_in_reference_mode() -> None:
    x = torch.randn(9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = correlation_topk(x.bfloat16(), 2, ref=x)
    expected = correlation_topk(x.bfloat16().float(), 2, ref=x)
    assert all(equal_bits(a, b) for a, b in zip(mixed, expected, strict=True))
    with gcng.reference_mode():
        dense = correlation_topk(x, 2)
    assert all(equal_bits(a, b) for a, b in zip(dense, definition.correlation_topk(x, 2), strict=True))


@pytest.mark.raw_memory
def test_topk_never_allocates_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "TILE_QUERIES", 64)
    monkeypatch.setattr(nearest, "TILE_REFERENCES", 128)
    x, labels = torch.randn(700, 4), torch.arange(700) // 2
    with LargestTensor() as largest:
        nearest_rows(x, x, 5, centered=True, labels=labels, reference_labels=labels)
    assert largest.elements == 64 * 128


BAD_INPUT = [
    ({"x": "x"}, TypeError, "correlation_topk: x must be a torch.Tensor, got str"),
    ({"x": torch.zeros(4)}, ValueError, r"x must be \(N, D\), got shape \(4,\)"),
    ({"x": torch.zeros(4, 0)}, ValueError, "x has no channels"),
    ({"x": torch.zeros(4, 3).long()}, TypeError, "x has dtype torch.int64"),
    ({"k": 0}, ValueError, "correlation_topk: k is 0; it must be at least 1"),
    ({"k": 2.5}, TypeError, "k must be an int, got float"),
    ({"labels": torch.zeros(3).long()}, ValueError, r"labels has shape \(3,\); expected \(4,\)"),
    ({"labels": torch.zeros(4)}, TypeError, "labels has dtype torch.float32"),
    ({"labels": torch.zeros(4, device="meta").int()}, ValueError, "labels is on meta but its samples are on cpu"),
    ({"ref": torch.zeros(5, 2)}, ValueError, r"ref has shape \(5, 2\) but x has shape \(4, 3\)"),
    ({"ref": torch.zeros(5, 3).double()}, TypeError, "x is torch.float32 but ref is torch.float64"),
    ({"ref": torch.zeros(5, 3), "labels": torch.zeros(4).long()}, ValueError, "ref_labels is missing"),
    ({"ref": torch.zeros(5, 3), "ref_labels": torch.zeros(5).long()}, ValueError, "ref_labels is given"),
    ({"ref_labels": torch.zeros(5).long()}, ValueError, "it must come with ref and labels"),
    (
        {"ref": torch.zeros(5, 3), "labels": torch.zeros(4).long(), "ref_labels": torch.zeros(4).long()},
        ValueError,
        r"ref_labels has shape \(4,\); expected \(5,\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input_of_topk(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        correlation_topk(**{"x": torch.zeros(4, 3), "k": 2} | change)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "center_normalize: x must be a torch.Tensor, got list"),
        (torch.tensor(1.0), ValueError, r"center_normalize: x must be \(N, D\), got shape \(\)"),
        (torch.zeros(2, 3, 4), ValueError, r"x must be \(N, D\), got shape \(2, 3, 4\)"),
        (torch.zeros(3, 0), ValueError, "x has no channels"),
        (torch.zeros(3, 4).bool(), TypeError, "x has dtype torch.bool; use float16"),
        (torch.zeros(3, 4).to_sparse(), TypeError, "x must be a dense strided tensor"),
    ],
)
def test_bad_input_of_center_normalize(x, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        center_normalize(x)
