"""Random classes, views, blocks, dtypes and data through every pass of the synthesis, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import synthesis, synthesis_geometry, synthesis_gradient
from gcng.ops.synthesis_tiles import TorchSynthesisKernels
from gcng.ops.triton_synthesis_kernels import TritonSynthesisKernels
from tests.fuzz_draws import SEEDS, Choices, check_arrays, jitter
from tests.synthesis_sides import assert_same_to_rounding, draw_case, rounded, run_passes

pytestmark = pytest.mark.interpreter

WIDTHS = (1, 2, 3, 8, 15, 16, 17, 31, 33, 40)
FLOAT64 = torch.float64


@pytest.mark.parametrize("seed", SEEDS)
def test_passes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged classes, singletons, copies, all or no negatives near, any view of the tile, some gradients missing."""
    choices = Choices(seed, "synthesis")
    tile = synthesis.SynthesisTile(4, 2, choices.of((4, 8)), choices.of((4, 8, 16)), choices.of((16, 32, 64)))
    distances = synthesis_geometry.DistanceTile(4, 2, choices.of((8, 16)), choices.of((8, 16)), choices.of((16, 32)))
    for module in (synthesis, synthesis_gradient):
        monkeypatch.setattr(module, "synthesis_tile", lambda *_: tile)
    monkeypatch.setattr(synthesis_geometry, "distance_tile", lambda _: distances)
    monkeypatch.setattr(synthesis, "PROGRAMS", choices.of((1, 3, 6)))
    case = draw_case(seed, WIDTHS)
    gates = choices.of((torch.float32, torch.float16, torch.bfloat16))
    narrow = rounded(case, torch.float32, gates)
    moved = [replace(narrow, z=jitter(narrow.z, torch.float32, number)) for number in (1, 2)]
    truth, *baselines = (
        run_passes(TorchSynthesisKernels(), given, dtype)
        for given, dtype in ((narrow, FLOAT64), (narrow, torch.float32), *((given, FLOAT64) for given in moved))
    )
    # Where distances are equal up to a rounding, which of them is nearer depends on it: only float64 tells bugs then.
    sure = all(torch.equal(truth["geometry near"], baseline["geometry near"]) for baseline in baselines)
    if not sure or choices.between(0, 2) == 0:
        ours = run_passes(TritonSynthesisKernels(), case, FLOAT64)
        assert_same_to_rounding(ours, run_passes(TorchSynthesisKernels(), case, FLOAT64))
        return
    ours = run_passes(TritonSynthesisKernels(), narrow, torch.float32, gate_dtype=gates)
    check_arrays(f"{tile}, {gates}", ours, truth, baselines, torch.float32)
