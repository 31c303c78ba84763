"""The products of an edge layer with epilogues, interpreted, against the steps that they replace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import edge_mlp, message_products, product_tiles
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from gcng.ops.pair_kernels import HiddenState
from gcng.ops.products import product_to
from gcng.ops.tiles import Tile, pair_count
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.pair_passes import Draws, Setting
from tests.pair_products import CASES, STEPS, check_product, layer_of
from tests.run_case import equal_bits

pytestmark = pytest.mark.interpreter

# Above every block in every dimension with a remainder: 30 pairs, 20 and 80 channels.
BLOCKS = ProductSchedule(4, 2, 16, 32, 16, group=1)
FORCED = EdgeProducts(BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCKS)
TILES = {"diagonal": Tile(1, 4, 1, 11), "beside the diagonal": Tile(0, 3, 4, 11), "one pair": Tile(10, 11, 10, 11)}
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", CASES)
def test_close_to_truth(name: str, tile: Tile, dtype: torch.dtype) -> None:
    check_product(name, FORCED, Setting(11, 20, tile, dtype))


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
                if available.second_map is not None:
                    assert width <= available.second_map.block_n <= 256


@pytest.mark.parametrize("chosen", (False, True), ids=["steps", "products"])
def test_the_methods_take_what_the_table_says(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole layer through the methods, forward and the gradient of its hidden layer, either way."""
    table = FORCED if chosen else EdgeProducts()
    monkeypatch.setattr(product_tiles, "edge_products", lambda *_: table)
    setting = Setting(11, 20, TILES["diagonal"])
    kernels, draws, tile = TritonPairKernels(), Draws(setting), setting.tile
    x, prepared = draws.operand(setting.pairs, 20), layer_of(draws)
    h0, hidden, grad, truth_grad = (draws.operand(setting.pairs, 80) for _ in range(4))
    w2, out, alone, truth = (draws.operand(setting.pairs, 20) for _ in range(4))
    h0, hidden, *statistics = kernels.first_map(x, prepared, lambda: h0, lambda: hidden, 11, tile)
    kernels.second_map(hidden, x, *statistics, prepared, 11, tile, w2, out)
    product_to(hidden, prepared.folded.T, truth_w2 := torch.empty_like(w2))
    STEPS.epilogue(truth_w2, x, *statistics, prepared, 11, tile, truth)
    assert (w2 - truth_w2).abs().max() < 1e-12 and (out - truth).abs().max() < 1e-12
    kernels.second_map(hidden, x, *statistics, prepared, 11, tile, torch.empty_like(w2), out.zero_(), keep=False)
    assert (out - truth).abs().max() < 1e-12
    assert kernels.edge_mlp(x, prepared, 11, tile, alone) is chosen
    assert not chosen or (alone - out).abs().max() < 1e-12
    sums, truth_sums, scaled = draws.sums(prepared), draws.sums(prepared), draws.operand(setting.pairs, 20)
    truth_sums.ff1_bias.copy_(sums.ff1_bias)
    means, state = (draws.wide(setting.pairs), draws.wide(setting.pairs)), HiddenState(h0, w2, False)
    kernels.hidden_gradient(scaled, hidden, x, state, *statistics, means, prepared, 11, tile, sums, lambda: grad)
    product_to(scaled, prepared.folded, truth_grad)
    STEPS.hidden_backward(truth_grad, hidden, state, *statistics, means, 11, tile, truth_sums)
    assert (grad - truth_grad).abs().max() < 1e-11
    assert (sums.ff1_bias - truth_sums.ff1_bias).abs().max() < 1e-10
    assert kernels.product_messages(x[:11], prepared.ff1_weight, prepared.ff1_bias, 11, tile, grad[:11]) is chosen


def test_repeated_runs_have_the_same_bits() -> None:
    setting = Setting(11, 20, TILES["diagonal"], torch.bfloat16)
    draws = Draws(setting)
    x, prepared = draws.operand(setting.pairs, 20), layer_of(draws)
    results = []
    for _ in range(2):
        out = torch.empty(pair_count(11), 20, dtype=torch.bfloat16)
        edge_mlp.edge_mlp(x, prepared, 11, setting.tile, out, True, BLOCKS)
        sums = torch.zeros(11, 80)
        message_products.product_messages(
            x[:11], prepared.ff1_weight, prepared.ff1_bias, 11, setting.tile, sums, None, BLOCKS
        )
        results.append((out, sums))
    assert all(equal_bits(a, b) for a, b in zip(*results, strict=True))
