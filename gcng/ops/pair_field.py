"""The lazy edge field: a tile of e_l as a function of the nodes, and its backward.

Owns the matrix products of the edge layer (9)-(13) on a tile of pairs, forward and hand-derived backward
(docs/derivations.md); what runs between them is in :mod:`gcng.ops.pair_kernels`. The ops of the pair pipeline are
reductions over this field: they ask for a tile of edges and hand back its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gcng.ops.allocation import tried_twice
from gcng.ops.dispatch import pair_kernels
from gcng.ops.pair_kernels import (
    PACKED,
    PRODUCT,
    TILE,
    EdgeLayer,
    Edges,
    HiddenState,
    LayerDropout,
    LayerSums,
    Mix,
    Prepared,
)
from gcng.ops.products import accumulate
from gcng.ops.recycled import packed_storage
from gcng.ops.registration import compute_dtype
from gcng.ops.tiles import Tile, plan_tiles

T = TypeVar("T")

CHAIN_WIDTH = len(EdgeLayer._fields)
# A tile of R rows evaluates R (R - 1) / 2 pairs twice and costs a fixed number of calls, so the best R is the root of
# twice what those calls cost over what a pair costs. Measured on the CPU: 10 rows at D = 512 and about 20 at D = 128,
# R² D constant. On a GPU the calls of a tile cost so much more (gcng/memory.py) that its pairs alone bound it.
_SQUARED_ROWS_BY_WIDTH = 51_200


def most_rows(n: int, width: int, device: torch.device) -> int:
    """Rows of a tile at most, beyond which its square costs more than the calls of another tile."""
    return max(n, 1) if device.type == "cuda" else max(math.isqrt(_SQUARED_ROWS_BY_WIDTH // width), 2)


class Dropout(NamedTuple):
    """Counter-based dropout of (11) over a chain: see gcng.reference.dropout."""

    identity: Tensor  # (N,) int64 node identities
    seed: Tensor  # 0-dim int64
    p: float
    first_layer: int  # layer index of the first layer of the chain


class LayerState(NamedTuple):
    """What the backward of a layer needs of one tile; pairs flattened to R S rows."""

    source: Edges  # the layer's input
    mix: Mix
    x: Tensor  # (R S, D) behind the first A
    hidden: HiddenState
    # gelu of the hidden layer (R S, 4D), its mean and 1/deviation (R S,), while its workspace still holds them
    activated: tuple[Tensor, Tensor, Tensor] | None


class Workspace:
    """Scratch tensors by name, allocated once and handed out again for every tile.

    Taken from the allocator for every tile they would leave its heap in pieces, and the process would grow with the
    number of tiles.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self._buffers = like, {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, width), contents undefined; valid until the name is taken again, which is always in one dtype."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self._buffers[name] = self._like.new_empty(rows * width, dtype=dtype)
        return buffer[: rows * width].view(rows, width)

    def clear(self) -> None:
        """Give everything back."""
        self._buffers.clear()


