"""The Triton passes over a tile of pairs on a GPU, at the sizes of tiles that training has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels.launch import architecture
from gcng.kernels.product_tiles import available_products
from gcng.ops.tiles import Tile
from gcng.ops.triton_pair_kernels import TritonPairKernels
from tests.pair_passes import PASSES, Draws, Setting, check_pass, repeated_bits
from tests.pair_products import CASES, check_product
from tests.run_case import equal_bits

pytestmark = pytest.mark.gpu

KERNELS = TritonPairKernels()
# Packed storage of a hidden layer in float64 has to fit beside: fewer nodes where a pass reads or writes one.
PACKING = [name for name in PASSES if name.startswith(("hidden", "store", "load", "add_packed"))]
PACKING += [name for name in PASSES if name.endswith(("packed", "stash", "summed"))]


def setting_of(name: str, width: int, dtype: torch.dtype) -> Setting:
    """16 rows by 2048 columns on the diagonal, or 528 for a pass that packs."""
    n = 544 if name in PACKING else 2064
    return Setting(n, width, Tile(16, 32, 16, n), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [512, 384])
@pytest.mark.parametrize("name", PASSES)
def test_close_to_truth(name: str, width: int, dtype: torch.dtype) -> None:
    check_pass(name, KERNELS, setting_of(name, width, dtype))


@pytest.mark.parametrize("tile", [Tile(0, 5, 40, 63), Tile(60, 63, 60, 63), Tile(62, 63, 62, 63)], ids=str)
@pytest.mark.parametrize("width", [1, 8, 31, 1100, 5000])
@pytest.mark.parametrize("name", PASSES)
def test_other_shapes(name: str, width: int, tile: Tile) -> None:
    dtype = torch.float64 if width == 1 else torch.float32
    check_pass(name, KERNELS, Setting(63, width, tile, dtype, "cuda"), scale_floor=1.0 if width == 1 else 1e-3)


@pytest.mark.long
@pytest.mark.parametrize(("width", "dtype"), [(512, torch.bfloat16), (384, torch.float32)], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_250_runs_have_the_same_bits(name: str, width: int, dtype: torch.dtype) -> None:
    setting = Setting(544, width, Tile(16, 32, 16, 544), dtype, "cuda")
    first = repeated_bits(name, KERNELS, setting)
    for _ in range(249):
        again = repeated_bits(name, KERNELS, setting)
        assert all(equal_bits(first[key], again[key]) for key in first)


def products_of(name: str, width: int, dtype: torch.dtype):
    """Schedules of the products with epilogues, or a skip where a width has no kernel of this kind."""
    schedules = available_products(width, dtype, architecture(torch.device("cuda", 0)))
    field = {"first": "first_map", "second": "second_map", "mlp": "mlp", "hidden": "hidden_gradient"}
    if getattr(schedules, field.get(name.split()[0], "messages")) is None:
        pytest.skip(f"{name} has no kernel for {width} channels")
    return schedules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1000, 512, 384, 256, 192, 128, 72, 31])
@pytest.mark.parametrize("name", CASES)
def test_products_with_epilogues(name: str, width: int, dtype: torch.dtype) -> None:
    setting = Setting(544, width, Tile(16, 32, 16, 544), dtype, "cuda")
    check_product(name, products_of(name, width, dtype), setting)


@pytest.mark.long
@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("name", CASES)
def test_250_products_have_the_same_bits(name: str, width: int) -> None:
    schedules = products_of(name, width, torch.bfloat16)
    setting = Setting(300, width, Tile(9, 20, 9, 300), torch.bfloat16, "cuda")
    run, option = CASES[name]
    first = run(Draws(setting), schedules, option)
    for _ in range(249):
        again = run(Draws(setting), schedules, option)
        assert all(equal_bits(first[key], again[key]) for key in first)
