"""The Triton form of the gates (14), (26) and of the batch statistics, interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import edge_moments, gates
from gcng.kernels.pair_tiles import PairSchedule
from gcng.ops.pair_kernels import GateSpread
from gcng.ops.tiles import Tile
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.pair_passes import PASSES, Setting, check_pass, repeated_bits
from tests.run_case import equal_bits

pytestmark = pytest.mark.interpreter

KERNELS = TritonPairKernels()
TILES = {
    "diagonal": Tile(2, 5, 2, 11),
    "beside the diagonal": Tile(0, 3, 4, 11),
    "one pair": Tile(10, 11, 10, 11),
    "one column": Tile(0, 5, 7, 8),
}
MINE = [name for name in PASSES if name.startswith(("gate", "spread", "center", "norm", "moments"))]


@pytest.fixture(params=[False, True], ids=["one block", "several blocks"])
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedule that ships, and one that needs several blocks in every dimension."""
    if request.param:
        schedule = PairSchedule(4, 2, 2, 16, 2)
        monkeypatch.setattr(gates, "gates_schedule", lambda *_: schedule)
        monkeypatch.setattr(edge_moments, "moments_schedule", lambda *_: schedule)
    yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", MINE)
def test_close_to_truth(name: str, tile: Tile, dtype: torch.dtype, block_sizes: None) -> None:
    check_pass(name, KERNELS, Setting(11, 24, tile, dtype))


@pytest.mark.parametrize("width", [1, 3, 300])
@pytest.mark.parametrize("name", MINE)
def test_other_widths(name: str, width: int) -> None:
    check_pass(name, KERNELS, Setting(5, width, Tile(1, 3, 1, 5)))


@pytest.mark.parametrize("name", MINE)
def test_repeated_runs_have_the_same_bits(name: str, block_sizes: None) -> None:
    setting = Setting(11, 24, TILES["diagonal"], torch.bfloat16)
    first, again = (repeated_bits(name, KERNELS, setting) for _ in range(2))
    assert all(equal_bits(first[key], again[key]) for key in first)


def test_spread_of_equal_gates_is_exactly_zero() -> None:
    """(26) takes a square root: gates that all equal the center must give 0 and not a rounding error."""
    setting = Setting(6, 8, Tile(0, 3, 0, 6), torch.float32)
    spread = GateSpread(torch.full((8,), 0.5), torch.zeros(6, 8), torch.zeros((), dtype=torch.float64))
    logits = torch.zeros(setting.pairs, 8)
    KERNELS.gates(logits, 6, setting.tile, spread=spread)
    assert (logits == 0.5).all()
    assert spread.squares == 0 and not spread.row_sums.any()


def test_statistics_of_a_common_offset() -> None:
    """Edges around 1000 with a spread of 1, summed around their mean: float32 parts keep the variance."""
    values = 1000 + torch.randn(90, 24)
    total, squares = (torch.zeros(24, dtype=torch.float64) for _ in range(2))
    shift = values.mean(0)
    KERNELS.moments(values, torch.ones(90, 1), shift, total, squares)
    centered = values.double() - shift.double()
    assert torch.allclose(total, centered.sum(0), atol=1e-4)
    assert torch.allclose(squares, centered.square().sum(0), rtol=1e-6)
