"""Random tiles, widths, blocks, dtypes and data through every pass over pairs, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import edge_epilogue, edge_hidden, edge_moments, edge_prologue, gates, messages, pair_storage
from gcng.kernels.pair_tiles import PairSchedule
from gcng.ops.pair_kernels import TorchPairKernels
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.fuzz_draws import DTYPES, REGIMES, SEEDS, Choices, FuzzDraws, check_arrays
from tests.pair_passes import PASSES, Setting

pytestmark = pytest.mark.interpreter

# Cases of one kernel, of which a seed runs one. Passes that sum run add_parts_kernel too.
KERNELS = (
    ("edges product", "edges packed", "load", "load upper"), ("store", "add_packed"), ("add_product",),
    ("prologue product", "prologue packed", "prologue tile"),
    ("prologue_backward product", "prologue_backward packed", "prologue_backward tile"),
    ("hidden", "hidden in place", "hidden packed"), ("hidden_backward", "hidden_backward packed"),
    ("epilogue", "epilogue packed"),
    ("epilogue_backward", "epilogue_backward packed", "epilogue_backward packed narrow"),
    ("messages", "messages stash"), ("messages_backward", "messages_backward packed"),
    ("gates", "gates summed"), ("spread_gradient",), ("gate_logits_gradient", "gate_logits_gradient in place"),
    ("center",), ("norm_gradient",), ("moments",),
)  # fmt: skip
WHOLE_ROWS = ((edge_prologue, "prologue_schedule"), (edge_epilogue, "epilogue_schedule"))
CHANNELS = (
    (edge_prologue, "columns_schedule"), (edge_hidden, "hidden_schedule"), (edge_hidden, "hidden_backward_schedule"),
    (pair_storage, "storage_schedule"), (messages, "messages_schedule"), (gates, "gates_schedule"),
    (edge_moments, "moments_schedule"),
)  # fmt: skip


def test_every_pass_is_drawn() -> None:
    assert sorted(name for names in KERNELS for name in names) == sorted(PASSES)


def draw_blocks(choices: Choices, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few pairs, and of fewer channels than there are or more."""
    whole = max(1, 1 << (width - 1).bit_length())
    for module, name in WHOLE_ROWS:
        schedule = PairSchedule(4, 2, choices.of((2, 4, 8)), whole * choices.of((1, 1, 2)), choices.between(1, 3))
        monkeypatch.setattr(module, name, lambda *_, schedule=schedule, **__: schedule)
    for module, name in CHANNELS:
        schedule = PairSchedule(4, 2, choices.of((4, 8, 16)), choices.of((16, 32, 64)), choices.between(1, 3))
        monkeypatch.setattr(module, name, lambda *_, schedule=schedule: schedule)


@pytest.mark.parametrize("seed", SEEDS)
def test_passes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(seed, "pairs")
    dtype, regime = choices.of(DTYPES), choices.of(REGIMES)
    n, width = choices.between(1, 10), choices.of((1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 40))
    # The norm of one or two channels has no gradient: what is left are rounding errors.
    dtype, floor = (torch.float64, 1.0) if width <= 2 else (dtype, 1e-3 if dtype == torch.float64 else 0.0)
    setting = Setting(n, width, choices.tile(n, 3), dtype)
    draw_blocks(choices, width, monkeypatch)
    torch_form = TorchPairKernels()
    for names in KERNELS:
        name = choices.of(names)
        given = [(TritonPairKernels(), None, 0), (torch_form, torch.float64, 0), (torch_form, dtype, 0)]
        given += [(torch_form, torch.float64, jittered) for jittered in (1, 2)]
        # The variance of the hidden layer is a difference of squares: its contract has no rows without spread.
        values = "ties" if regime == "constant rows" and name.startswith("hidden") else regime
        ours, truth, *baselines = (
            PASSES[name](form, FuzzDraws(setting, kind, seed, values, jittered), setting)
            for form, kind, jittered in given
        )
        check_arrays(f"{name}, {regime}, {setting}", ours, truth, baselines, dtype, floor)
