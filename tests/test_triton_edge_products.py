"""The products of an edge layer with epilogues, interpreted, against the steps that they replace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import edge_mlp, edge_wide_rows, message_products, product_tiles
from gcng.kernels.pair_tiles import PairSchedule
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from gcng.ops.pair_kernels import HiddenState
from gcng.ops.products import product
from gcng.ops.tiles import Tile, pair_count
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.closeness import assert_close_to_truth
from tests.pair_passes import Draws, Setting
from tests.pair_products import CASES, STEPS, check_product, layer_of
from tests.run_case import equal_bits

pytestmark = pytest.mark.interpreter

# Above every block in every dimension with a remainder: 30 pairs, 20 and 80 channels.
BLOCKS = ProductSchedule(4, 2, 16, 32, 16, group=1)
FORCED = EdgeProducts(BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCKS)
# Two blocks of channels for a row, the second one with 4 of them; programs of the norm with 2 pairs.
WIDE = replace(FORCED, second_map=replace(BLOCKS, block_n=16, group=2))
TILES = {"diagonal": Tile(1, 4, 1, 11), "beside the diagonal": Tile(0, 3, 4, 11), "one pair": Tile(10, 11, 10, 11)}
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", CASES)
def test_close_to_truth(name: str, tile: Tile, dtype: torch.dtype) -> None:
    check_product(name, FORCED, Setting(11, 20, tile, dtype))


@pytest.fixture
def several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of wide rows walks through 20 channels in 3 steps."""
    monkeypatch.setattr(edge_wide_rows, "normalize_schedule", lambda _: PairSchedule(4, 2, 2, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", ["second map", "second map packed"])
def test_wide_rows_are_close_to_truth(name: str, tile: Tile, dtype: torch.dtype, several_steps: None) -> None:
    check_product(name, WIDE, Setting(11, 20, tile, dtype))


@pytest.mark.parametrize("width", [17, 48, 65])
def test_wide_rows_of_many_blocks(width: int) -> None:
    check_product("second map", WIDE, Setting(5, width, Tile(1, 3, 1, 5), torch.float32))


class OffsetDraws(Draws):
    """Edges around a number, without spread inside a row or with one of 1."""

    spread = 1.0

    def operand(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        values = super().operand(*shape, scale=scale, offset=offset)
        return self.spread * values + 1000 if shape == (self.setting.pairs, self.setting.width) else values


class ConstantDraws(OffsetDraws):
    """Nothing but the offset is left of w2."""

    spread = 0.0

    def wide(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        return super().wide(*shape, scale=scale, offset=offset) * (shape != (self.setting.pairs,))


def test_statistics_of_a_common_offset() -> None:
    """Edges around 1000: what the blocks of a row know together is as exact as what a program that has it all knows."""
    setting = Setting(11, 20, TILES["diagonal"], torch.float32)
    run, option = CASES["second map"]
    ours, truth, baseline = (
        run(OffsetDraws(setting, kind), schedules, option)["edges"]
        for kind, schedules in ((None, WIDE), (torch.float64, None), (torch.float32, None))
    )
    assert_close_to_truth("edges", ours, truth, baseline, op_caps={torch.float32: 1e-4})


def test_wide_rows_without_spread() -> None:
    """Every gelu of a row is the same number: the norm gives exactly the bias, from any blocks."""
    setting = Setting(11, 20, TILES["diagonal"], torch.float32)
    draws = ConstantDraws(setting)
    x, prepared = draws.operand(setting.pairs, 20), layer_of(draws)
    prepared = prepared._replace(shift=torch.zeros_like(prepared.shift))
    hidden, none = torch.zeros(setting.pairs, 80), draws.wide(setting.pairs)
    w2, out = (torch.empty(setting.pairs, 20) for _ in range(2))
    arguments = hidden, x, none, none + 1, prepared, 11, setting.tile, w2, out, False, None, WIDE.second_map
    edge_wide_rows.edge_wide_second_map(*arguments)
    assert (w2 == 1000).all()
    assert torch.equal(out, prepared.layer.ln_bias.expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_are_of_what_is_stored(dtype: torch.dtype) -> None:
    """w2 as an operand: the norm of what was rounded, mean 0 and deviation 1 again."""
    setting = Setting(11, 20, TILES["diagonal"], dtype)
    draws = Draws(setting)
    x, prepared, hidden = draws.operand(setting.pairs, 20), layer_of(draws), draws.operand(setting.pairs, 80)
    mean, rstd = draws.wide(setting.pairs, scale=0.1, offset=0.4), draws.wide(setting.pairs, scale=0.1, offset=1.5)
    w2, out = torch.empty(setting.pairs, 20, dtype=dtype), torch.empty(setting.pairs, 20)
    edge_wide_rows.edge_wide_second_map(
        hidden, x, mean, rstd, prepared, 11, setting.tile, w2, out, False, None, WIDE.second_map
    )
    layer = prepared.layer
    activated = torch.nn.functional.gelu(w2.double())
    truth, baseline = (
        torch.nn.functional.layer_norm(activated.to(kind), [20], layer.ln_weight.to(kind), layer.ln_bias.to(kind))
        for kind in (torch.float64, torch.float32)
    )
    assert_close_to_truth("edges", out, truth, baseline)


@pytest.mark.parametrize("name", CASES)
def test_blocks_larger_than_the_tile(name: str) -> None:
    large = ProductSchedule(4, 2, 64, 64, 64)
    check_product(name, EdgeProducts(large, large, large, large, large), Setting(4, 10, Tile(1, 3, 1, 4)))


def test_what_ships() -> None:
    """Nothing but the narrow layers of 16 bit on Hopper and later; and a schedule for whatever may be chosen."""
    for arch in (80, 90, 100):
        for width in (8, 60, 64, 128, 256, 384, 512, 1024):
            for dtype in (torch.float64, torch.float32, *HALF):
                shipped = product_tiles.edge_products(width, dtype, arch)
                narrow = dtype in HALF and width in (64, 128) and arch >= 90
                assert (shipped.mlp is not None) == narrow
                assert replace(shipped, mlp=None) == EdgeProducts()
                available = product_tiles.available_products(width, dtype, arch)
                assert (available.first_map is not None) == (dtype in HALF and width not in (8, 60))
                assert (available.second_map is None) == (available.first_map is None)
                if available.second_map is not None:
                    assert available.second_map.holds_rows(width) == (width <= 256)
                    assert available.second_map.block_n <= 256
    assert product_tiles.available_products(1032, torch.float16, 90).second_map is None


@pytest.mark.parametrize("table", (EdgeProducts(), FORCED, WIDE), ids=["steps", "products", "wide rows"])
def test_the_methods_take_what_the_table_says(table: EdgeProducts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole layer through the methods, forward and the gradient of its hidden layer, any way."""
    chosen = table != EdgeProducts()
    monkeypatch.setattr(product_tiles, "edge_products", lambda *_: table)
    setting = Setting(11, 20, TILES["diagonal"])
    kernels, draws, tile = TritonPairKernels(), Draws(setting), setting.tile
    x, prepared = draws.operand(setting.pairs, 20), layer_of(draws)
    h0, hidden, grad, truth_grad = (draws.operand(setting.pairs, 80) for _ in range(4))
    w2, out, alone, truth = (draws.operand(setting.pairs, 20) for _ in range(4))
    statistics = kernels.first_map(x, prepared, h0, hidden, 11, tile)
    kernels.second_map(hidden, x, *statistics, prepared, 11, tile, w2, out)
    product(hidden, prepared.folded.T, truth_w2 := torch.empty_like(w2))
    STEPS.epilogue(truth_w2, x, *statistics, prepared, 11, tile, truth)
    assert (w2 - truth_w2).abs().max() < 1e-12 and (out - truth).abs().max() < 1e-12
    kernels.second_map(hidden, x, *statistics, prepared, 11, tile, torch.empty_like(w2), out.zero_(), keep=False)
    assert (out - truth).abs().max() < 1e-12
    assert kernels.edge_mlp(x, prepared, 11, tile, alone) is chosen
    assert not chosen or (alone - out).abs().max() < 1e-12
    sums, truth_sums, scaled = draws.sums(prepared), draws.sums(prepared), draws.operand(setting.pairs, 20)
    truth_sums.ff1_bias.copy_(sums.ff1_bias)
    means, state = (draws.wide(setting.pairs), draws.wide(setting.pairs)), HiddenState(h0, w2, False)
    kernels.hidden_gradient(scaled, hidden, x, state, *statistics, means, prepared, 11, tile, sums, grad)
    product(scaled, prepared.folded, truth_grad)
    STEPS.hidden_backward(truth_grad, hidden, state, *statistics, means, 11, tile, truth_sums)
    assert (grad - truth_grad).abs().max() < 1e-11
    assert (sums.ff1_bias - truth_sums.ff1_bias).abs().max() < 1e-10
    assert kernels.product_messages(x[:11], prepared.ff1_weight, prepared.ff1_bias, 11, tile, grad[:11]) is chosen


def test_repeated_runs_have_the_same_bits() -> None:
    setting = Setting(11, 20, TILES["diagonal"], torch.bfloat16)
    draws = Draws(setting)
    x, prepared, hidden = draws.operand(setting.pairs, 20), layer_of(draws), draws.operand(setting.pairs, 80)
    results = []
    for _ in range(2):
        out = torch.empty(pair_count(11), 20, dtype=torch.bfloat16)
        edge_mlp.edge_mlp(x, prepared, 11, setting.tile, out, True, BLOCKS)
        sums = torch.zeros(11, 80)
        message_products.product_messages(
            x[:11], prepared.ff1_weight, prepared.ff1_bias, 11, setting.tile, sums, None, BLOCKS
        )
        mean, rstd = torch.zeros(setting.pairs), torch.ones(setting.pairs)
        w2, edges = (torch.empty(setting.pairs, 20, dtype=kind) for kind in (torch.float32, torch.bfloat16))
        edge_wide_rows.edge_wide_second_map(
            hidden, x, mean, rstd, prepared, 11, setting.tile, w2, edges, False, None, WIDE.second_map
        )
        results.append((out, sums, w2, edges))
    assert all(equal_bits(a, b) for a, b in zip(*results, strict=True))
