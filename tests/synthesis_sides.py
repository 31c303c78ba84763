"""Blocks of anchors and classes, random or given, and every pass of a form of the synthesis on them.

Owns :class:`SideCase`, :func:`draw_case`, :func:`run_passes` and two comparisons; for tests of the compiled forms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, Synthesis, SyntheticGradients, TorchSynthesisKernels
from tests.closeness import assert_close_to_truth

ODD_WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100)


@dataclass(frozen=True)
class SideCase:
    """One side of a tile, everything in float64 on the CPU."""

    z: Tensor  # (N, D)
    boundaries: tuple[int, ...]
    kappa: Tensor  # 0-dim
    mix: Tensor  # (K, K - 1)
    anchors: slice
    negatives: slice  # whole classes
    mirrored: bool
    columns: slice  # of the tile that belong to the side
    gates: Tensor  # tile (R, S, D)
    before: Tensor  # tile: what the gradient of the gates is added to
    grad_values: Tensor  # (A, m, D)
    grad_dots: Tensor  # (A, m)
    grad_squares: Tensor  # (A, m)
    which: tuple[bool, bool, bool] = (True, True, True)  # gradients that arrive


def tensor(draw: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.from_numpy(np.asarray(draw.standard_normal(shape)))


def side_case(
    draw: np.random.Generator,
    counts: list[int],
    width: int,
    *,
    anchors: slice | None = None,
    classes: slice | None = None,
    mirrored: bool = False,
    margin: int = 0,
) -> SideCase:
    """Random values for classes of these sizes; ``margin`` columns of the tile lie before those of the side."""
    boundaries = (0, *np.cumsum(counts).tolist())
    n, most = boundaries[-1], max(counts)
    anchors, classes = anchors or slice(0, n), classes or slice(0, len(counts))
    negatives = slice(boundaries[classes.start], boundaries[classes.stop])
    a, b, m = anchors.stop - anchors.start, negatives.stop - negatives.start, classes.stop - classes.start
    rows, columns = (b, a) if mirrored else (a, b)
    tile = (rows, margin + columns, width)
    return SideCase(
        z=3 * width**-0.5 * tensor(draw, n, width), boundaries=boundaries, kappa=torch.tensor(draw.random()),
        mix=torch.from_numpy(draw.random((most, most - 1))), anchors=anchors, negatives=negatives, mirrored=mirrored,
        columns=slice(margin, None), gates=torch.from_numpy(draw.random(tile)), before=tensor(draw, *tile),
        grad_values=tensor(draw, a, m, width), grad_dots=tensor(draw, a, m), grad_squares=tensor(draw, a, m),
    )  # fmt: skip


def draw_case(seed: int, widths: tuple[int, ...] = ODD_WIDTHS) -> SideCase:
    """A small case: ragged or uniform counts, singletons, one class, duplicates, near and far negatives, any view."""
    draw = np.random.default_rng(seed)
    num_classes = int(draw.integers(1, 6))
    uniform = int(draw.integers(1, 9))
    counts = [uniform if draw.random() < 0.7 else int(draw.integers(1, 9)) for _ in range(num_classes)]
    n = sum(counts)
    start, stop = sorted(draw.integers(0, n + 1, 2).tolist())
    first, last = sorted(draw.integers(0, num_classes + 1, 2).tolist())
    anchors = slice(start, stop) if start < stop else slice(0, n)
    classes = slice(first, last) if first < last else slice(0, num_classes)
    mirrored, margin = bool(draw.integers(2)), int(draw.integers(0, 3))
    case = side_case(
        draw, counts, int(draw.choice(widths)), anchors=anchors, classes=classes, mirrored=mirrored, margin=margin
    )
    kind = draw.integers(6)
    if kind == 0:  # copies: distance 0 up to the offset of (15), and ties with the positive
        case.z[:] = case.z[torch.from_numpy(draw.integers(0, n, n))]
    elif kind == 1:  # all negatives near
        case.z[:] = torch.from_numpy(draw.integers(0, 2, (n, 1))) + 1e-3 * case.z
    elif kind == 2:  # classes far apart: none near
        case.z[:] += 10 * torch.repeat_interleave(torch.tensor(counts))[:, None]
    which = ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1), (1, 0, 1))[int(draw.integers(6))]
    return replace(case, which=tuple(map(bool, which)))


def run_passes(
    kernels: TorchSynthesisKernels,
    case: SideCase,
    dtype: torch.dtype,
    *,
    gate_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Every result of every pass, by name; gradients are added to numbers that are there already."""

    def to(x: Tensor) -> Tensor:
        return x.to(device, dtype)

    synthesis = Synthesis(to(case.z), case.boundaries, to(case.kappa), to(case.mix), kernels)
    side = Side(synthesis, case.anchors, case.negatives, case.columns, mirrored=case.mirrored)
    out = {f"geometry {name}": value for name, value in side.geometry._asdict().items()}
    gate = side.view(case.gates.to(device, gate_dtype or dtype))
    synthetic = side.synthesize(gate)
    out |= synthetic._asdict() | {"positive distance": synthesis.positive_distance}
    lean = side.synthesize(gate, need_values=False)
    out |= {"dots alone": lean.dots, "squares alone": lean.squares}
    arrived = (case.grad_values, case.grad_dots, case.grad_squares)
    grads = SyntheticGradients(*(to(x) if wanted else None for x, wanted in zip(arrived, case.which, strict=True)))
    tile = to(case.before).clone()
    side.add_gate_gradient(synthetic, grads, side.view(tile))
    out["grad gates"] = tile
    sums = EmbeddingGradients(synthesis)
    sums.z += to(case.z).flip(0)
    sums.positive_distance += 0.5
    side.backward(gate, grads, sums)
    return out | {"grad z": sums.z, "grad positive distance": sums.positive_distance}


