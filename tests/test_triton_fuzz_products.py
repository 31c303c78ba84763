"""Random tiles, widths, blocks, dtypes and data through every product with an epilogue, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import edge_wide_rows
from gcng.kernels.pair_tiles import PairSchedule
from gcng.kernels.product_tiles import EdgeProducts, ProductSchedule
from tests.fuzz_draws import DTYPES, REGIMES, SEEDS, Choices, FuzzDraws, check_arrays
from tests.pair_passes import Setting
from tests.pair_products import CASES

pytestmark = pytest.mark.interpreter

# Cases of one kernel, of which a seed runs one; the second map for rows that a program holds, and for wider ones.
SECOND_MAP = ("second map", "second map packed")
KERNELS = (
    ("first map", "first map stash"), SECOND_MAP, SECOND_MAP, ("mlp", "mlp packed"),
    ("hidden gradient", "hidden gradient packed", "hidden gradient made again"),
    ("product messages", "product messages stash"),
)  # fmt: skip


def test_every_product_is_drawn() -> None:
    assert {name for names in KERNELS for name in names} == set(CASES)


def draw_schedules(choices: Choices, width: int, wide: bool) -> EdgeProducts:
    """Blocks of 16 to 64, and for the second map one that holds a whole row, or as a rule does not."""

    def blocks(across: int | None = None) -> ProductSchedule:
        sizes = (choices.of((16, 32)), across or choices.of((16, 32, 64)), choices.of((16, 32)))
        return ProductSchedule(4, 2, *sizes, group=choices.between(1, 3))

    whole = max(16, 1 << (width - 1).bit_length())
    second = blocks(16 if wide else whole * choices.of((1, 2)))
    return EdgeProducts(blocks(), second, blocks(), blocks(), blocks())


@pytest.mark.parametrize("seed", SEEDS)
def test_products(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(seed, "products")
    dtype, regime = choices.of(DTYPES), choices.of(REGIMES)
    n, width = choices.between(1, 12), choices.of((1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33))
    # The norm of one channel, or two, keeps no digits of what it is given.
    dtype, floor = (torch.float64, 1.0) if width <= 2 else (dtype, 1e-3 if dtype == torch.float64 else 0.0)
    setting = Setting(n, width, choices.tile(n, 4), dtype)
    steps = PairSchedule(4, 2, choices.of((4, 8, 16)), choices.of((16, 32)))
    monkeypatch.setattr(edge_wide_rows, "normalize_schedule", lambda _: steps)
    for place, names in enumerate(KERNELS):
        name = choices.of(names)
        run, option = CASES[name]
        schedules = draw_schedules(choices, width, place == 2)
        ours = run(FuzzDraws(setting, None, seed, regime), schedules, option)
        truth, *baselines = (
            run(FuzzDraws(setting, kind, seed, regime, jittered), None, option)
            for kind, jittered in ((torch.float64, 0), (dtype, 0), (torch.float64, 1), (torch.float64, 2))
        )
        check_arrays(f"{name}, {regime}, {setting}, {schedules}", ours, truth, baselines, dtype, floor)
