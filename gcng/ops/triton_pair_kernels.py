"""The passes over a tile of pairs as Triton kernels: hands each one to its launcher in ``kernels/``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gcng.ops.pair_kernels import (
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

if TYPE_CHECKING:
    from gcng.kernels.product_tiles import EdgeProducts


class TritonPairKernels(TorchPairKernels):
    """The passes on a GPU; 16-bit inputs keep their dtype in operands and stashes, sums are in float32.

    Launchers are imported where they are called: triton must not be loaded before a GPU is used.
    """

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    # -- edges and packed storage --------------------------------------------------------------------------------

    def edges(self, source: Edges, tile: Tile, out: Tensor) -> Tensor:
        from gcng.kernels import pair_storage

        if source.kind == TILE:
            return source.values
        pair_storage.tile_edges(source.values, source.kind, source.n, tile, out)
        return out

    def store(self, packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
        from gcng.kernels import pair_storage

        pair_storage.store_tile(packed, n, tile, values)

    def load(self, packed: Tensor, n: int, tile: Tile, out: Tensor, *, symmetric: bool = True) -> Tensor:
        from gcng.kernels import pair_storage

        pair_storage.tile_edges(packed, "packed", n, tile, out, symmetric)
        return out

    def add_packed(self, packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
        from gcng.kernels import pair_storage

        pair_storage.store_tile(packed, n, tile, values, add=True)

    def add_product(self, nodes: Tensor, tile: Tile, grad: Tensor, out: Tensor) -> None:
        from gcng.kernels import pair_storage

        pair_storage.add_product(nodes, tile, grad, out)

    # -- the edge layer ------------------------------------------------------------------------------------------

    def prologue(self, layer: EdgeLayer, source: Edges, tile: Tile, dropout: LayerDropout | None, out: Tensor) -> Mix:
        """As the contract; ``w`` is not kept, the backward makes it again."""
        from gcng.kernels import edge_prologue

        weights = edge_prologue.edge_prologue(layer, source.values, source.kind, source.n, tile, dropout, out)
        return Mix(*weights, None)

    def hidden(
        self, h0: Tensor, out: Tensor, n: int, tile: Tile, *, packed: bool = False, stash: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        from gcng.kernels import edge_hidden

        return edge_hidden.edge_hidden(h0, out, n, tile, packed, stash)

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
        from gcng.kernels import edge_epilogue

        edge_epilogue.edge_epilogue(y, x, mean, rstd, prepared, n, tile, out, packed, stash)

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
        from gcng.kernels import edge_epilogue

        return edge_epilogue.edge_epilogue_backward(
            grad, state.w2, x, mean, rstd, prepared, n, tile, sums, out, scaled, packed, state.packed
        )

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
        """As the contract; ``hidden`` is not read but made again from h0."""
        from gcng.kernels import edge_hidden

        edge_hidden.edge_hidden_backward(
            grad, state.h0, mean, rstd, means, n, tile, state.packed, hidden.dtype, sums.ff1_bias
        )

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
        from gcng.kernels import edge_prologue

        edge_prologue.edge_prologue_backward(
            grad, source.values, source.kind, source.n, tile, mix, layer, sums, need_input
        )
        return grad if need_input else None

    # -- products with what follows them: library and pass, or a kernel where the table of product_tiles has one -----

    def edge_mlp(self, x: Tensor, prepared: Prepared, n: int, tile: Tile, out: Tensor, *, packed: bool = False) -> bool:
        schedule = self._products(x).mlp
        if schedule is None:
            return False
        from gcng.kernels import edge_mlp

        edge_mlp.edge_mlp(x, prepared, n, tile, out, packed, schedule)
        return True

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
        schedule = self._products(x).first_map
        if schedule is None:
            return super().first_map(x, prepared, h0, out, n, tile, stash=stash)
        from gcng.kernels import edge_products

        kept = None if out is h0 else h0
        return edge_products.edge_first_map(x, prepared, kept, out, n, tile, stash, schedule)

    def second_map(
        self,
        hidden: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        prepared: Prepared,
        n: int,
        tile: Tile,
        w2: Tensor,
        out: Tensor,
        *,
        packed: bool = False,
        stash: Tensor | None = None,
        keep: bool = True,
    ) -> None:
        from gcng.kernels import edge_epilogue, edge_products, edge_wide_rows

        schedule = self._products(x).second_map
        if schedule is None:
            product(hidden, prepared.folded.T, w2)
            edge_epilogue.edge_epilogue(w2, x, mean, rstd, prepared, n, tile, out, packed, stash, keep)
            return
        if not schedule.holds_rows(x.shape[-1]):
            edge_wide_rows.edge_wide_second_map(
                hidden, x, mean, rstd, prepared, n, tile, w2, out, packed, stash, schedule
            )
            return
        w2 = w2 if keep else None
        edge_products.edge_second_map(hidden, x, mean, rstd, prepared, n, tile, w2, out, packed, stash, schedule)

    def hidden_gradient(
        self,
        scaled: Tensor,
        hidden: Tensor,
        x: Tensor,
        state: HiddenState,
        mean: Tensor,
        rstd: Tensor,
        means: tuple[Tensor, Tensor],
        prepared: Prepared,
        n: int,
        tile: Tile,
        sums: LayerSums,
        out: Tensor,
    ) -> None:
        schedule = self._products(x).hidden_gradient
        if schedule is None:
            super().hidden_gradient(scaled, hidden, x, state, mean, rstd, means, prepared, n, tile, sums, out)
            return
        from gcng.kernels import edge_gradient_product

        edge_gradient_product.edge_hidden_gradient(
            scaled, x, state.h0, mean, rstd, means, prepared, n, tile, None, out, sums.ff1_bias, state.packed, schedule
        )

    def product_messages(
        self,
        nodes: Tensor,
        weight: Tensor,
        bias: Tensor,
        n: int,
        tile: Tile,
        out: Tensor,
        *,
        stash: Tensor | None = None,
    ) -> bool:
        schedule = self._products(nodes).messages
        if schedule is None:
            return False
        from gcng.kernels import message_products

        message_products.product_messages(nodes, weight, bias, n, tile, out, stash, schedule)
        return True

    def _products(self, x: Tensor) -> EdgeProducts:
        """Which products over rows of ``x`` (B, D) take a kernel."""
        from gcng.kernels import product_tiles
        from gcng.kernels.launch import architecture

        return product_tiles.edge_products(x.shape[-1], x.dtype, architecture(x.device))

    # -- messages ------------------------------------------------------------------------------------------------

    def messages(self, before: Tensor, n: int, tile: Tile, out: Tensor, *, stash: Tensor | None = None) -> None:
        from gcng.kernels import messages

        messages.messages(before, n, tile, out, stash)

    def messages_backward(
        self, grad: Tensor, before: Tensor, n: int, tile: Tile, out: Tensor, bias: Tensor, *, packed: bool = False
    ) -> None:
        from gcng.kernels import messages

        messages.messages_backward(grad, before, n, tile, out, bias, packed)

    # -- gates ---------------------------------------------------------------------------------------------------

    def gates(
        self, logits: Tensor, n: int, tile: Tile, *, stash: Tensor | None = None, spread: GateSpread | None = None
    ) -> None:
        from gcng.kernels import gates

        gates.gates(logits, n, tile, stash, spread)

    def spread_gradient(self, gates: Tensor, row_means: Tensor, scale: Tensor, tile: Tile, out: Tensor) -> None:
        from gcng.kernels import gates as kernels

        kernels.spread_gradient(gates, row_means, scale, tile, out)

    def gate_logits_gradient(self, grad: Tensor, gates: Tensor, out: Tensor, bias: Tensor | None) -> None:
        from gcng.kernels import gates as kernels

        kernels.gate_logits_gradient(grad, gates, out, bias)

    def center(self, values: Tensor, mean: Tensor, out: Tensor) -> None:
        from gcng.kernels import edge_moments

        edge_moments.center(values, mean, out)

    def norm_gradient(
        self, grad: Tensor, e: Tensor, weights: Tensor, mean: Tensor, constant: Tensor, linear: Tensor
    ) -> None:
        from gcng.kernels import edge_moments

        edge_moments.norm_gradient(grad, e, weights, mean, constant, linear)

    def moments(self, values: Tensor, weights: Tensor, shift: Tensor, total: Tensor, squares: Tensor) -> None:
        from gcng.kernels import edge_moments

        edge_moments.edge_moments(values, weights, shift, total, squares)
