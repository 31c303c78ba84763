"""Random cases of the interpreted kernels: which seeds run, and what a seed draws.

Every kernel meets 120 random cases; ``GCNG_FUZZ_SEEDS=1500`` in the environment asks for more. A test is called after
its seed, so that one which fails can be run alone: ``pytest "tests/test_triton_fuzz_pairs.py::test_passes[17]"``.

Owns :data:`SEEDS`, the choices of a seed (:class:`Choices`), the data regimes of kernels (:func:`spoil`), and the
draws of a pass over pairs (:class:`FuzzDraws`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gcng.ops.pair_kernels import LayerDropout
from gcng.ops.tiles import Tile
from tests.closeness import CAPS, FACTOR, FEW, ROW_FACTOR, SCALE_BIAS, assert_close_to_truth
from tests.pair_passes import Draws, Setting

T = TypeVar("T")
Arrays = Mapping[str, Tensor]
SEEDS = range(int(os.environ.get("GCNG_FUZZ_SEEDS", "120")))
# Most bugs of digits show in float32 and most of storage in float16; bfloat16 runs the code of float16.
DTYPES = (torch.float32, torch.float16, torch.float32, torch.float16, torch.bfloat16, torch.float64)
REGIMES = ("normal", "normal", "ties", "constant rows", "equal rows", "small")


class Choices:
    """A stream of choices that depends on its seed and name alone."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        self.numbers = np.random.default_rng([seed, *name.encode()])

    def of(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.numbers.integers(len(options)))]

    def between(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return int(self.numbers.integers(low, high + 1))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64."""
        return torch.from_numpy(np.asarray(self.numbers.standard_normal(shape)))

    def tile(self, n: int, most_rows: int) -> Tile:
        """A tile of ``n`` nodes: on the diagonal or beside it, down to a row, a column or a pair."""
        r0 = self.between(0, n - 1)
        r1 = min(n, r0 + self.of((1, 2, 3, most_rows)))
        c0 = r0 if r1 == n or self.between(0, 1) else self.between(r1, n - 1)
        first = max(c0 + 1, r1) if c0 == r0 else c0 + 1
        return Tile(r0, r1, c0, self.of((n, first, self.between(first, n))))


def spoil(values: Tensor, regime: str) -> Tensor:
    """Values with what random numbers never have: ties, rows without spread, rows that are equal."""
    if regime == "ties":
        return (2 * values).round() / 2
    if regime == "small":
        return values / 64
    if values.dim() >= 2 and values.numel():
        values = values.clone()
        if regime == "constant rows":
            values[::3] = values[::3][..., :1].expand_as(values[::3])
        elif regime == "equal rows":
            values[1::2] = values[:1].expand_as(values[1::2])
    return values


def jitter(values: Tensor, stored: torch.dtype, seed: int) -> Tensor:
    """Float64 values moved by up to one rounding of the dtype that they are stored in."""
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values * (1 + torch.finfo(stored).eps * (2 * noise - 1))


class FuzzDraws(Draws):
    """The inputs of a pass by a seed, in one of the regimes; moved by a rounding where ``jittered`` is not 0."""

    def __init__(self, setting: Setting, dtype: torch.dtype | None, seed: int, regime: str, jittered: int = 0) -> None:
        super().__init__(setting, dtype)
        self.generator.manual_seed(seed)
        self.regime, self.rate, self.jittered = regime, (0.1, 0.5, 0.95)[seed % 3], jittered

    def _draw(self, dtype: torch.dtype, shape: tuple[int, ...], scale: float, offset: float) -> Tensor:
        values = spoil(torch.randn(shape, generator=self.generator), self.regime).mul_(scale).add_(offset).to(dtype)
        if self.jittered:
            self.jittered += 10
            return jitter(values.double(), dtype, self.jittered)
        return values if self.dtype is None else values.to(self.dtype)

    def dropout(self, p: float | None = None) -> LayerDropout:
        """Few weights dropped, half of them, or nearly all."""
        return super().dropout(self.rate if p is None else p)


def check_arrays(
    name: str, ours: Arrays, truth: Arrays, baselines: Sequence[Arrays], dtype: torch.dtype, floor: float = 0.0
) -> None:
    """Every array by the closeness gate, against the worst of several baselines in each element.

    A random case may be ill-conditioned, so the truth for inputs moved by a rounding is a baseline too, and the caps,
    which belong to cases whose condition is known, follow the baselines. An error that n elements tell of is known to
    about 1 / sqrt(n) only: the fewer, the larger the factors, and below ``FEW`` no systematic factor can be told from
    roundings (the relative error bounds it).

    floor: magnitude below which an array is noise.
    """
    assert ours.keys() == truth.keys(), name
    for key, value in ours.items():
        exact = truth[key]
        if not value.is_floating_point():
            assert torch.equal(value, exact), f"{name}: {key}"
            continue
        # What does not fit into the dtype that it is stored in is infinite there.
        exact = torch.where(exact.abs() > torch.finfo(value.dtype).max, exact.sign() * torch.inf, exact)
        worst = exact.to(baselines[0][key].dtype).double()
        for baseline in baselines:
            other = baseline[key].double()
            worse = other.isfinite() & ((other - exact).abs() > (worst - exact).abs())
            worst = torch.where(worse, other, worst)
        few = 1 + math.sqrt(FEW / max(1, value.numel()))
        error = few * FACTOR * ((worst - exact).norm() / exact.norm().clamp(min=1e-300)).nan_to_num(0.0).item()
        share = error / (CAPS[dtype] if value.numel() >= FEW else min(CAPS[dtype], SCALE_BIAS[dtype]))
        assert_close_to_truth(
            f"{name}: {key}", value, exact, worst, dtype=dtype, output_dtype=value.dtype, scale_floor=floor,
            op_caps={dtype: CAPS[dtype] * max(1.0, share)}, declared_nonfinite=not bool(exact.isfinite().all()),
            factor=few * FACTOR, row_factor=few * ROW_FACTOR,
        )  # fmt: skip
