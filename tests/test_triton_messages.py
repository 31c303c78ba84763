"""The Triton form of the messages (7), interpreted: forward and backward around their product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import messages as kernels
from gcng.kernels.pair_tiles import PairSchedule
from gcng.ops.dispatch import forced_kernels
from gcng.ops.messages import messages
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from gcng.ops.tiles import Tile
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.edge_chains import gradients, make_edge_case, worst_error
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
MINE = [name for name in PASSES if name.startswith("messages")]


@pytest.fixture(params=[False, True], ids=["one block", "several blocks"])
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedule that ships, and one that needs several blocks in every dimension."""
    if request.param:
        monkeypatch.setattr(kernels, "messages_schedule", lambda *_: PairSchedule(4, 2, 2, 16, 2))
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


@pytest.mark.parametrize("stash", (False, True))
def test_the_op_equals_plain_torch(stash: bool) -> None:
    """The op on two kinds of tiles, with every gradient; products of the nodes as edges."""
    case = make_edge_case([0, 0, 0, 1, 1, 2, 3])
    weight, bias = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((8, 8), (8,)))
    upstream, leaves = torch.randn(7, 8, dtype=torch.float64), [case.z, weight, bias]

    def run(form: TorchPairKernels) -> list[torch.Tensor]:
        base, packed, _, *rest = case.field()
        with forced_kernels(form, TorchSynthesisKernels()):
            out, _ = messages(base, packed, [], *rest, weight, bias, 7, stash)
            return [out, *gradients((out * upstream).sum(), leaves)]

    assert worst_error(run(KERNELS), run(TorchPairKernels())) <= 1e-12
