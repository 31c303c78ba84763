"""The compiled passes over pairs: the torch form's results on any tile, float32 precision, any number of threads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gcng
from gcng.ops import dispatch, native
from gcng.ops.native_pair_kernels import NativePairKernels
from gcng.ops.pair_kernels import PACKED, PRODUCT, TILE, EdgeLayer, Edges, LayerDropout, TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from gcng.ops.tiles import Tile
from gcng.reference.dropout import dropout_scales
from tests.mean_errors import MeanErrors
from tests.pair_passes import PASSES, Draws, Setting, check_pass, repeated_bits
from tests.run_case import equal_bits
from tests.test_losses import BATCHES, assert_same, batch_of, make_criterion, run
from tests.test_losses_golden import PLANS, memory_plan

pytestmark = pytest.mark.skipif(native.cpu_status().path is None, reason=f"no C++ kernels: {native.cpu_status().cause}")

TORCH, NATIVE = TorchPairKernels(), NativePairKernels()
# The square of the rows alone, with columns behind it, columns only, and tiles of one row and of one column.
TILES = {
    "square": Tile(3, 9, 3, 9),
    "diagonal": Tile(2, 6, 2, 19),
    "off-diagonal": Tile(0, 5, 7, 18),
    "one row": Tile(4, 5, 4, 20),
    "one column": Tile(1, 12, 13, 14),
}
FUZZED_CASES = 3000  # of each pass
FUZZED_WIDTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)


class Seeded(Draws):
    """Draws of a seed."""

    def __init__(self, setting: Setting, dtype: torch.dtype | None, seed: int) -> None:
        super().__init__(setting, dtype)
        self.generator.manual_seed(seed)


class Patterns(Seeded):
    """Draws in which some rows are 0, constant, a copy of another row, large, or hold one NaN; float64."""

    def __init__(self, setting: Setting, seed: int, nan_at: int | None = None) -> None:
        super().__init__(setting, torch.float64, seed)
        self._countdown = nan_at

    def _draw(self, dtype: torch.dtype, shape: tuple[int, ...], scale: float, offset: float) -> Tensor:
        values = super()._draw(dtype, shape, scale, offset)
        rows = values.view(-1, shape[-1]) if shape else values.view(1, 1)
        kind, row, other = torch.randint(0, 1 << 30, (3,), generator=self.generator).tolist()
        changed = rows[row % len(rows)] if len(rows) else rows
        if len(shape) == 2 and len(rows):
            if kind % 8 == 0:
                changed.zero_()
            elif kind % 8 == 1:
                changed.fill_(0.7)
            elif kind % 8 == 2:
                changed.copy_(rows[other % len(rows)].clone())
            elif kind % 8 == 3:
                changed.mul_(100.0)
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown == 0 and len(rows):
                changed[other % rows.shape[1]] = math.nan
        return values


def random_setting(seed: int, widths: tuple[int, ...] = FUZZED_WIDTHS) -> Setting:
    """A tile of up to 12 nodes, on the diagonal as often as not."""
    draw = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=draw))

    n = 1 + below(12)
    r0 = below(n)
    r1 = r0 + 1 + below(n - r0)
    c0 = r0 if r1 == n or below(2) else r1 + below(n - r1)
    c1 = (r1 if c0 == r0 else c0 + 1) + below(n - max(r1 if c0 == r0 else c0 + 1, 0) + 1)
    return Setting(n, widths[below(len(widths))], Tile(r0, r1, c0, c1))


def assert_same_numbers(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float = 1e-12) -> None:
    """Within ``bound`` of each array's largest value, NaN in the same places."""
    assert ours.keys() == truth.keys()
    for key, expected in truth.items():
        largest = max(expected.abs().max().item(), 1.0)
        difference = ours[key].double().sub(expected).abs().max().item()
        if math.isnan(largest) or math.isnan(difference):
            nan = expected.isnan()
            assert torch.equal(ours[key].isnan(), nan), key
            largest = torch.where(nan, 0.0, expected).abs().max().clamp(min=1).item()
            difference = torch.where(nan, 0.0, ours[key].double() - expected).abs().max().item()
        assert difference <= bound * largest, (key, difference, largest)


