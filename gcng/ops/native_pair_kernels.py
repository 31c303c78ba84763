"""The passes over a tile of pairs, compiled (csrc/cpu): each reads and writes every tensor of a tile once.

Owns the schemas of the kernels and the form :class:`NativePairKernels` of the contract in
:mod:`gcng.ops.pair_kernels`. What that form keeps for a backward differs: the mix of (12) is never stored, and the
hidden layer is computed again from h0 where it is needed, both in the pass that needs them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gcng.ops import native
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
    Mix,
    Prepared,
    TorchPairKernels,
)
from gcng.ops.products import product
from gcng.ops.tiles import Tile

_KINDS = {PRODUCT: 0, PACKED: 1, TILE: 2}
_TILE = "int n, int r0, int r1, int c0, int c1"
_NODES = "Tensor source, int kind, Tensor key_query, Tensor key_bias, Tensor value, Tensor norm_weight"

native.define(
    f"edge_prologue({_NODES}, Tensor norm_bias, Tensor? identity, Tensor? seed, int layer, float p, {_TILE}, "
    "Tensor(a!) gate, Tensor(b!) weight_row, Tensor(c!) weight_column, Tensor(d!) x) -> ()"
)
native.define(
    f"edge_hidden(Tensor h0, bool packed, Tensor? bias, Tensor(a!)? stash, {_TILE}, Tensor(b!) out, Tensor(c!) mean, "
    "Tensor(d!) rstd) -> ()"
)
native.define(
    "edge_epilogue(Tensor(a!) y, Tensor x, Tensor mean, Tensor rstd, Tensor row_sums, Tensor shift, "
    f"Tensor norm_weight, Tensor norm_bias, {_TILE}, Tensor(b!) out, bool packed, Tensor(c!)? stash) -> ()"
)
native.define(
    "edge_epilogue_backward(Tensor grad, bool packed, Tensor w2, bool w2_packed, Tensor x, Tensor mean, Tensor rstd, "
    f"Tensor row_sums, Tensor shift, Tensor norm_weight, int hidden_width, {_TILE}, Tensor(a!) sum_ln_weight, "
    "Tensor(b!) sum_ln_bias, Tensor(c!) sum_shift, Tensor(d!) sum_folded_mean, Tensor(e!) out, Tensor(f!) scaled, "
    "Tensor(g!) mean_grad, Tensor(h!) mean_product) -> ()"
)
native.define(
    "edge_hidden_backward(Tensor(a!) grad, Tensor h0, bool packed, Tensor mean, Tensor rstd, Tensor mean_grad, "
    f"Tensor mean_product, {_TILE}, Tensor(b!) bias) -> ()"
)
native.define(
    f"edge_prologue_backward(Tensor(a!) grad, {_NODES}, Tensor gate, Tensor weight_row, Tensor weight_column, {_TILE}, "
    "Tensor(b!) sum_ln_weight, Tensor(c!) sum_ln_bias, Tensor(d!) sum_value, Tensor(e!) sum_key_query, "
    "Tensor(f!) sum_key_bias, bool need_input) -> ()"
)
native.define(f"messages_forward(Tensor before, Tensor(a!)? stash, {_TILE}, Tensor(b!) out) -> ()")
native.define(
    f"messages_backward(Tensor grad, Tensor before, bool packed, {_TILE}, Tensor(a!) out, Tensor(b!) bias) -> ()"
)
native.define(
    "gates_forward(Tensor(a!) logits, Tensor(b!)? stash, Tensor? center, Tensor(c!)? row_sums, Tensor(d!)? squares, "
    f"{_TILE}) -> ()"
)
native.define(f"gate_spread_gradient(Tensor gates, Tensor row_means, Tensor scale, {_TILE}, Tensor(a!) out) -> ()")
native.define("gate_logits_gradient(Tensor grad, Tensor gates, Tensor(a!) out, Tensor(b!)? bias) -> ()")
native.define("gate_center(Tensor values, Tensor mean, Tensor(a!) out) -> ()")
native.define(
    "gate_norm_gradient(Tensor(a!) grad, Tensor e, Tensor weights, Tensor mean, Tensor constant, Tensor linear) -> ()"
)
native.define("gate_moments(Tensor values, Tensor weights, Tensor shift, Tensor(a!) total, Tensor(b!) squares) -> ()")
native.define(f"pair_products(Tensor nodes, {_TILE}, Tensor(a!) out) -> ()")
native.define(f"pair_store(Tensor values, {_TILE}, Tensor(a!) packed) -> ()")
native.define(f"pair_load(Tensor packed, {_TILE}, bool symmetric, Tensor(a!) out) -> ()")
native.define(f"pair_add_packed(Tensor values, {_TILE}, Tensor(a!) packed) -> ()")
native.define(f"pair_add_product(Tensor nodes, Tensor grad, {_TILE}, Tensor(a!) out) -> ()")


class NativePairKernels(TorchPairKernels):
    """The passes in C++, for float32 and float64 on the CPU, where :func:`gcng.ops.native.cpu` has a library."""

    @property
    def _ops(self) -> Any:
        return native.cpu()

    # -- edges and packed storage --------------------------------------------------------------------------------

    def edges(self, source: Edges, tile: Tile, out: Tensor) -> Tensor:
        if source.kind == TILE:
            return source.values
        if source.kind == PACKED:
            return self.load(source.values, source.n, tile, out)
        self._ops.pair_products(source.values, source.n, *tile, out)
        return out

    def store(self, packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
        self._ops.pair_store(values, n, *tile, packed)

    def load(self, packed: Tensor, n: int, tile: Tile, out: Tensor, *, symmetric: bool = True) -> Tensor:
        self._ops.pair_load(packed, n, *tile, symmetric, out)
        return out

    def add_packed(self, packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
        self._ops.pair_add_packed(values, n, *tile, packed)

    def add_product(self, nodes: Tensor, tile: Tile, grad: Tensor, out: Tensor) -> None:
        self._ops.pair_add_product(nodes, grad, nodes.shape[0], *tile, out)

    # -- the edge layer ------------------------------------------------------------------------------------------

    def prologue(self, layer: EdgeLayer, source: Edges, tile: Tile, dropout: LayerDropout | None, out: Tensor) -> Mix:
        gate, row, column = (out.new_empty(tile.shape) for _ in range(3))
        identity, seed, index, p = dropout or (None, None, 0, 0.0)
        self._ops.edge_prologue(
            *_nodes(source, layer), layer.ln_bias, identity, seed, index, p, source.n, *tile, gate, row, column, out
        )
        return Mix(gate, row, column, None)

    def hidden(
        self, h0: Tensor, out: Tensor, n: int, tile: Tile, *, packed: bool = False, stash: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mean, rstd = (out.new_empty(out.shape[0]) for _ in range(2))
        self._ops.edge_hidden(h0, packed, None, stash, n, *tile, out, mean, rstd)
        return mean, rstd

    def first_map(
        self,
        x: Tensor,
        prepared: Prepared,
        h0: Tensor,
        out: Tensor,
        n: int,
        tile: Tile,
        *,
        stash: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if out is not h0:
            return super().first_map(x, prepared, h0, out, n, tile, stash=stash)
        # Nobody reads h0 again, so the pass adds the bias, which addmm would write to every row of its result first.
        product(x, prepared.ff1_weight.T, out)
        mean, rstd = (out.new_empty(out.shape[0]) for _ in range(2))
        self._ops.edge_hidden(out, False, prepared.ff1_bias, stash, n, *tile, out, mean, rstd)
        return mean, rstd

    def epilogue(
        self,
        y: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        prepared: Prepared,
        n: int,
        tile: Tile,
        out: Tensor,
        *,
        packed: bool = False,
        stash: Tensor | None = None,
    ) -> None:
        layer = prepared.layer
        self._ops.edge_epilogue(
            y, x, mean, rstd, prepared.row_sums, prepared.shift, layer.ln_weight, layer.ln_bias, n, *tile, out, packed,
            stash,
        )  # fmt: skip

    def epilogue_backward(
        self,
        grad: Tensor,
        state: HiddenState,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        prepared: Prepared,
        n: int,
        tile: Tile,
        sums: LayerSums,
        out: Tensor,
        scaled: Tensor,
        *,
        packed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        mean_grad, mean_product = (out.new_empty(out.shape[0]) for _ in range(2))
        self._ops.edge_epilogue_backward(
            grad, packed, state.w2, state.packed, x, mean, rstd, prepared.row_sums, prepared.shift,
            prepared.layer.ln_weight, prepared.folded.shape[1], n, *tile, sums.ln_weight, sums.ln_bias, sums.shift,
            sums.folded_mean, out, scaled, mean_grad, mean_product,
        )  # fmt: skip
        return mean_grad, mean_product

    def hidden_backward(
        self,
        grad: Tensor,
        hidden: Tensor,
        state: HiddenState,
        mean: Tensor,
        rstd: Tensor,
        means: tuple[Tensor, Tensor],
        n: int,
        tile: Tile,
        sums: LayerSums,
    ) -> None:
        self._ops.edge_hidden_backward(grad, state.h0, state.packed, mean, rstd, *means, n, *tile, sums.ff1_bias)

    def prologue_backward(
        self,
        grad: Tensor,
        source: Edges,
        mix: Mix,
        layer: EdgeLayer,
        tile: Tile,
        sums: LayerSums,
        *,
        need_input: bool,
    ) -> Tensor | None:
        self._ops.edge_prologue_backward(
            grad, *_nodes(source, layer), mix.gate, mix.weight_row, mix.weight_column, source.n, *tile, sums.ln_weight,
            sums.ln_bias, sums.value, sums.key_query, sums.key_bias, need_input,
        )  # fmt: skip
        return grad if need_input else None

    # -- messages ------------------------------------------------------------------------------------------------

    def messages(self, before: Tensor, n: int, tile: Tile, out: Tensor, *, stash: Tensor | None = None) -> None:
        self._ops.messages_forward(before, stash, n, *tile, out)

    def messages_backward(
        self, grad: Tensor, before: Tensor, n: int, tile: Tile, out: Tensor, bias: Tensor, *, packed: bool = False
    ) -> None:
        self._ops.messages_backward(grad, before, packed, n, *tile, out, bias)

    # -- gates ---------------------------------------------------------------------------------------------------

    def gates(
        self, logits: Tensor, n: int, tile: Tile, *, stash: Tensor | None = None, spread: GateSpread | None = None
    ) -> None:
        self._ops.gates_forward(logits, stash, *(spread or (None, None, None)), n, *tile)

    def spread_gradient(self, gates: Tensor, row_means: Tensor, scale: Tensor, tile: Tile, out: Tensor) -> None:
        self._ops.gate_spread_gradient(gates, row_means, scale, row_means.shape[0], *tile, out)

    def gate_logits_gradient(self, grad: Tensor, gates: Tensor, out: Tensor, bias: Tensor | None) -> None:
        self._ops.gate_logits_gradient(grad, gates, out, bias)

    def center(self, values: Tensor, mean: Tensor, out: Tensor) -> None:
        self._ops.gate_center(values, mean, out)

    def norm_gradient(
        self, grad: Tensor, e: Tensor, weights: Tensor, mean: Tensor, constant: Tensor, linear: Tensor
    ) -> None:
        self._ops.gate_norm_gradient(grad, e, weights, mean, constant, linear)

    def moments(self, values: Tensor, weights: Tensor, shift: Tensor, total: Tensor, squares: Tensor) -> None:
        self._ops.gate_moments(values, weights, shift, total, squares)


def _nodes(source: Edges, layer: EdgeLayer) -> tuple:
    kind = _KINDS[source.kind]
    return source.values, kind, layer.key_query, layer.key_bias, layer.value, layer.ln_weight
