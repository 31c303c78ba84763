"""Every pass over a tile of pairs as one case: inputs, call, and all that it writes; for any form and any device.

A case draws its inputs once, in the dtypes that a field gives them, and :func:`check_pass` runs it three times: the
form under test on these inputs, plain torch on them in float64 (the truth), and plain torch in the operands' dtype
throughout (the baseline of the closeness gate). Running sums and packed storage start from random numbers, so that a
pass which overwrites, or writes elsewhere, is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcng.ops.pair_kernels import (
    PACKED,
    PRODUCT,
    TILE,
    EdgeLayer,
    Edges,
    GateSpread,
    HiddenState,
    LayerDropout,
    LayerSums,
    Prepared,
    TorchPairKernels,
)
from gcng.ops.tiles import Tile, pair_count
from gcng.reference.dropout import node_identity
from tests.closeness import assert_close_to_truth

SUMS = ("key_query", "key_bias", "value", "ff1_bias", "folded_mean", "shift", "ln_weight", "ln_bias")


@dataclass(frozen=True)
class Setting:
    """Sizes and dtypes of a field, and the tile."""

    n: int
    width: int
    tile: Tile
    operand: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics and sums."""
        return torch.float64 if self.operand == torch.float64 else torch.float32

    @property
    def pairs(self) -> int:
        """R S."""
        return self.tile.shape[0] * self.tile.shape[1]