class PairField:
    """Edges of a batch in class-major order, computed tile by tile.

    Args:
        base: (N, D) centered unit nodes, whose products are e0, or (P, D) packed edges of some layer.
        packed: which of the two. n: number of nodes N. chain: the layers to apply on top, ``CHAIN_WIDTH`` tensors each.
        dropout: or None.
    """

    def __init__(
        self, base: Tensor, packed: bool, n: int, chain: Sequence[Tensor], dropout: Dropout | None = None
    ) -> None:
        if len(chain) % CHAIN_WIDTH:
            raise ValueError(f"gcng: an edge layer is {CHAIN_WIDTH} tensors, got a chain of {len(chain)}")
        self.kernels = pair_kernels(base)
        self.dtype, self.operand = compute_dtype(base.dtype), self.kernels.operand_dtype(base.dtype)
        self.base, self.packed, self.n, self.dropout = base.to(self.operand).contiguous(), packed, n, dropout
        wide = [x.to(self.dtype).contiguous() for x in chain]
        starts = range(0, len(chain), CHAIN_WIDTH)
        self.layers = [_prepare(EdgeLayer(*wide[i : i + CHAIN_WIDTH]), self.operand) for i in starts]
        self.workspace = Workspace(self.base)

    @property
    def width(self) -> int:
        """D."""
        return self.base.shape[-1]

    def tiles(self, pairs: int, boundaries: Sequence[int] | None = None) -> list[Tile]:
        """Tiles of at most about ``pairs`` pairs over all of the batch; see :func:`gcng.ops.tiles.plan_tiles`."""
        return plan_tiles(self.n, pairs, boundaries, most_rows(self.n, self.width, self.base.device))

    def take(self, name: str, tile: Tile, width: int | None = None) -> Tensor:
        """Scratch for operands of a tile's pairs, (R S, D) or (R S, ``width``)."""
        rows, columns = tile.shape
        return self.workspace.take(name, rows * columns, self.width if width is None else width)

    def take_wide(self, name: str, tile: Tile) -> Tensor:
        """Scratch for what is summed up or normalized, (R S, D) in the field's dtype."""
        rows, columns = tile.shape
        return self.workspace.take(name, rows * columns, self.width, self.dtype)

    # -- forward ------------------------------------------------------------------------------------------------

    def initial(self) -> Edges:
        """Where the edges before the chain come from."""
        return Edges(self.base, PACKED if self.packed else PRODUCT, self.n)

    def edges(self, tile: Tile) -> Tensor:
        """The tile after the chain, (R S, D); valid until the next tile."""
        return self._run(tile, keep=False)[0]

    def edges_with_states(self, tile: Tile) -> tuple[Tensor, list[LayerState]]:
        """The tile after the chain, and what its backward needs; valid until the next tile."""
        return self._run(tile, keep=True)

    def _run(self, tile: Tile, *, keep: bool) -> tuple[Tensor, list[LayerState]]:
        source, states = self.initial(), []
        for index in range(len(self.layers)):
            out = self.take(f"edges {index % 2 if not keep else index}", tile)
            state = self.forward_layer(index, source, tile, out, keep=keep)
            source = Edges(out, TILE, self.n)
            states.append(state)
        if source.kind == TILE:
            return source.values, states
        return self.kernels.edges(source, tile, self.take("edges 0", tile)), states

    def dropout_of(self, index: int) -> LayerDropout | None:
        """The dropout of one layer of the chain."""
        drop = self.dropout
        if drop is None or drop.p == 0:
            return None
        return LayerDropout(drop.identity, drop.seed, drop.first_layer + index, drop.p)

    def forward_layer(
        self,
        index: int,
        source: Edges,
        tile: Tile,
        out: Tensor,
        *,
        keep: bool,
        packed: bool = False,
        stash: tuple[Tensor, Tensor] | None = None,
    ) -> LayerState | None:
        """One edge layer on a tile, to ``out``: (R S, D), or packed. ``stash``: packed h0 and w2 to fill."""
        prepared, kernels = self.layers[index], self.kernels
        layer, hidden_width = prepared.layer, 4 * self.width
        # Without a backward to come, all layers share one set of scratch tensors.
        name = str(index) if keep else ""
        x = self.take(f"x {name}", tile)
        mix = kernels.prologue(layer, source, tile, self.dropout_of(index), x)
        if not keep and stash is None and kernels.edge_mlp(x, prepared, self.n, tile, out, packed=packed):
            return None
        h0_stash, w2_stash = stash or (None, None)
        h0 = self.take(f"h0 {name}", tile, hidden_width)
        hidden = self.take("hidden", tile, hidden_width) if keep else h0
        mean, rstd = kernels.first_map(x, prepared, h0, hidden, self.n, tile, stash=h0_stash)
        w2 = self.take_wide(f"w2 {name}", tile)
        kernels.second_map(
            hidden, x, mean, rstd, prepared, self.n, tile, w2, out, packed=packed, stash=w2_stash, keep=keep
        )
        if not keep:
            return None
        # The next layer takes the same hidden workspace.
        last = index == len(self.layers) - 1
        return LayerState(source, mix, x, HiddenState(h0, w2, False), (hidden, mean, rstd) if last else None)

    def restored_state(self, index: int, source: Edges, tile: Tile, hidden: HiddenState) -> LayerState:
        """The state of a layer from its input and the two stashed tensors, without a matrix product over pairs."""
        x = self.take(f"x {index}", tile)
        mix = self.kernels.prologue(self.layers[index].layer, source, tile, self.dropout_of(index), x)
        return LayerState(source, mix, x, hidden, None)


