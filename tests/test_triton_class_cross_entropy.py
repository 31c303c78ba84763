"""The Triton kernels of (24), interpreted: the op's cases through the closeness gate, then their own corners."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import class_cross_entropy as kernels
from gcng.ops import class_cross_entropy as op
from gcng.ops import streamed_logits
from tests.closeness import assert_error_does_not_grow, relative_error
from tests.mutants import OPERATIONS
from tests.op_checks import LargestTensor
from tests.run_case import equal_bits
from tests.triton_interpreter import check_isolated, spread_rows

pytestmark = pytest.mark.interpreter

OPERATION = replace(OPERATIONS["linear_cross_entropy"], function=op.linear_cross_entropy)
# float64 and float16 run the same code as float32 and bfloat16: what depends on digits and range is enough of them.
ALSO = {torch.float64: ("tails, diffuse",), torch.float16: ("tails, confident", "tails, saturated", "many_chunks")}
RUNS = [
    (case, dtype)
    for case, dtype in OPERATION.all_runs()
    if dtype in (torch.float32, torch.bfloat16) or case.name.startswith(ALSO[dtype])
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Above every block in every dimension, with a remainder: 3 tiles of rows, 4 of classes, 3 of channels.
ROWS, CLASSES, WIDTH = 37, 101, 40


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows x 32 classes x 16 channels, panels of 2 x 2 tiles, few programs: several of each."""
    monkeypatch.setattr(kernels, "logit_tile", lambda *_: kernels.LogitTile(4, 2, 16, 32, 16))
    monkeypatch.setattr(kernels, "panel_shape", lambda rows, classes, *_: (min(rows, 32), min(classes, 64)))
    monkeypatch.setattr(kernels, "PROGRAMS", 6)


@pytest.fixture
def op_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op, with its loops replaced by the launchers."""
    monkeypatch.setattr(op, "streamed_logsumexp", kernels.streamed_logsumexp_forward)
    monkeypatch.setattr(op, "streamed_logit_gradient", kernels.streamed_logit_gradient)


@pytest.fixture(params=[True, False], ids=["panels", "no panels"])
def either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient through panels, and without them for any dtype and width: making one fails, where there are rows."""
    if not request.param:
        monkeypatch.setattr(kernels, "WITHOUT_PANELS", True)
        monkeypatch.setattr(kernels, "takes_no_panel", lambda *_: True)
        monkeypatch.setattr(kernels, "_panel_unit", lambda *_: torch.ones(()))
        monkeypatch.setattr(kernels, "_panel_maker", lambda rows, *_: len(rows) and pytest.fail("a panel was made"))


def inputs_of(rows: int, classes: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(rows, width, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, width, dtype=torch.float64).to(dtype)
    return x, weight, torch.randn(classes, dtype=torch.float64).to(dtype), torch.randint(classes, (rows,))


def both_passes(functions, x, weight, bias, target, scale, **needs) -> Iterator[Tensor]:
    forward, backward = functions
    lse, logit = forward(x, weight, bias, target)
    yield lse
    yield logit
    yield from backward(x, weight, bias, target, lse, scale, **{"need_weight": True, **needs})


TORCH = streamed_logits.streamed_logsumexp, streamed_logits.streamed_logit_gradient
TRITON = kernels.streamed_logsumexp_forward, kernels.streamed_logit_gradient


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=[f"{c.name}-{c.layout}-{c.upstream}-{d}" for c, d in RUNS])
def test_close_to_truth(case, dtype, op_on_kernels, monkeypatch) -> None:
    # An interpreted program takes as long for a large tile as for a small one.
    block_rows = 128 if case.name.startswith("many_chunks") else 32
    monkeypatch.setattr(kernels, "logit_tile", lambda *_: kernels.LogitTile(4, 2, block_rows, 32, 32))
    monkeypatch.setattr(kernels, "panel_shape", lambda *_: (block_rows, 64))
    assert OPERATION.run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_blocked_path(dtype: torch.dtype, with_bias: bool, either_form: None) -> None:
    """Results, their dtypes and shapes, scales of rows that differ by orders of magnitude, all strides odd."""
    x, weight, bias, target = inputs_of(2 * ROWS, CLASSES, 2 * WIDTH, dtype)
    x, weight, target = x[::2, ::2], weight.T.contiguous().T[:, 1::2], target[::2]
    bias = torch.stack([bias, bias], 1)[:, 1] if with_bias else None
    scale = torch.randn(ROWS) * 10.0 ** torch.linspace(-3, 3, ROWS)
    inputs = x, weight, bias, target, scale
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for ours, blocked in zip(both_passes(TRITON, *inputs), both_passes(TORCH, *inputs), strict=True):
        if blocked is None:
            assert ours is None
            continue
        assert (ours.dtype, ours.shape) == (blocked.dtype, blocked.shape)
        assert (ours - blocked).norm() <= tolerance * blocked.norm()