def add_draw(errors: MeanErrors, name: str, setting: Setting, seed: int) -> None:
    """Draw once more, in float32."""
    ours, baseline = (PASSES[name](form, Seeded(setting, None, seed), setting) for form in (NATIVE, TORCH))
    errors.add(ours, PASSES[name](TORCH, Seeded(setting, torch.float64, seed), setting), baseline)


@pytest.mark.parametrize("name", PASSES)
def test_fuzzed_equals_torch(name: str) -> None:
    errors, before = MeanErrors(), torch.get_num_threads()

    # A case is one number, from which all else follows: hypothesis spends more on several than a pass on its pairs.
    @settings(max_examples=FUZZED_CASES)
    @given(st.integers(0, 2**32 - 1))
    def one_case(seed: int) -> None:
        kind, threads = torch.randint(0, 24, (2,), generator=torch.Generator().manual_seed(~seed)).tolist()
        torch.set_num_threads(1 + threads % 3)
        if kind < 4:
            # In rows of few channels a single draw without variance decides; those are tested by width, below.
            setting = replace(random_setting(seed, FUZZED_WIDTHS[-9:]), operand=torch.float32)
            add_draw(errors, name, setting, seed)
            return
        patterns = kind < 14
        # The norm of a single channel is 0, and what a row of large numbers leaves of it is rounding alone.
        setting = random_setting(seed, FUZZED_WIDTHS[1:] if patterns else FUZZED_WIDTHS)
        draws = (Patterns(setting, seed) if patterns else Seeded(setting, torch.float64, seed) for _ in range(2))
        ours, truth = (PASSES[name](form, next(draws), setting) for form in (NATIVE, TORCH))
        # Rows of few channels often have hardly any variance, and a norm then multiplies roundings by up to 300.
        assert_same_numbers(ours, truth, 1e-8 if patterns else 1e-12 if setting.width > 4 else 3e-11)

    try:
        one_case()
    finally:
        torch.set_num_threads(before)
    errors.check()


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_as_accurate_as_torch(name: str, dtype: torch.dtype, tile: Tile) -> None:
    for width in (31, 64, 130, 512):
        check_pass(name, NATIVE, Setting(20, width, tile, dtype))


def assert_as_accurate_in_the_mean(name: str, setting: Setting, rounds: int) -> None:
    """Root mean square over draws of each array's relative error: at most twice that of torch's float32 form."""
    errors = MeanErrors()
    for seed in range(rounds):
        add_draw(errors, name, setting, seed)
    errors.check()


@pytest.mark.parametrize("width", (2, 3, 5, 8, 100))
@pytest.mark.parametrize("name", PASSES)
def test_as_accurate_as_torch_where_few_numbers_decide(name: str, width: int) -> None:
    # A row without variance has a thousand times the error of others in either form, and one pair is a single draw.
    tile = TILES["diagonal"] if width < 100 else Tile(3, 4, 3, 4)
    assert_as_accurate_in_the_mean(name, Setting(20, width, tile, torch.float32), 12)


