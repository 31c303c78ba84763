"""The Triton passes over tiles together, interpreted: the whole criterion, and the memory that they touch."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

import gcng
from gcng.kernels import edge_products, edge_wide_rows, product_tiles
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from gcng.memory import MemoryPlan
from gcng.ops.dispatch import forced_kernels
from gcng.ops.pair_kernels import PRODUCT, Edges, TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from gcng.ops.tiles import Tile, pair_count
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.pair_passes import Draws, Setting
from tests.pair_products import layer_of
from tests.test_losses import assert_same
from tests.test_losses import run as run_criterion
from tests.test_losses_golden import memory_plan
from tests.triton_interpreter import check_isolated, spread_rows

pytestmark = pytest.mark.interpreter

KERNELS = TritonPairKernels()


GUARDED = """
from dataclasses import replace
import torch
from gcng.ops.tiles import Tile
from gcng.ops.triton_pair_kernels import TritonPairKernels
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from tests.pair_passes import PASSES, Draws, Setting
from tests.pair_products import CASES
from tests.triton_interpreter import guarded
blocks = ProductSchedule(4, 2, 16, 32, 16)
schedules = EdgeProducts(blocks, blocks, blocks, blocks, blocks)
draw, empty = Draws._draw, torch.Tensor.new_empty
Draws._draw = lambda *arguments: guarded(draw(*arguments))
torch.Tensor.new_empty = lambda *arguments, **options: guarded(empty(*arguments, **options))
for tile in (Tile(2, 5, 2, 7), Tile(0, 2, 5, 7)):
    for name, run in PASSES.items():
        setting = Setting(7, 5, tile, torch.float32)
        assert run(TritonPairKernels(), Draws(setting), setting)
    for run, option in CASES.values():
        assert run(Draws(Setting(7, 5, tile, torch.float32)), schedules, option)
    wide = replace(schedules, second_map=replace(blocks, block_n=16))
    for name in ("second map", "second map packed"):
        run, option = CASES[name]
        assert run(Draws(Setting(7, 21, tile, torch.float32)), wide, option)
"""


def test_no_pass_touches_memory_behind_a_tensor() -> None:
    check_isolated(GUARDED)


def reserved(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, width) contiguous, its memory not committed before it is written."""
    return spread_rows(torch.zeros(2, width, dtype=dtype), (rows - 1) * width).as_strided((rows, width), (width, 1))


def test_packed_storage_beyond_32_bits() -> None:
    n, width, tile = 50_000, 2, Tile(49_997, 49_999, 49_997, 50_000)
    assert pair_count(n) * width > 2**31
    packed = reserved(pair_count(n), width, torch.float32)
    values = torch.randn(6, width)
    KERNELS.store(packed, n, tile, values)
    KERNELS.add_packed(packed, n, tile, values)
    loaded = KERNELS.load(packed, n, tile, torch.empty(6, width)).view(2, 3, width)
    expected = 2 * values.view(2, 3, width)
    expected[0, 1] = expected[1, 0] = values.view(2, 3, width)[0, 1] * 2 + values.view(2, 3, width)[1, 0]
    assert torch.allclose(loaded, expected)
    hidden = torch.empty(6, width)
    mean, rstd = KERNELS.hidden(packed, hidden, n, tile, packed=True)
    assert torch.allclose(hidden, torch.nn.functional.gelu(expected.view(6, width)), atol=1e-6)
    assert mean.isfinite().all() and rstd.isfinite().all()


@pytest.mark.parametrize("block_n", [32, 16], ids=["whole rows", "wide rows"])
def test_products_to_packed_storage_beyond_32_bits(block_n: int) -> None:
    n, width, tile = 50_000, 20, Tile(49_997, 49_999, 49_997, 50_000)
    assert pair_count(n) * width > 2**31
    draws = Draws(Setting(3, width, Tile(0, 2, 0, 3), torch.float32))
    x, prepared, hidden = draws.operand(6, width), layer_of(draws), draws.operand(6, 4 * width)
    mean, rstd, w2, out = draws.wide(6), draws.wide(6), torch.empty(6, width), torch.empty(6, width)
    schedule = ProductSchedule(4, 2, 16, block_n, 16)
    run = edge_products.edge_second_map if schedule.holds_rows(width) else edge_wide_rows.edge_wide_second_map
    packed, stash = (reserved(pair_count(n), width, torch.float32) for _ in range(2))
    run(hidden, x, mean, rstd, prepared, n, tile, w2, packed, True, stash, schedule)
    run(hidden, x, mean, rstd, prepared, n, tile, w2, out, False, None, schedule)
    for storage, values in ((packed, out), (stash, w2)):
        upper = torch.triu(torch.ones(2, 3)).bool().flatten()
        assert torch.equal(KERNELS.load(storage, n, tile, torch.empty(6, width))[upper], values[upper])


def test_nodes_beyond_32_bits() -> None:
    n, width = 2**30 + 8, 2
    tile = Tile(n - 4, n - 2, n - 4, n)
    nodes, grad = reserved(n, width, torch.float32), torch.randn(8, width)
    nodes[-4:] = torch.randn(4, width)
    out = reserved(n, width, torch.float32)
    KERNELS.add_product(nodes, tile, grad, out)
    near = torch.zeros(4, width)
    TorchPairKernels().add_product(nodes[-4:].clone(), Tile(0, 2, 0, 4), grad, near)
    assert torch.allclose(out[-4:], near, atol=1e-6)
    edges = KERNELS.edges(Edges(nodes, PRODUCT, n), tile, torch.empty(8, width))
    assert torch.equal(edges.view(2, 4, width), nodes[-4:-2, None] * nodes[None, -4:])


@pytest.mark.parametrize(
    ("num_layers", "kept", "fused"), ((1, False, False), (2, True, False), (1, False, True)),
    ids=["one layer", "two layers kept", "products with epilogues"],
)  # fmt: skip
def test_the_criterion_equals_the_reference(
    num_layers: int, kept: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both phases on ragged labels with dropout, every term and gradient."""
    if fused:
        schedule = ProductSchedule(4, 2, 32, 32, 16)
        monkeypatch.setattr(product_tiles, "edge_products", lambda *_: EdgeProducts(*[schedule] * 5))
    torch.manual_seed(0)
    labels = torch.tensor([4, 1, 4, 4, 2, 2, 1, 0, 3, 3, 3, 1][: 7 if kept else 12])
    criterion = gcng.losses.GCAHNGLoss(16, 5, num_layers, dropout=0.2).double()
    z = torch.randn(len(labels), 16, dtype=torch.float64)
    most = int(torch.bincount(labels).max())
    mix = torch.rand(most, most - 1, dtype=torch.float64)
    with (
        memory_plan(monkeypatch, MemoryPlan(10_000, kept, kept, kept)),
        forced_kernels(KERNELS, TorchSynthesisKernels()),
    ):
        ours = run_criterion(criterion, z, labels, mix)
    with gcng.reference_mode():
        truth = run_criterion(criterion, z, labels, mix)
    assert math.isfinite(ours[0].sum())
    assert_same(ours, truth, 1e-10)