def rounded(case: SideCase, dtype: torch.dtype, gate_dtype: torch.dtype | None = None) -> SideCase:
    """The case with its inputs rounded to the dtypes under test: what the truth is computed from."""
    names = ("z", "kappa", "mix", "before", "grad_values", "grad_dots", "grad_squares")
    changed = {name: getattr(case, name).to(dtype).double() for name in names}
    return replace(case, **changed, gates=case.gates.to(gate_dtype or dtype).double())


def assert_same_to_rounding(
    ours: dict[str, Tensor], truth: dict[str, Tensor], case: SideCase | None = None, bound: float = 1e-12
) -> None:
    """Every result within ``bound`` of its largest element, or of 1e-3; flags equal.

    With ``case``, synthetic negatives and their products are judged by the norm of the embeddings: a negative may lie
    near 0 though its anchor does not, and is then a difference of large numbers.
    """
    assert ours.keys() == truth.keys()
    norm = 0.0 if case is None else case.z.norm(dim=1).max().item()
    floors = {"values": norm, "dots": norm**2, "squares": norm**2}
    for name, expected in truth.items():
        got = ours[name]
        assert got.shape == expected.shape and got.dtype == expected.dtype, name
        if got.dtype == torch.bool:
            assert torch.equal(got, expected), name
            continue
        error, floor = (got - expected).abs().max(), max(1e-3, floors.get(name.removesuffix(" alone"), 0.0))
        assert error <= bound * expected.abs().max().clamp(min=floor), (name, error, expected.abs().max())


def ties_by_rounding(case: SideCase, truth: dict[str, Tensor]) -> bool:
    """Whether some negative is as far as the positive up to roundings: which of them is nearer depends on these, and
    gradients jump there. Exact ties do not count, they are to be seen as such."""
    reach, distance = truth["positive distance"][case.anchors, None], truth["geometry distance"]
    gap = (distance - reach).abs()
    return bool(((gap > 0) & (gap <= 1e-5 * distance)).any())


def assert_as_accurate(ours: dict[str, Tensor], truth: dict[str, Tensor], baseline: dict[str, Tensor]) -> None:
    """Every float32 result through the gate of tests/closeness.py, against the torch form in float64 and float32.

    The numbers of a pair are no rows: where all negatives of an anchor lie close to dp, each ``1 - dp / dn`` of its row
    is a difference of nearly equal numbers.
    """
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        arrays = (ours[name].cpu(), expected.cpu(), baseline[name].cpu())
        if name.startswith("geometry"):
            arrays = tuple(x.flatten() for x in arrays)
        assert_close_to_truth(name, *arrays, op_caps={torch.float32: 1e-4})
