"""The Triton passes over tiles together, interpreted: the whole criterion, and the memory that they touch."""

from __future__ import annotations

import math
import re

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

import gcng
from gcng.kernels import edge_products, edge_wide_rows, pair_tiles, product_tiles
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from gcng.memory import MemoryPlan
from gcng.ops.dispatch import forced_kernels
from gcng.ops.pair_kernels import PRODUCT, Edges, TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from gcng.ops.tiles import Tile, pair_count
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.closeness import assert_close_to_truth
from tests.pair_passes import PASSES, Draws, Setting
from tests.pair_products import CASES, layer_of
from tests.test_losses import assert_same
from tests.test_losses import run as run_criterion
from tests.test_losses_golden import memory_plan
from tests.triton_interpreter import check_isolated, run_isolated, spread_rows

pytestmark = pytest.mark.interpreter

KERNELS = TritonPairKernels()
# Beside the passes that say "packed": those that keep a stash, or read and write storage whatever their name.
KEEPING = ("store", "load", "load upper", "add_packed", "hidden", "messages stash", "gates summed")
STORING = re.compile("packed|stash")


GUARDED = """
from dataclasses import replace
import torch
from gcng.ops.tiles import Tile
from gcng.ops.triton_pair_kernels import TritonPairKernels
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from tests.closeness import assert_close_to_truth
from tests.pair_passes import PASSES, Draws, Setting
from tests.pair_products import CASES
from tests.triton_interpreter import guard_allocations, guarded
blocks = ProductSchedule(4, 2, 16, 32, 16)
schedules = EdgeProducts(blocks, blocks, blocks, blocks, blocks)
draw = Draws._draw
Draws._draw = lambda *arguments: guarded(draw(*arguments))
guard_allocations()  # running sums and what launchers allocate
for tile, dtype in ((Tile(2, 5, 2, 7), torch.float32), (Tile(0, 2, 5, 7), torch.float16)):
    for name, run in PASSES.items():
        setting = Setting(7, 5, tile, dtype)
        assert run(TritonPairKernels(), Draws(setting), setting)
    for run, option in CASES.values():
        assert run(Draws(Setting(7, 5, tile, dtype)), schedules, option)
    wide = replace(schedules, second_map=replace(blocks, block_n=16))
    for name in ("second map", "second map packed"):
        run, option = CASES[name]
        assert run(Draws(Setting(7, 21, tile, dtype)), wide, option)
"""


def test_no_pass_touches_memory_behind_a_tensor() -> None:
    check_isolated(GUARDED)


# A launcher that stores one row behind the running sums that it is given.
PLANTED = """
import torch
from gcng.kernels import pair_tiles
from tests.pair_passes import Draws, Setting
from gcng.ops.tiles import Tile
from tests.triton_interpreter import guard_allocations
guard_allocations()
draws = Draws(Setting(7, 5, Tile(2, 5, 2, 7), torch.float32))
sums = draws.sums(draws.prepared())
width, launch = sums.ln_bias.numel(), pair_tiles.launch
if PLANT:
    pair_tiles.launch = lambda kernel, grid, *a, **k: launch(kernel, grid, *a, **k | {"WIDTH": 8192})
pair_tiles.add_parts(torch.zeros(1, 1, 1, width), [sums.ln_bias])
"""


def test_running_sums_end_at_a_page_that_no_store_survives() -> None:
    check_isolated(PLANTED.replace("PLANT:", "False:"))
    assert run_isolated(PLANTED.replace("PLANT:", "True:")).returncode < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("number", "twice"), [(1, False), (128, False), (129, True), (1000, True)])
def test_parts_are_added_up_in_one_step_or_two(number: int, twice: bool, dtype: torch.dtype) -> None:
    parts = torch.randn(2, 3, number, 70, dtype=dtype)
    before = torch.randn(2, 3, 70, dtype=dtype)
    totals = [x.clone() for x in before]
    assert pair_tiles.adds_twice(number, 2 * 3 * 2) == twice and not pair_tiles.adds_twice(number, 10_000)
    pair_tiles.add_parts(parts, totals)
    truth, baseline = before.double() + parts.double().sum(2), before + parts.sum(2)
    for total, x, y in zip(totals, truth, baseline, strict=True):
        assert_close_to_truth("sum of parts", total, x, y, dtype=dtype)


def test_float32_parts_are_added_up_in_float64_where_the_totals_are() -> None:
    parts = torch.rand(1, 1, 300, 5) + 1e6
    total = torch.zeros(1, 5, dtype=torch.float64)
    pair_tiles.add_parts(parts, [total])
    assert torch.equal(total, parts.double().sum(2)[0])


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


class FarDraws(Draws):
    """Packed storage has P rows, of which those of the tile alone are drawn, and the others never touched."""

    def packed(self, width: int | None = None, *, wide: bool = False) -> torch.Tensor:
        draw, s = self.wide if wide else self.operand, self.setting
        width = s.width if width is None else width
        kind = self.dtype or (s.wide if wide else s.operand)
        out = reserved(pair_count(s.n), width, kind)
        for positions in upper_positions(s.n, s.tile):
            out[positions] = draw(positions.stop - positions.start, width)
        return out


def upper_positions(n: int, tile: Tile) -> list[slice]:
    """Packed positions of the pairs of a tile on or above the diagonal, row by row."""
    starts = [(row, max(row, tile.c0), row * n - row * (row - 1) // 2 - row) for row in range(tile.r0, tile.r1)]
    return [slice(start + first, start + tile.c1) for _, first, start in starts]


PACKING = [*(name for name in PASSES if "packed" in name or name in KEEPING), *(n for n in CASES if STORING.search(n))]


@pytest.mark.parametrize("name", PACKING)
def test_every_pass_reaches_packed_storage_beyond_32_bits(name: str) -> None:
    """Against plain torch, which addresses rows by 64 bits: what was touched is equal, all of it beyond 2^31."""
    n, tile, is_pass = 50_000, Tile(49_997, 49_999, 49_997, 50_000), name in PASSES
    setting = Setting(n, 2 if is_pass else 20, tile, torch.float32)
    assert pair_count(n) * setting.width > 2**31
    if is_pass:
        ours = PASSES[name](KERNELS, FarDraws(setting), setting)
        truth = PASSES[name](TorchPairKernels(), FarDraws(setting), setting)
    else:
        run, option = CASES[name]
        schedule = ProductSchedule(4, 2, 16, 32, 16)
        ours, truth = (run(FarDraws(setting), form, option) for form in (EdgeProducts(*[schedule] * 5), None))
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        places = upper_positions(n, tile) if value.dim() and len(value) == pair_count(n) else [...]
        for place in places:
            found, expected = value[place], truth[key][place]
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), (key, found, expected)


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