@pytest.mark.parametrize("name", ["tails, diffuse", "tails, confident", "tails, saturated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_close_to_truth_without_panels(name: str, dtype: torch.dtype, op_on_kernels, monkeypatch) -> None:
    """With the unit of 16-bit gradients."""
    monkeypatch.setattr(kernels, "WITHOUT_PANELS", True)
    monkeypatch.setattr(kernels, "takes_no_panel", lambda *_: True)
    monkeypatch.setattr(kernels, "_panel_maker", None)
    case = next(case for case in OPERATION.cases if case.name.startswith(name))
    assert OPERATION.run(case, dtype)


def test_panels_ship() -> None:
    """Nothing here is timed: only 16-bit rows of up to 128 channels could do without panels, and none do."""
    assert not kernels.WITHOUT_PANELS
    wanted = [
        (dtype, width)
        for dtype in DTYPES
        for width in (8, 16, 64, 72, 128, 512)
        if kernels.takes_no_panel(dtype, width)
    ]
    assert wanted == [(dtype, width) for dtype in (torch.float16, torch.bfloat16) for width in (16, 64, 128)]


@pytest.mark.parametrize("width", [144, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_that_ship(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them and a remainder in each direction, over panels of two tiles."""
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "panel_shape", lambda *_: (256, 256))
    inputs = (*inputs_of(300, 290, width, dtype), torch.rand(300))
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for ours, blocked in zip(both_passes(TRITON, *inputs), both_passes(TORCH, *inputs), strict=True):
        assert (ours - blocked).norm() <= tolerance * blocked.norm()


def test_rows_that_are_sure_keep_their_digits() -> None:
    """A lead of 12 at a logit of 96: the loss is 2.4e-4, of which a log-sum-exp in float32 costs 1e-2."""
    weight = torch.full((40, 16), 0.875)
    weight[torch.arange(16), torch.arange(16)] = 1.0
    x = 96 * torch.eye(16)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = x.to(dtype), weight.to(dtype), None, torch.arange(16), torch.ones(16, dtype=dtype)
        lse, logit, _, grad_weight, _ = both_passes(TRITON, *inputs)
        results.append((lse - logit.double(), grad_weight))
    truth = torch.full((16,), math.log1p(39 * math.exp(-12)), dtype=torch.float64)
    torch.testing.assert_close(results[1][0], truth, rtol=1e-9, atol=0)
    for float32, float64 in zip(*results, strict=True):
        assert (float32 - float64).norm() <= 1e-3 * float64.norm()


@pytest.mark.parametrize("target", [-1, -100, CLASSES, 2**40, -(2**62)])
def test_target_outside_the_classes_is_never_plausible(target: int) -> None:
    x, weight, bias, targets = inputs_of(ROWS, CLASSES, WIDTH, torch.float32)
    targets[20] = target
    lse, logit, grad_rows, grad_weight, grad_bias = both_passes(TRITON, x, weight, bias, targets, torch.ones(ROWS))
    assert not lse.isnan().any()
    only = [row == 20 for row in range(ROWS)]
    assert logit.isnan().tolist() == only
    assert grad_rows.isnan().all(1).tolist() == only == grad_rows.isnan().any(1).tolist()
    assert grad_weight.isnan().all()
    assert grad_bias.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_not_finite_rows_stay_alone(value: float, dtype: torch.dtype, either_form: None) -> None:
    x, weight, bias, target = inputs_of(ROWS, CLASSES, WIDTH, dtype)
    x[20, 3] = value
    ours = list(both_passes(TRITON, x, weight, bias, target, torch.ones(ROWS)))
    blocked = list(both_passes(TORCH, x, weight, bias, target, torch.ones(ROWS)))
    others = torch.arange(ROWS) != 20
    for a, b in zip(ours[:3], blocked[:3], strict=True):
        assert not torch.isfinite(b[20]).all()
        assert not torch.isfinite(a[20]).all()
        assert torch.isfinite(a[others]).all()
    assert not torch.isfinite(ours[3]).any()


@pytest.mark.parametrize(("rows", "classes", "width"), [(0, 5, 8), (5, 1, 8), (1, 1, 1), (3, 2, 1), (16, 32, 16)])
def test_smallest_sizes(rows: int, classes: int, width: int, either_form: None) -> None:
    x, weight, bias, target = inputs_of(rows, classes, width, torch.float64)
    inputs = x, weight, bias, target, torch.randn(rows, dtype=torch.float64)
    for ours, blocked in zip(both_passes(TRITON, *inputs), both_passes(TORCH, *inputs), strict=True):
        torch.testing.assert_close(ours, blocked, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_and_do_not_depend_on_what_else_is_wanted(dtype: torch.dtype, either_form: None) -> None:
    inputs = (*inputs_of(ROWS, CLASSES, WIDTH, dtype), torch.randn(ROWS))
    first = list(both_passes(TRITON, *inputs))
    assert all(equal_bits(a, b) for a, b in zip(first, both_passes(TRITON, *inputs), strict=True))
    rows_only = list(both_passes(TRITON, *inputs, need_weight=False))
    assert equal_bits(rows_only[2], first[2])
    assert rows_only[3:] == [None, None]
    bias_only = list(both_passes(TRITON, *inputs, need_weight=False, need_rows=False, need_bias=True))
    assert bias_only[2:4] == [None, None]
    assert equal_bits(bias_only[4], first[4])


def test_weight_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, 1 against 64 panels of rows: the error must not grow with their number."""
    x, weight, bias, target = inputs_of(256, 20, 16, torch.bfloat16)
    monkeypatch.setattr(kernels, "logit_tile", lambda *_: kernels.LogitTile(4, 2, 16, 32, 16))
    exact = list(both_passes(TORCH, x.double(), weight.double(), bias.double(), target, torch.ones(256)))
    errors = []
    for rows in (256, 4):
        monkeypatch.setattr(kernels, "panel_shape", lambda *_, rows=rows: (rows, 20))
        grads = list(both_passes(TRITON, x, weight, bias, target, torch.ones(256)))[2:]
        errors.append([relative_error(a, b) for a, b in zip(grads, exact[2:], strict=True)])
    few, many = errors
    assert_error_does_not_grow("grad weight", few[1], many[1])
    assert max(many[:2]) < 4e-3
    assert many[2] < 1e-6  # returned in float32


@pytest.mark.raw_memory
def test_nothing_of_size_rows_by_classes_is_allocated() -> None:
    x, weight, bias, target = inputs_of(120, 400, 4, torch.float32)
    with LargestTensor() as largest:
        list(both_passes(TRITON, x, weight, bias, target, torch.ones(120)))
    # The panel was seen, by the interpreter as bytes, and nothing larger.
    assert largest.elements == 32 * 64 * 4 < 120 * 400


GUARDED = """
import torch
from gcng.kernels import class_cross_entropy as kernels
from tests.triton_interpreter import guard_allocations, guarded
kernels.logit_tile = lambda *_: kernels.LogitTile(4, 2, 16, 32, 16)
kernels.panel_shape = lambda rows, classes, *_: (min(rows, 32), min(classes, 64))
kernels.WITHOUT_PANELS, kernels.PROGRAMS = {without}, 6
kernels.takes_no_panel, kernels._panel_unit = lambda *_: True, lambda *_: torch.ones(())
rows, classes, width = {sizes}
x, weight, bias = (torch.randn(shape) for shape in ((rows, width), (classes, width), (classes,)))
target, scale = torch.randint(classes, (rows,)), torch.randn(rows)
def run(*inputs):
    lse, logit = kernels.streamed_logsumexp_forward(*inputs[:4])
    return lse, logit, *kernels.streamed_logit_gradient(*inputs[:4], lse, inputs[4], need_weight=True)
expected = run(x, weight, bias, target, scale)
guard_allocations()
got = run(*map(guarded, (x, weight, bias, target, scale)))
assert all(torch.equal(a, b) for a, b in zip(expected, got))
"""


@pytest.mark.parametrize("panels", [True, False])
@pytest.mark.parametrize("sizes", [(37, 101, 40), (33, 65, 17), (5, 3, 7)])
def test_no_access_outside_the_tensors(sizes: tuple[int, int, int], panels: bool) -> None:
    check_isolated(GUARDED.format(sizes=sizes, without=not panels))


def test_offsets_beyond_32_bits() -> None:
    """Rows and weights spread over more than 2^31 elements, where the overflow check is on."""
    x, weight, bias, target = inputs_of(3, 3, 8, torch.float16)
    expected = list(both_passes(TRITON, x, weight, bias, target, torch.ones(3)))
    far_x, far_weight = spread_rows(x, 2**30 + 8), spread_rows(weight, 2**30 + 24)
    lse, logit = kernels.streamed_logsumexp_forward(far_x, far_weight, bias, target)
    make = kernels._panel_maker(far_x, far_weight, bias, target, lse, torch.ones(3), True)
    panel, bias_parts = make(slice(0, 3), slice(0, 3))
    assert equal_bits(lse, expected[0])
    assert equal_bits(logit, expected[1])
    torch.testing.assert_close(bias_parts.sum(0), expected[4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(panel.float() @ weight.float(), expected[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_channels_far_apart(dtype: torch.dtype, either_form: None) -> None:
    """Transposed rows and weights: a step of a block of channels is more than 2^31 elements."""
    x, weight, bias, target = inputs_of(3, 3, 128, dtype)
    expected = list(both_passes(TRITON, x, weight, bias, target, torch.ones(3)))
    far_x, far_weight = (spread_rows(values.T, 2**27).T for values in (x, weight))
    for got, wanted in zip(both_passes(TRITON, far_x, far_weight, bias, target, torch.ones(3)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_last_of_all_classes() -> None:
    """C = 2^31 - 1 rows of weight, all at one address: the last tile of classes, whose end is no int32."""
    classes = 2**31 - 1
    x, row = torch.randn(5, 16), torch.randn(16)
    weight, target = row.expand(classes, 16), torch.tensor([classes - 1, 0, classes - 3, classes - 40, 5])
    lse = (x @ row).double() + math.log(2.0)
    make = kernels._panel_maker(x, weight, None, target, lse, torch.ones(5), False)
    panel = make(slice(0, 5), slice(classes - 40, classes))[0]
    expected = torch.full((5, 40), 0.5)
    expected[[0, 2, 3], [39, 37, 0]] -= 1
    torch.testing.assert_close(panel, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [1, 127, 11318, 2**20, 2**31 - 1])
@pytest.mark.parametrize("rows", [0, 1, 300, 32768, 2**22])
def test_launch_tables_cover_all_classes(rows: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dtype in DTYPES:
        tile = kernels.logit_tile(dtype, 512, False)
        splits, per_split = kernels.class_splits(rows, classes, tile)
        tiles = -(-classes // tile.block_classes)
        assert (splits - 1) * per_split < tiles <= splits * per_split
        assert splits <= kernels.PROGRAMS
        panel_rows, panel_classes = kernels.panel_shape(rows, classes, 512, tile)
        assert panel_rows * panel_classes <= kernels.PANEL
        assert panel_rows == rows or panel_rows % tile.block_rows == 0
        assert panel_classes > 0
        assert panel_classes == classes or panel_classes % tile.block_classes == 0