@pytest.mark.parametrize("name", PASSES)
def test_several_blocks(name: str) -> None:
    # Blocks are of 1,024 pairs and of 32 columns at most.
    for tile, width in ((Tile(0, 3, 0, 300), 8), (Tile(0, 30, 30, 90), 130), (Tile(10, 20, 10, 90), 512)):
        assert_as_accurate_in_the_mean(name, Setting(tile.c1 + 1, width, tile, torch.float32), 2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_any_number_of_threads_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            results.append(repeated_bits(name, NATIVE, Setting(100, 130, Tile(10, 20, 10, 90), dtype)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(equal_bits(other[key], value) for key, value in results[0].items())


@pytest.mark.parametrize("name", PASSES)
def test_nan_goes_where_torch_puts_it(name: str) -> None:
    for seed in range(60):
        setting = random_setting(seed, (1, 5, 16, 19))
        ours, truth = (PASSES[name](form, Patterns(setting, seed, seed % 20), setting) for form in (NATIVE, TORCH))
        assert all(torch.equal(ours[key].isnan(), expected.isnan()) for key, expected in truth.items()), seed


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("stashing", (False, True), ids=("alone", "stash"))
@pytest.mark.parametrize("tile", TILES)
def test_the_bias_of_the_first_map_is_added_in_its_pass(tile: str, stashing: bool, dtype: torch.dtype) -> None:
    setting = Setting(20, 33, TILES[tile], dtype)
    draws = Draws(setting, dtype)
    x, prepared = draws.operand(setting.pairs, 33), draws.prepared()._replace(ff1_weight=draws.operand(132, 33))
    results = []
    for form in (NATIVE, TORCH):
        stash = torch.full((20 * 21 // 2, 132), torch.nan, dtype=dtype) if stashing else None
        room = torch.full((setting.pairs, 132), torch.nan, dtype=dtype)
        statistics = form.first_map(x, prepared, room, room, 20, setting.tile, stash=stash)
        results.append([room, *statistics, *([stash] if stashing else [])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12 if dtype == torch.float64 else 1e-5, equal_nan=True)


# -- the functions of csrc/gelu.h in float32 ---------------------------------------------------------------------


def grid() -> Tensor:
    """Every scale from the smallest number to where all three functions are constant, and a dense middle."""
    ends = torch.logspace(-44, 2, 60_001, dtype=torch.float64)
    return torch.cat([torch.linspace(-16, 16, 400_000, dtype=torch.float64), ends, -ends]).float()[: 32 * 16_250]


def in_rows(function, x: Tensor, width: int = 32) -> Tensor:
    """A pass over rows of one tile as a function of numbers."""
    rows = x.view(-1, width)
    return function(rows.clone(), rows.shape[0], Tile(0, 1, 0, rows.shape[0])).view(-1)


def gelu(rows: Tensor, n: int, tile: Tile) -> Tensor:
    NATIVE.hidden(rows, rows, n, tile)
    return rows


def slope(rows: Tensor, n: int, tile: Tile) -> Tensor:
    grad = torch.zeros_like(rows)
    grad[0] = 1
    out = torch.empty_like(rows)
    NATIVE.messages_backward(grad, rows, n, tile, out, torch.zeros(rows.shape[1]))
    return out


def sigmoid(rows: Tensor, n: int, tile: Tile) -> Tensor:
    NATIVE.gates(rows, n, tile)
    return rows


def test_gelu_of_every_scale() -> None:
    x = grid()
    exact = x.double()
    truth = exact * 0.5 * torch.erfc(-exact / math.sqrt(2))
    error = (in_rows(gelu, x).double() - truth).abs()
    normal = truth.abs() > 2**-100
    # Also in the far negative tail, where 1 + erf has no digit left; without FMA the square in its exponent is rounded.
    rounded = exact.square() * 2**-24 if "baseline" in native.cpu_status().path.name else torch.zeros_like(exact)
    assert (error / truth.abs() - rounded)[normal].max() <= 4.5e-7
    assert (error / truth.abs().clamp(min=0.5)).max() <= 2e-7
    assert error[~normal].max() <= 2**-115


def test_slope_of_every_scale() -> None:
    x = grid()
    exact = x.double()
    density = torch.exp(-exact.square() / 2) / math.sqrt(2 * math.pi)
    truth = 0.5 * torch.erfc(-exact / math.sqrt(2)) + exact * density
    error = (in_rows(slope, x).double() - truth).abs()
    assert error.max() <= 2e-7
    assert (error / truth.abs())[x > 0].max() <= 3.2e-7
    far = (x < -1.5) & (x > -5)
    assert (error / truth.abs())[far].max() <= 3e-6  # a difference of two larger numbers


def test_sigmoid_of_every_scale() -> None:
    x = grid()
    truth = torch.sigmoid(x.double())
    error = (in_rows(sigmoid, x).double() - truth).abs()
    assert (error / truth)[truth > 2**-125].max() <= 2.5e-7
    assert error.max() <= 1e-7


@pytest.mark.parametrize("width", (1, 20))
def test_special_values(width: int) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40, 3e38, -3e38, 14.0, -14.0])
    x = torch.cat([x, torch.tensor([13.3, -13.3, 14.5, -14.5, 88.0, -88.0, -103.0])])
    wide = x.double()  # torch's own float32 form gives NaN for inf in a vector and inf in its remainder
    truth = F.gelu(wide), torch.ops.aten.gelu_backward(torch.ones_like(wide), wide), torch.sigmoid(wide)
    for function, expected in zip((gelu, slope, sigmoid), truth, strict=True):
        torch.testing.assert_close(in_rows(function, x, width).double(), expected, rtol=2e-7, atol=1e-8, equal_nan=True)


# -- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", (1e-12, 0.1, 0.5, 0.999, 1 - 1e-12))
def test_dropout_bits(p: float) -> None:
    draw = torch.Generator().manual_seed(1)
    for layer, seed in ((0, 0), (3, -1), (2**31, 2**63 - 1), (1, -(2**63))):
        identity = torch.randint(-(2**63), 2**63 - 1, (40,), generator=draw)
        identity[7] = identity[30]
        zeros = torch.zeros(40, 3)
        nodes = EdgeLayer(zeros, zeros[:, 0].contiguous(), zeros, *[None] * 6, torch.ones(3), torch.zeros(3))
        tile = Tile(2, 11, 2, 40)
        dropout = LayerDropout(identity, torch.tensor(seed), layer, p)
        mix = NATIVE.prologue(nodes, Edges(zeros, PRODUCT, 40), tile, dropout, torch.empty(9 * 38, 3))
        scales = dropout_scales(dropout.seed, layer, p, identity[tile.rows], identity[tile.columns])
        assert bool((mix.gate == 0.5).all())
        assert torch.equal(mix.weight_row, 0.5 * scales[0].float())
        assert torch.equal(mix.weight_column, 0.5 * scales[1].float())


# -- the pipeline ------------------------------------------------------------------------------------------------


def test_a_wrong_tile_or_tensor_is_refused() -> None:
    values, packed = torch.zeros(6, 4), torch.zeros(10, 4)
    for tile in (Tile(0, 2, 1, 4), Tile(2, 5, 2, 4), Tile(0, 2, 0, 5), Tile(2, 1, 2, 4)):
        with pytest.raises(RuntimeError, match="no tile of 4 nodes"):
            NATIVE.store(packed, 4, tile, values)
    for wrong in (values[:5], values.double(), torch.zeros(4, 6).t()):
        with pytest.raises(RuntimeError, match="values"):
            NATIVE.store(packed, 4, Tile(0, 2, 0, 3), wrong)
    with pytest.raises(RuntimeError, match="packed"):
        NATIVE.store(packed[:9], 4, Tile(0, 2, 0, 3), values)


def test_no_pairs_leave_sums_as_they_are() -> None:
    rows, weights, sums = torch.empty(0, 5), torch.empty(0, 1), torch.arange(5.0)
    totals = sums.double(), sums.double()
    NATIVE.moments(rows, weights, sums, *totals)
    NATIVE.gate_logits_gradient(rows, rows, rows, sums)
    NATIVE.center(rows, sums, rows)
    NATIVE.norm_gradient(rows, rows, weights, sums, sums, sums)
    NATIVE.messages(rows, 4, Tile(0, 2, 4, 4), nodes := torch.ones(4, 5))
    assert torch.equal(sums, torch.arange(5.0)) and torch.equal(totals[0], totals[1]) and bool((nodes == 1).all())


@pytest.mark.parametrize("kind", (PRODUCT, PACKED, TILE))
def test_inputs_are_not_touched(kind: str) -> None:
    setting = Setting(9, 20, Tile(1, 4, 1, 9), torch.float32)
    draws = Draws(setting)
    prepared, source = draws.prepared(), draws.source(kind)
    inputs = [*prepared.layer, source.values]
    copies = [x.clone() for x in inputs]
    mix = NATIVE.prologue(prepared.layer, source, setting.tile, None, draws.operand(setting.pairs, 20))
    weights = [x.clone() for x in mix[:3]]
    grad, sums = draws.wide(setting.pairs, 20), draws.sums(prepared)
    NATIVE.prologue_backward(grad, source, mix, prepared.layer, setting.tile, sums, need_input=True)
    assert all(equal_bits(a, b) for a, b in zip([*inputs, *mix[:3]], [*copies, *weights], strict=True))


def forced():
    return dispatch.forced_kernels(NATIVE, TorchSynthesisKernels())


@pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_layers", (1, 2))
def test_criterion_equals_the_reference(num_layers: int, name: str, plan, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, (z, y, mix) = make_criterion(num_layers), batch_of(BATCHES[name])
    with memory_plan(monkeypatch, plan), forced():
        ours = run(criterion, z, y, mix)
    with gcng.reference_mode():
        truth = run(criterion, z, y, mix)
    assert_same(ours, truth)
