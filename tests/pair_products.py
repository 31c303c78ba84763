"""The products of an edge layer with epilogues as cases: the kernel, and the steps of plain torch that it replaces.

Each case takes the draws of a setting (tests/pair_passes.py), the schedules to run the kernel with, or None for the
steps, and an option; it returns everything that is written, by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcng.kernels import edge_gradient_product, edge_mlp, edge_products, edge_wide_rows, message_products
from gcng.kernels.product_tiles import EdgeProducts
from gcng.ops.pair_kernels import PRODUCT, Edges, HiddenState, Prepared, TorchPairKernels
from gcng.ops.products import linear, product
from tests.closeness import assert_close_to_truth
from tests.pair_passes import Draws, Setting

STEPS = TorchPairKernels()


def layer_of(draws: Draws) -> Prepared:
    """A layer with both of its maps."""
    d, prepared = draws.setting.width, draws.prepared()
    folded = draws.operand(d, 4 * d, scale=1 / math.sqrt(4 * d))
    sums = folded.sum(1, dtype=prepared.shift.dtype)
    return prepared._replace(ff1_weight=draws.operand(4 * d, d, scale=1 / math.sqrt(d)), folded=folded, row_sums=sums)


def _statistics(draws: Draws) -> tuple[Tensor, Tensor]:
    pairs = draws.setting.pairs
    return draws.wide(pairs, scale=0.1, offset=0.4), draws.wide(pairs, scale=0.1, offset=1.5)


def first_map(draws: Draws, schedules: EdgeProducts | None, stashing: bool) -> dict[str, Tensor]:
    """h0 is written, or packed only."""
    s = draws.setting
    x, prepared = draws.operand(s.pairs, s.width), layer_of(draws)
    h0, hidden = (draws.operand(s.pairs, 4 * s.width) for _ in range(2))
    stash = draws.packed(4 * s.width) if stashing else None
    if schedules is None:
        linear(x, prepared.ff1_weight, prepared.ff1_bias, h0)
        mean, rstd = STEPS.hidden(h0, hidden, s.n, s.tile, stash=stash)
    else:
        kept = None if stashing else h0
        mean, rstd = edge_products.edge_first_map(x, prepared, kept, hidden, s.n, s.tile, stash, schedules.first_map)
    return {"hidden": hidden, "mean": mean, "rstd": rstd} | ({"stash": stash} if stashing else {"h0": h0})


def second_map(draws: Draws, schedules: EdgeProducts | None, packed: bool) -> dict[str, Tensor]:
    """Edges of the tile, or packed."""
    s = draws.setting
    x, prepared, hidden = draws.operand(s.pairs, s.width), layer_of(draws), draws.operand(s.pairs, 4 * s.width)
    mean, rstd = _statistics(draws)
    w2 = draws.wide(s.pairs, s.width)
    out, stash = (draws.packed(), draws.packed()) if packed else (draws.operand(s.pairs, s.width), None)
    if schedules is None:
        product(hidden, prepared.folded.T, w2)
        STEPS.epilogue(w2, x, mean, rstd, prepared, s.n, s.tile, out, packed=packed, stash=stash)
    else:
        whole = schedules.second_map.holds_rows(s.width)
        launcher = edge_products.edge_second_map if whole else edge_wide_rows.edge_wide_second_map
        launcher(hidden, x, mean, rstd, prepared, s.n, s.tile, w2, out, packed, stash, schedules.second_map)
    return {"w2": w2, "edges": out} | ({"stash": stash} if packed else {})


def mlp(draws: Draws, schedules: EdgeProducts | None, packed: bool) -> dict[str, Tensor]:
    """Edges of the tile, or packed."""
    s = draws.setting
    x, prepared = draws.operand(s.pairs, s.width), layer_of(draws)
    out = draws.packed() if packed else draws.operand(s.pairs, s.width)
    if schedules is None:
        h0, w2 = draws.operand(s.pairs, 4 * s.width), draws.wide(s.pairs, s.width)
        linear(x, prepared.ff1_weight, prepared.ff1_bias, h0)
        mean, rstd = STEPS.hidden(h0, h0, s.n, s.tile)
        product(h0, prepared.folded.T, w2)
        STEPS.epilogue(w2, x, mean, rstd, prepared, s.n, s.tile, out, packed=packed)
    else:
        edge_mlp.edge_mlp(x, prepared, s.n, s.tile, out, packed, schedules.mlp)
    return {"edges": out}


def hidden_gradient(draws: Draws, schedules: EdgeProducts | None, source: str) -> dict[str, Tensor]:
    """h0 of the tile, packed, or made again."""
    s, hidden_width = draws.setting, 4 * draws.setting.width
    x, scaled, prepared = draws.operand(s.pairs, s.width), draws.operand(s.pairs, s.width), layer_of(draws)
    grad, hidden = (draws.operand(s.pairs, hidden_width) for _ in range(2))
    packed, again = source == "packed", source == "made again"
    h0 = draws.packed(hidden_width) if packed else draws.operand(s.pairs, hidden_width)
    sums, means = draws.sums(prepared), (draws.wide(s.pairs), draws.wide(s.pairs))
    mean, rstd = _statistics(draws)
    if schedules is None:
        if again:
            linear(x, prepared.ff1_weight, prepared.ff1_bias, h0)
        STEPS.hidden(h0, hidden, s.n, s.tile, packed=packed)
        product(scaled, prepared.folded, grad)
        state = HiddenState(h0, h0, packed)
        STEPS.hidden_backward(grad, hidden, state, mean, rstd, means, s.n, s.tile, sums)
    else:
        edge_gradient_product.edge_hidden_gradient(
            scaled, x, None if again else h0, mean, rstd, means, prepared, s.n, s.tile, hidden, grad, sums.ff1_bias,
            packed, schedules.hidden_gradient,
        )  # fmt: skip
    return {"grad h0": grad, "hidden": hidden, "grad bias": sums.ff1_bias}


def product_messages(draws: Draws, schedules: EdgeProducts | None, stashing: bool) -> dict[str, Tensor]:
    """With and without a stash; the map has 40 channels more than a node."""
    s, channels = draws.setting, draws.setting.width + 40
    nodes, weight = draws.operand(s.n, s.width), draws.operand(channels, s.width, scale=1 / math.sqrt(s.width))
    bias, out = draws.operand(channels), draws.wide(s.n, channels)
    stash = draws.packed(channels) if stashing else None
    if schedules is None:
        edges, before = draws.operand(s.pairs, s.width), draws.operand(s.pairs, channels)
        linear(STEPS.edges(Edges(nodes, PRODUCT, s.n), s.tile, edges), weight, bias, before)
        STEPS.messages(before, s.n, s.tile, out, stash=stash)
    else:
        message_products.product_messages(nodes, weight, bias, s.n, s.tile, out, stash, schedules.messages)
    return {"messages": out} | ({"stash": stash} if stashing else {})


CASES = {
    "first map": (first_map, False),
    "first map stash": (first_map, True),
    "second map": (second_map, False),
    "second map packed": (second_map, True),
    "mlp": (mlp, False),
    "mlp packed": (mlp, True),
    "hidden gradient": (hidden_gradient, "tile"),
    "hidden gradient packed": (hidden_gradient, "packed"),
    "hidden gradient made again": (hidden_gradient, "made again"),
    "product messages": (product_messages, False),
    "product messages stash": (product_messages, True),
}


def check_product(name: str, schedules: EdgeProducts, setting: Setting) -> None:
    """Hold one kernel to the steps that it replaces, in float64."""
    run, option = CASES[name]
    ours = run(Draws(setting), schedules, option)
    truth = run(Draws(setting, torch.float64), None, option)
    baseline = run(Draws(setting, setting.operand), None, option)
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        assert_close_to_truth(
            f"{name}: {key}", value.cpu(), truth[key].cpu(), baseline[key].cpu(), dtype=setting.operand,
            output_dtype=value.dtype, scale_floor=1e-3 if setting.operand == torch.float64 else 0.0,
        )  # fmt: skip