def _prepare(layer: EdgeLayer, operand: torch.dtype) -> Prepared:
    # Rounded to the operand's dtype first: the hidden norm takes away the row sums of what is really multiplied.
    folded = (layer.ff2_weight * layer.ffln_weight).to(operand)
    shift = torch.addmv(layer.ff2_bias, layer.ff2_weight, layer.ffln_bias)
    ff1_weight, ff1_bias = layer.ff1_weight.to(operand), layer.ff1_bias.to(operand)
    return Prepared(layer, ff1_weight, ff1_bias, folded, folded.sum(1, dtype=shift.dtype), shift)


class FieldGradients:
    """Accumulates the gradients of a field over tiles, in the order of the tiles.

    Args:
        field: the field. need_base: whether the gradient of the base is wanted. need_chain: of the chain.
    """

    def __init__(self, field: PairField, *, need_base: bool, need_chain: bool) -> None:
        self.field, self.need_base, self.need_chain = field, need_base, need_chain
        self.base = None
        if need_base and field.packed:  # every gradient is written by one tile
            self.base = packed_storage(field.base, field.n, field.width).zero_()
        elif need_base:  # those of the nodes are sums over tiles
            self.base = torch.zeros_like(field.base, dtype=field.dtype)
        self.sums = [LayerSums(prepared) for prepared in field.layers]

    @property
    def wanted(self) -> bool:
        """Whether any gradient of the field is wanted at all."""
        return self.need_base or (self.need_chain and bool(self.sums))

    def add(self, tile: Tile, grad: Tensor, states: list[LayerState], *, packed: bool = False) -> None:
        """Backpropagate the gradient of a tile of edges, (R S, D), or packed; may overwrite a tile."""
        for index in reversed(range(len(states))):
            need_input = index > 0 or self.need_base
            grad = backward_layer(self.field, index, states[index], tile, grad, self.sums[index], need_input, packed)
            packed = False
        if self.base is None:
            return
        kernels, field = self.field.kernels, self.field
        if packed:
            grad = kernels.load(grad, field.n, tile, field.take_wide("grad", tile), symmetric=False)
        if field.packed:
            kernels.add_packed(self.base, field.n, tile, grad)
        else:
            kernels.add_product(field.base, tile, grad, self.base)

    def chain(self) -> list[Tensor]:
        """Gradients of the chain, in its order."""
        pairs = zip(self.sums, self.field.layers, strict=True)
        return [grad for sums, prepared in pairs for grad in sums.unfold(prepared)]


def backward_layer(
    field: PairField,
    index: int,
    state: LayerState,
    tile: Tile,
    grad: Tensor,
    sums: LayerSums,
    need_input: bool,
    packed: bool,
) -> Tensor | None:
    """Gradient of one edge layer on a tile: adds to ``sums``, returns the gradient of the layer's input (R S, D)."""
    prepared, kernels, n = field.layers[index], field.kernels, field.n
    hidden_width = 4 * field.width
    if state.activated is None:
        hidden = field.take("hidden", tile, hidden_width)
        mean, rstd = kernels.hidden(state.hidden.h0, hidden, n, tile, packed=state.hidden.packed)
    else:
        hidden, mean, rstd = state.activated

    # (13): the second A, the two maps and the hidden norm between them.
    grad_w2, scaled = field.take_wide("grad w2", tile), field.take("scaled", tile)
    means = kernels.epilogue_backward(
        grad, state.hidden, state.x, mean, rstd, prepared, n, tile, sums, grad_w2, scaled, packed=packed
    )
    accumulate(sums.folded, scaled.T, hidden)
    grad_h0 = field.take("grad h0", tile, hidden_width)
    kernels.hidden_gradient(
        scaled, hidden, state.x, state.hidden, mean, rstd, means, prepared, n, tile, sums, grad_h0
    )
    accumulate(sums.ff1_weight, grad_h0.T, state.x)
    accumulate(grad_w2, grad_h0, prepared.ff1_weight)

    # (9)-(12): the first A, the mix of the two values, and attention.
    return kernels.prologue_backward(
        grad_w2, state.source, state.mix, prepared.layer, tile, sums, need_input=need_input
    )


def with_smaller_tiles(run: Callable[[int], T], pairs_per_tile: int, field: PairField) -> T:
    """Run with a tile size; an allocation failure is answered once with half of it, and with ``field`` emptied."""
    return tried_twice(
        lambda shrink: run(max(1, pairs_per_tile // shrink)),
        field.base.device,
        field.workspace.clear,
        size=f"tiles of {pairs_per_tile} pairs",
    )
