"""The compiled CPU passes where offsets do not fit into 32 bits: far strides, and packed storage of many nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gcng.ops import native, nearest  # noqa: F401 (declares topk_merge)
from gcng.ops.native_pair_kernels import NativePairKernels
from gcng.ops.native_synthesis_kernels import NativeSynthesisKernels
from gcng.ops.pair_kernels import LayerDropout
from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, Synthesis
from gcng.ops.tiles import Tile, pair_count
from gcng.reference.dropout import node_identity
from tests.far_memory import APART, TOUCHED_BYTES, FarChannels, little_memory, reserved, spread
from tests.pair_passes import PASSES, Draws, Setting
from tests.run_case import equal_bits
from tests.synthesis_sides import run_passes, side_case

pytestmark = pytest.mark.skipif(native.cpu_status().path is None, reason=f"no C++ kernels: {native.cpu_status().cause}")

PAIRS, SYNTHESIS = NativePairKernels(), NativeSynthesisKernels()
DTYPES = (torch.float32, torch.float64)
FAR_NODES = 70_000  # so many that the number of a pair is beyond 2^31 too
NEAR_NODES = 23


@pytest.fixture(autouse=True)
def _little_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    with little_memory() if request.node.name != "test_much_memory_is_noticed" else contextlib.nullcontext():
        yield


def test_much_memory_is_noticed() -> None:
    with pytest.raises(AssertionError, match="MiB were touched"), little_memory():
        reserved(TOUCHED_BYTES + (8 << 20), dtype=torch.uint8).fill_(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("far_anchors", (False, True))
def test_gates_of_a_side(far_anchors: bool, mirrored: bool, dtype: torch.dtype) -> None:
    for width in (19, 64):
        case = side_case(np.random.default_rng(1), [3, 1, 2], width, anchors=slice(1, 4), mirrored=mirrored)
        near = run_passes(SYNTHESIS, case, dtype)
        far = run_passes(FarChannels(SYNTHESIS, far_anchors=far_anchors), case, dtype)
        assert all(equal_bits(far[name], expected) for name, expected in near.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_all_pairs(dtype: torch.dtype) -> None:
    draw, counts, width = torch.Generator().manual_seed(3), [2, 1, 3], 24
    n, m, boundaries = sum(counts), len(counts), (0, 2, 3, 6)
    shapes = (n, width), (n, n, width), (n, m, width), (3, 2)
    z, gate, grad, mix = (torch.rand(shape, generator=draw, dtype=dtype) for shape in shapes)
    synthesis = Synthesis(z, boundaries, torch.tensor(0.3), mix, SYNTHESIS)
    side = Side(synthesis, slice(0, n), slice(0, n), slice(None), mirrored=False)

    def results(*strides: int) -> tuple[Tensor, ...]:
        passes = SYNTHESIS.of_all_pairs(synthesis, torch.tensor([4, 0, 3, 5, 1, 2]), spread(gate, *strides))
        out, sums = torch.empty(n, m, width, dtype=dtype), EmbeddingGradients(synthesis)
        grad_gate = spread(gate, *strides)
        passes.synthesize(side, out)
        passes.write_gate_gradient(side, grad, grad_gate)
        passes.backward(side, grad, sums)
        return out, grad_gate, sums.z, sums.positive_distance

    near = results(n * width, width, 1)
    for strides in ((APART, width, 1), (width, APART, 1)):
        assert all(torch.equal(far, expected) for far, expected in zip(results(*strides), near, strict=True))


class LastNodes(Draws):
    """The draws of a setting of NEAR_NODES, which are the last of as many as ``setting`` has; all before them is 0.

    Packed storage is by rows, so its end is the packed storage of the last nodes.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.generator.manual_seed(NEAR_NODES)

    def _draw(self, dtype: torch.dtype, shape: tuple[int, ...], scale: float, offset: float) -> Tensor:
        n = self.setting.n
        rows = {n: NEAR_NODES, pair_count(n): pair_count(NEAR_NODES)}
        if n == NEAR_NODES or not shape or shape[0] not in rows:
            return super()._draw(dtype, shape, scale, offset)
        values = super()._draw(dtype, (rows[shape[0]], *shape[1:]), scale, offset)
        out = reserved(*shape, dtype=values.dtype)
        out[-len(values) :] = values
        return out

    def dropout(self, p: float = 0.3) -> LayerDropout:
        node = torch.arange(FAR_NODES)[-self.setting.n :]
        return LayerDropout(node_identity(node // 3, node % 3), torch.tensor(-7_777_777_777_777), 2, p)


@pytest.mark.parametrize("name", PASSES)
def test_pairs_of_many_nodes(name: str) -> None:
    before = FAR_NODES - NEAR_NODES
    assert pair_count(before) > 2**31
    for tile in (Tile(3, 9, 3, 23), Tile(15, 18, 20, 23)):
        ends = []
        for n, first in ((NEAR_NODES, 0), (FAR_NODES, before)):
            setting = Setting(n, 19, Tile(*(first + place for place in tile)), torch.float32)
            results = PASSES[name](PAIRS, LastNodes(setting), setting)
            rows = {n: NEAR_NODES, pair_count(n): pair_count(NEAR_NODES)}
            ends.append({key: x[-rows[len(x)] :] if x.dim() and len(x) in rows else x for key, x in results.items()})
        assert all(equal_bits(ends[1][key], expected) for key, expected in ends[0].items())


def test_columns_of_many_blocks() -> None:
    scores = torch.rand(5, 30)
    values, indices = torch.full((5, 4), -torch.inf), torch.full((5, 4), -1)
    native.cpu().topk_merge(scores, APART, None, None, None, values, indices)
    best = scores.topk(4)
    assert torch.equal(values, best.values) and torch.equal(indices, APART + best.indices)
