"""The Triton form of the passes over a tile of pairs, interpreted: each pass, its corners, and the whole criterion."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import edge_epilogue, edge_hidden, edge_prologue, pair_storage, pair_tiles
from gcng.kernels.pair_tiles import PairSchedule
from gcng.ops.pair_kernels import PRODUCT, Edges, TorchPairKernels
from gcng.ops.tiles import Tile
from gcng.ops.triton_pair_kernels import TritonPairKernels
from gcng.reference.dropout import dropout_scales
from tests.pair_passes import PASSES, Draws, Setting, check_pass, repeated_bits
from tests.run_case import equal_bits

pytestmark = pytest.mark.interpreter

KERNELS = TritonPairKernels()
N, WIDTH = 11, 24
TILES = {
    "diagonal": Tile(2, 5, 2, 11),
    "square": Tile(0, 4, 0, 4),
    "beside the diagonal": Tile(0, 3, 4, 11),
    "one pair": Tile(10, 11, 10, 11),
    "one row": Tile(3, 4, 3, 11),
    "one column": Tile(0, 5, 7, 8),
}
MINE = [name for name in PASSES if not name.startswith(("messages", "gate", "spread", "center", "norm", "moments"))]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks in every dimension, none of them full: runs of 4 columns, 16 channels, programs of two steps."""
    whole, channels = PairSchedule(4, 2, 2, 32, 2), PairSchedule(4, 2, 4, 16, 2)
    monkeypatch.setattr(edge_prologue, "prologue_schedule", lambda *_, **__: whole)
    monkeypatch.setattr(edge_epilogue, "epilogue_schedule", lambda *_, **__: whole)
    for module, name in (
        (edge_prologue, "columns_schedule"), (edge_hidden, "hidden_schedule"),
        (edge_hidden, "hidden_backward_schedule"), (pair_storage, "storage_schedule"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_: channels)
    yield


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", MINE)
def test_equals_plain_torch(name: str, tile: Tile) -> None:
    check_pass(name, KERNELS, Setting(N, WIDTH, tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MINE)
def test_close_to_truth_over_several_blocks(name: str, dtype: torch.dtype, small_blocks: None) -> None:
    check_pass(name, KERNELS, Setting(N, WIDTH, TILES["diagonal"], dtype))


@pytest.mark.parametrize("width", [1, 3, 1100])
@pytest.mark.parametrize("name", MINE)
def test_widths_that_fill_no_block(name: str, width: int) -> None:
    # The norm of a single channel is constant: its gradients are 0, and rounding errors elsewhere.
    check_pass(name, KERNELS, Setting(4, width, Tile(1, 3, 1, 4)), scale_floor=1.0 if width == 1 else 1e-3)


def test_schedules_hold_a_whole_row_and_never_too_much() -> None:
    for width in (1, 3, 64, 512, 1000, 5000, 16384, 2**17):
        for backward in (False, True):
            schedule = pair_tiles.whole_row_schedule(width, torch.float32, backward=backward)
            assert width <= schedule.block_d < 2 * width
            assert schedule.block_j * schedule.block_d <= max(4096, schedule.block_d) < 2**20
            assert 8 <= schedule.num_warps <= 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_without_spread(dtype: torch.dtype) -> None:
    """Constant rows: the norm divides by the square root of its epsilon, and nothing is NaN."""
    setting = Setting(5, 8, Tile(0, 2, 0, 5), dtype)

    def run_pass(kernels: TorchPairKernels, kind: torch.dtype | None) -> list[torch.Tensor]:
        draws = Draws(setting, kind)
        prepared = draws.prepared()
        layer = prepared.layer._replace(value=torch.full_like(prepared.layer.value, 0.5))
        sums, x = draws.sums(prepared), draws.operand(setting.pairs, 8)
        source = Edges(torch.ones_like(draws.operand(5, 8)), PRODUCT, 5)
        mix = kernels.prologue(layer, source, setting.tile, None, x)
        grad = draws.wide(setting.pairs, 8)
        grad = kernels.prologue_backward(grad, source, mix, layer, setting.tile, sums, need_input=True)
        return [x, grad, sums.value, sums.key_query, sums.ln_weight]

    ours, truth = run_pass(KERNELS, None), run_pass(TorchPairKernels(), torch.float64)
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all()
        assert ((a - b).abs() <= bound * b.abs().max()).all()


@pytest.mark.parametrize("in_memory", (False, True))
def test_dropout_has_the_bits_of_the_reference(in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which weights are dropped, and the scale of the others, for a seed as a number and as a pointer."""
    setting = Setting(9, 8, Tile(1, 4, 1, 9))
    draws = Draws(setting)
    dropout, layer = draws.dropout(), draws.prepared().layer
    if in_memory:
        monkeypatch.setattr(edge_prologue, "seed_argument", lambda seed: seed)
    mix = KERNELS.prologue(layer, draws.source(PRODUCT), setting.tile, dropout, draws.operand(setting.pairs, 8))
    rows, columns = dropout.identity[setting.tile.rows], dropout.identity[setting.tile.columns]
    scales = dropout_scales(torch.tensor(-7_777_777_777_777), 2, 0.3, rows, columns)
    assert 0 < (scales[0] == 0).sum() < setting.pairs
    assert torch.equal(mix.weight_row, mix.gate * (scales[0] != 0) * (1 / 0.7))
    assert torch.equal(mix.weight_column, (1 - mix.gate) * (scales[1] != 0) * (1 / 0.7))


@pytest.mark.parametrize("name", ["prologue_backward product", "epilogue_backward packed", "hidden_backward"])
def test_repeated_runs_have_the_same_bits(name: str, small_blocks: None) -> None:
    setting = Setting(N, WIDTH, TILES["diagonal"], torch.bfloat16)
    first, again = (repeated_bits(name, KERNELS, setting) for _ in range(2))
    assert all(equal_bits(first[key], again[key]) for key in first)