class Draws:
    """Random inputs of a setting, and their copies in another dtype."""

    def __init__(self, setting: Setting, dtype: torch.dtype | None = None) -> None:
        self.setting, self.dtype = setting, dtype
        self.generator = torch.Generator(setting.device).manual_seed(setting.n * 1000 + setting.width)

    def _draw(self, dtype: torch.dtype, shape: tuple[int, ...], scale: float, offset: float) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.setting.device)
        if scale != 1.0 or offset != 0.0:
            values.mul_(scale).add_(offset)
        values = values.to(dtype)
        return values if self.dtype is None else values.to(self.dtype)

    def operand(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """A tensor stored as operands are."""
        return self._draw(self.setting.operand, shape, scale, offset)

    def wide(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """A tensor stored as sums are."""
        return self._draw(self.setting.wide, shape, scale, offset)

    def prepared(self) -> Prepared:
        """A layer; its two maps are never read by a pass."""
        n, d = self.setting.n, self.setting.width
        maps = self.wide(4 * d, 1), self.wide(d, 1)
        hidden = [self.wide(4 * d) for _ in range(3)]
        norm = self.wide(d, scale=0.3, offset=1.0), self.wide(d, scale=0.3)
        nodes = self.wide(n, d), self.wide(n), self.wide(n, d)
        layer = EdgeLayer(*nodes, maps[0], *hidden, maps[1], self.wide(d), *norm)
        operands = self.operand(4 * d, 1), self.operand(4 * d), self.operand(d, 4 * d)
        return Prepared(layer, *operands, self.wide(d), self.wide(d))

    def sums(self, prepared: Prepared) -> LayerSums:
        """Running sums that have begun."""
        sums = LayerSums(prepared)
        for name in SUMS:
            getattr(sums, name).copy_(self.wide(*getattr(sums, name).shape))
        return sums

    def dropout(self, p: float = 0.3) -> LayerDropout:
        """Dropout of some layer."""
        identity = node_identity(torch.arange(self.setting.n) // 3, torch.arange(self.setting.n) % 3)
        return LayerDropout(identity.to(self.setting.device), torch.tensor(-7_777_777_777_777), 2, p)

    def source(self, kind: str) -> Edges:
        """Edges of a kind."""
        if kind == PACKED:
            return Edges(self.packed(), kind, self.setting.n)
        rows = {PRODUCT: self.setting.n, TILE: self.setting.pairs}[kind]
        return Edges(self.operand(rows, self.setting.width), kind, self.setting.n)

    def packed(self, width: int | None = None, *, wide: bool = False) -> Tensor:
        """Packed storage (P, width) of operands, or of what is stored as sums are."""
        shape = pair_count(self.setting.n), self.setting.width if width is None else width
        return self.wide(*shape) if wide else self.operand(*shape)


Outputs = dict[str, Tensor]
Run = Callable[[TorchPairKernels, Draws, Setting], Outputs]
PASSES: dict[str, Run] = {}


def _case(name: str, **options: Any) -> Callable[[Callable[..., Outputs]], Callable[..., Outputs]]:
    """Add a pass, with these options."""

    def add(run: Callable[..., Outputs]) -> Callable[..., Outputs]:
        PASSES[name] = lambda kernels, draws, setting: run(kernels, draws, setting, **options)
        return run

    return add


def _named_sums(sums: LayerSums, *names: str) -> Outputs:
    return {f"grad {name}": getattr(sums, name) for name in names}


@_case("edges product", kind=PRODUCT)
@_case("edges packed", kind=PACKED)
def _edges(kernels, draws, s, kind) -> Outputs:
    return {"edges": kernels.edges(draws.source(kind), s.tile, draws.operand(s.pairs, s.width))}


@_case("store")
def _store(kernels, draws, s) -> Outputs:
    packed = draws.packed()
    kernels.store(packed, s.n, s.tile, draws.operand(s.pairs, s.width))
    return {"packed": packed}


@_case("load", symmetric=True)
@_case("load upper", symmetric=False)
def _load(kernels, draws, s, symmetric) -> Outputs:
    out = draws.wide(s.pairs, s.width)
    return {"tile": kernels.load(draws.packed(), s.n, s.tile, out, symmetric=symmetric)}


@_case("add_packed")
def _add_packed(kernels, draws, s) -> Outputs:
    packed = draws.packed()
    kernels.add_packed(packed, s.n, s.tile, draws.wide(s.pairs, s.width))
    return {"packed": packed}


@_case("add_product")
def _add_product(kernels, draws, s) -> Outputs:
    out = draws.wide(s.n, s.width)
    kernels.add_product(draws.operand(s.n, s.width), s.tile, draws.wide(s.pairs, s.width), out)
    return {"grad nodes": out}


@_case("prologue product", kind=PRODUCT, drop=True)
@_case("prologue packed", kind=PACKED, drop=False)
@_case("prologue tile", kind=TILE, drop=True)
def _prologue(kernels, draws, s, kind, drop) -> Outputs:
    x = draws.operand(s.pairs, s.width)
    dropout = draws.dropout() if drop else None
    mix = kernels.prologue(draws.prepared().layer, draws.source(kind), s.tile, dropout, x)
    return {"x": x, "gate": mix.gate, "weight_row": mix.weight_row, "weight_column": mix.weight_column}


@_case("prologue_backward product", kind=PRODUCT, drop=True, need_input=True)
@_case("prologue_backward packed", kind=PACKED, drop=True, need_input=False)
@_case("prologue_backward tile", kind=TILE, drop=False, need_input=True)
def _prologue_backward(kernels, draws, s, kind, drop, need_input) -> Outputs:
    prepared, source = draws.prepared(), draws.source(kind)
    sums, x = draws.sums(prepared), draws.operand(s.pairs, s.width)
    mix = kernels.prologue(prepared.layer, source, s.tile, draws.dropout() if drop else None, x)
    grad = draws.wide(s.pairs, s.width)
    grad = kernels.prologue_backward(grad, source, mix, prepared.layer, s.tile, sums, need_input=need_input)
    assert (grad is None) == (not need_input)
    named = _named_sums(sums, "key_query", "key_bias", "value", "ln_weight", "ln_bias")
    return named | ({"grad edges": grad} if need_input else {})


@_case("hidden", packed=False, in_place=False)
@_case("hidden in place", packed=False, in_place=True)
@_case("hidden packed", packed=True, in_place=False)
def _hidden(kernels, draws, s, packed, in_place) -> Outputs:
    h0 = draws.packed(4 * s.width) if packed else draws.operand(s.pairs, 4 * s.width)
    out = h0 if in_place else draws.operand(s.pairs, 4 * s.width)
    stash = None if packed else draws.packed(4 * s.width)
    mean, rstd = kernels.hidden(h0, out, s.n, s.tile, packed=packed, stash=stash)
    return {"hidden": out, "mean": mean, "rstd": rstd} | ({} if packed else {"stash": stash})


@_case("hidden_backward", packed=False)
@_case("hidden_backward packed", packed=True)
def _hidden_backward(kernels, draws, s, packed) -> Outputs:
    h0 = draws.packed(4 * s.width) if packed else draws.operand(s.pairs, 4 * s.width)
    hidden, prepared = draws.operand(s.pairs, 4 * s.width), draws.prepared()
    mean, rstd = kernels.hidden(h0, hidden, s.n, s.tile, packed=packed)
    grad, sums = draws.operand(s.pairs, 4 * s.width), draws.sums(prepared)
    means = draws.wide(s.pairs), draws.wide(s.pairs)
    kernels.hidden_backward(grad, hidden, HiddenState(h0, hidden, packed), mean, rstd, means, s.n, s.tile, sums)
    return {"grad h0": grad} | _named_sums(sums, "ff1_bias")


def _statistics(draws: Draws, s: Setting) -> tuple[Tensor, Tensor]:
    return draws.wide(s.pairs, scale=0.1, offset=0.4), draws.wide(s.pairs, scale=0.1, offset=1.5)


@_case("epilogue", packed=False)
@_case("epilogue packed", packed=True)
def _epilogue(kernels, draws, s, packed) -> Outputs:
    y, x, out = draws.wide(s.pairs, s.width), draws.operand(s.pairs, s.width), draws.operand(s.pairs, s.width)
    out, stash = (draws.packed(), draws.packed()) if packed else (out, None)
    kernels.epilogue(y, x, *_statistics(draws, s), draws.prepared(), s.n, s.tile, out, packed=packed, stash=stash)
    return {"w2": y, "edges": out} | ({"stash": stash} if packed else {})


@_case("epilogue_backward", packed=False, kept=False)
@_case("epilogue_backward packed", packed=True, kept=True)
@_case("epilogue_backward packed narrow", packed=True, kept=True, narrow=True)  # as an op stores the gradient of edges
def _epilogue_backward(kernels, draws, s, packed, kept, narrow=False) -> Outputs:
    grad = draws.packed(wide=not narrow) if packed else draws.wide(s.pairs, s.width)
    out = draws.wide(s.pairs, s.width) if packed else grad
    w2 = draws.packed() if kept else draws.wide(s.pairs, s.width)
    x, scaled, prepared = draws.operand(s.pairs, s.width), draws.operand(s.pairs, s.width), draws.prepared()
    sums, state = draws.sums(prepared), HiddenState(w2, w2, kept)
    means = kernels.epilogue_backward(
        grad, state, x, *_statistics(draws, s), prepared, s.n, s.tile, sums, out, scaled, packed=packed
    )
    named = _named_sums(sums, "ln_weight", "ln_bias", "shift", "folded_mean")
    return named | {"grad w2": out, "scaled": scaled, "mean grad": means[0], "mean product": means[1]}


@_case("messages", kept=False)
@_case("messages stash", kept=True)
def _messages(kernels, draws, s, kept) -> Outputs:
    stash, out = draws.packed() if kept else None, draws.wide(s.n, s.width)
    kernels.messages(draws.operand(s.pairs, s.width), s.n, s.tile, out, stash=stash)
    return {"messages": out} | ({"stash": stash} if kept else {})


@_case("messages_backward", packed=False)
@_case("messages_backward packed", packed=True)
def _messages_backward(kernels, draws, s, packed) -> Outputs:
    before = draws.packed() if packed else draws.operand(s.pairs, s.width)
    out, bias = draws.operand(s.pairs, s.width), draws.wide(s.width)
    kernels.messages_backward(draws.wide(s.n, s.width), before, s.n, s.tile, out, bias, packed=packed)
    return {"grad before": out, "grad bias": bias}


@_case("gates", summed=False)
@_case("gates summed", summed=True)
def _gates(kernels, draws, s, summed) -> Outputs:
    logits, stash, spread = draws.operand(s.pairs, s.width), draws.packed(), None
    if summed:
        squares = torch.tensor(0.5, dtype=torch.float64, device=s.device)
        spread = GateSpread(draws.wide(s.width, scale=0.1, offset=0.5), draws.wide(s.n, s.width), squares)
    kernels.gates(logits, s.n, s.tile, stash=stash if summed else None, spread=spread)
    sums = {"row_sums": spread.row_sums, "squares": spread.squares, "stash": stash} if summed else {}
    return {"gates": logits} | sums


@_case("spread_gradient")
def _spread_gradient(kernels, draws, s) -> Outputs:
    out, means = draws.wide(s.pairs, s.width), draws.wide(s.n, s.width, scale=0.1, offset=0.5)
    kernels.spread_gradient(draws.operand(s.pairs, s.width), means, draws.wide(), s.tile, out)
    return {"grad gates": out}


@_case("gate_logits_gradient", in_place=False)
@_case("gate_logits_gradient in place", in_place=True)
def _gate_logits_gradient(kernels, draws, s, in_place) -> Outputs:
    grad, gates = draws.wide(s.pairs, s.width), draws.operand(s.pairs, s.width, scale=0.1, offset=0.5)
    out = grad if in_place else draws.operand(s.pairs, s.width)
    bias = None if in_place else draws.wide(s.width)
    kernels.gate_logits_gradient(grad, gates, out, bias)
    return {"grad logits": out} | ({} if bias is None else {"grad bias": bias})


@_case("center")
def _center(kernels, draws, s) -> Outputs:
    out = draws.operand(s.pairs, s.width)
    kernels.center(draws.operand(s.pairs, s.width), draws.wide(s.width), out)
    return {"centered": out}


def _weights(draws: Draws, s: Setting) -> Tensor:
    weights = torch.where(torch.arange(s.pairs, device=s.device) % 3 == 0, 1.0, 2.0)[:, None]
    return weights.to(draws.dtype or s.wide)


@_case("norm_gradient")
def _norm_gradient(kernels, draws, s) -> Outputs:
    grad, vectors = draws.wide(s.pairs, s.width), [draws.wide(s.width) for _ in range(3)]
    kernels.norm_gradient(grad, draws.operand(s.pairs, s.width), _weights(draws, s), *vectors)
    return {"grad": grad}


@_case("moments")
def _moments(kernels, draws, s) -> Outputs:
    totals = [draws.wide(s.width).double() for _ in range(2)]
    values = draws.operand(s.pairs, s.width, scale=0.5, offset=3.0)
    kernels.moments(values, _weights(draws, s), draws.wide(s.width, scale=0.1, offset=3.0), *totals)
    return {"total": totals[0], "squares": totals[1]}


# Written in the operand's dtype, or in float64 whatever the field is in.
STORED = {"edges", "packed", "x", "hidden", "stash", "grad h0", "scaled", "grad before", "gates", "centered"}
FLOAT64 = {"total", "squares"}


def check_pass(name: str, kernels: TorchPairKernels, setting: Setting, *, scale_floor: float = 1e-3) -> None:
    """Hold one pass of ``kernels`` to the truth; ``scale_floor``: see there, float64 only."""
    run, torch_form = PASSES[name], TorchPairKernels()
    ours = run(kernels, Draws(setting), setting)
    truth = run(torch_form, Draws(setting, torch.float64), setting)
    baseline = run(torch_form, Draws(setting, setting.operand), setting)
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        in_place = name == "gate_logits_gradient in place"
        stored = setting.operand if key in STORED or (key == "grad logits" and not in_place) else setting.wide
        wanted = torch.float64 if key in FLOAT64 else stored
        assert value.dtype == wanted, (name, key, value.dtype)
        assert_close_to_truth(
            f"{name}: {key}", value.cpu(), truth[key].cpu(), baseline[key].cpu(), dtype=setting.operand,
            output_dtype=wanted, scale_floor=scale_floor if setting.operand == torch.float64 else 0.0,
        )  # fmt: skip


def repeated_bits(name: str, kernels: TorchPairKernels, setting: Setting) -> Outputs:
    """What a pass writes, to be compared bit for bit with another run, on the device that wrote it."""
    return PASSES[name](kernels, Draws(setting), setting)
