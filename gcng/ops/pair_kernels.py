"""The passes over a tile of pairs that run between the matrix products: their contract, and plain torch.

An edge layer is four matrix products; everything else about a tile is elementwise work and sums over its rows,
columns or channels. That work is behind one class with three forms: :class:`TorchPairKernels` here (any device), the
compiled one of ``csrc/cpu`` and the Triton one of ``kernels/``. :func:`pair_kernels` picks by device.

Shapes: a tile has R rows and S columns, its pairs are flattened to R S. ``dtype`` is what statistics, sums, and the
gradients of edges and w2 are in (float32 or float64); ``operand`` is what the operands of matrix products and the
stashes are stored in: edges, nodes of a product, x, the hidden layer and its gradient, gates, messages (16 bit for
Triton on 16-bit inputs, else ``dtype``). A tensor that is *packed* is (P, ...) by the storage of
:mod:`gcng.ops.tiles`, and is read or written in place of a tile. All tensors are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcng.ops.products import linear, product
from gcng.ops.registration import compute_dtype
from gcng.ops.tiles import Tile, add_tile, load_tile, split_mirror, store_tile
from gcng.reference.dropout import dropout_scales

EPS = 1e-5
aten = torch.ops.aten


class EdgeLayer(NamedTuple):
    """What one edge layer needs: three node tensors and eight weights, in this order in every op's ``chain``."""

    key_query: Tensor  # (N, D) keys through the transposed query map: K Wq
    key_bias: Tensor  # (N,) K bq
    value: Tensor  # (N, D)
    ff1_weight: Tensor  # (4D, D)
    ff1_bias: Tensor  # (4D,)
    ffln_weight: Tensor  # (4D,)
    ffln_bias: Tensor  # (4D,)
    ff2_weight: Tensor  # (D, 4D)
    ff2_bias: Tensor  # (D,)
    ln_weight: Tensor  # (D,)
    ln_bias: Tensor  # (D,)


class Prepared(NamedTuple):
    """A layer with the hidden norm folded into the second map (identity I4): only row statistics are left of it."""

    layer: EdgeLayer  # in dtype
    ff1_weight: Tensor  # (4D, D) as an operand
    ff1_bias: Tensor  # (4D,) as an operand
    folded: Tensor  # (D, 4D) Wff2 diag(gain), an operand
    row_sums: Tensor  # (D,) of folded: what a constant hidden row would give, in dtype
    shift: Tensor  # (D,) Wff2 shift + bff2, in dtype


class LayerDropout(NamedTuple):
    """Counter-based dropout of (11) in one layer: see gcng.reference.dropout."""

    identity: Tensor  # (N,) int64 node identities
    seed: Tensor  # 0-dim int64
    layer: int
    p: float


class Edges(NamedTuple):
    """Where the edges of a tile come from."""

    values: Tensor  # (N, D) nodes whose products are e0, (P, D) packed edges, or (R S, D) the edges themselves
    kind: str  # PRODUCT, PACKED or TILE
    n: int  # N


PRODUCT, PACKED, TILE = "product", "packed", "tile"


class Mix(NamedTuple):
    """The two weights of (10)-(12) for a tile."""

    gate: Tensor  # (R, S) sigmoid: the row endpoint's weight before dropout
    weight_row: Tensor  # (R, S) after dropout
    weight_column: Tensor  # (R, S)
    w: Tensor | None  # (R S, D) the mix of (12), where computing it again is dear


class HiddenState(NamedTuple):
    """The hidden layer of a tile before its gelu, and what reaches the last one of the layer; tiles or packed."""

    h0: Tensor  # (R S, 4D) or (P, 4D)
    w2: Tensor  # (R S, D) or (P, D)
    packed: bool


class LayerSums:
    """Sums over pairs from which the gradients of one edge layer follow."""

    def __init__(self, prepared: Prepared) -> None:
        layer = prepared.layer
        self.key_query = torch.zeros_like(layer.key_query)
        self.key_bias = torch.zeros_like(layer.key_bias)
        self.value = torch.zeros_like(layer.value)
        self.ff1_weight = torch.zeros_like(layer.ff1_weight)
        self.ff1_bias = torch.zeros_like(layer.ff1_bias)
        self.folded = torch.zeros_like(layer.ff2_weight)
        self.folded_mean = torch.zeros_like(layer.ff2_bias)
        self.shift = torch.zeros_like(layer.ff2_bias)
        self.ln_weight = torch.zeros_like(layer.ln_weight)
        self.ln_bias = torch.zeros_like(layer.ln_bias)

    def unfold(self, prepared: Prepared) -> EdgeLayer:
        """Gradients of the unfolded parameters: ``folded = W2 diag(g)``, ``shift = W2 b + b2``."""
        layer = prepared.layer
        folded = self.folded - self.folded_mean[:, None]
        ff2_weight = torch.addcmul(folded * layer.ffln_weight, self.shift[:, None], layer.ffln_bias)
        return EdgeLayer(
            self.key_query,
            self.key_bias,
            self.value,
            self.ff1_weight,
            self.ff1_bias,
            (layer.ff2_weight * folded).sum(0),
            layer.ff2_weight.T @ self.shift,
            ff2_weight,
            self.shift,
            self.ln_weight,
            self.ln_bias,
        )


class GateSpread(NamedTuple):
    """Running sums of the gates around the gate of an average edge, from which (26) follows (identity I5)."""

    center: Tensor  # (D,)
    row_sums: Tensor  # (N, D)
    squares: Tensor  # 0-dim float64


class TorchPairKernels:
    """The passes in plain torch, on any device and in any floating dtype; the others equal it up to rounding."""

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the operands of products are stored in, for inputs of ``dtype``."""
        return compute_dtype(dtype)

    # -- edges and packed storage --------------------------------------------------------------------------------

    def edges(self, source: Edges, tile: Tile, out: Tensor) -> Tensor:
        """The edges of a tile, (R S, D): ``out``, or the source itself where it is a tile."""
        if source.kind == TILE:
            return source.values
        if source.kind == PACKED:
            load_tile(source.values, source.n, tile, out=out)
            return out
        values = source.values
        torch.mul(values[tile.rows, None], values[None, tile.columns], out=out.view(*tile.shape, -1))
        return out

    def store(self, packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
        """Write the pairs on and above the diagonal of a tile (R S, C) to packed storage (P, C)."""
        store_tile(packed, n, tile, values.view(*tile.shape, -1))

    def load(self, packed: Tensor, n: int, tile: Tile, out: Tensor, *, symmetric: bool = True) -> Tensor:
        """Read a tile from packed storage into ``out`` (R S, C); below the diagonal the mirrored values, or zeros."""
        load_tile(packed, n, tile, symmetric=symmetric, out=out)
        return out

    def add_packed(self, packed: Tensor, n: int, tile: Tile, values: Tensor) -> None:
        """Add a tile's gradients (R S, D) to packed storage; both orders of a pair in the square are summed."""
        add_tile(packed, n, tile, values.view(*tile.shape, -1))

    def add_product(self, nodes: Tensor, tile: Tile, grad: Tensor, out: Tensor) -> None:
        """Add the gradient of ``nodes`` (N, D), given that of their products (R S, D); ``out`` (N, D)."""
        wide = grad.view(*tile.shape, -1)
        out[tile.rows] += (wide * nodes[None, tile.columns]).sum(1)
        # Every evaluation depends on both of its endpoints, mirrored or not.
        out[tile.columns] += (wide * nodes[tile.rows, None]).sum(0)

    # -- the edge layer ------------------------------------------------------------------------------------------

    def prologue(
        self, layer: EdgeLayer, source: Edges, tile: Tile, dropout: LayerDropout | None, out: Tensor
    ) -> Mix:
        """(9)-(12): attend, mix, gelu and norm. Writes x (R S, D) to ``out``."""
        width = out.shape[-1]
        values = source.values
        if source.kind == PRODUCT:
            # e0 is a product, so both logits of the whole tile are two small matrix products.
            u_rows, u_columns = values[tile.rows], values[tile.columns]
            delta = (u_rows * layer.key_query[tile.rows]) @ u_columns.T
            delta = delta - u_rows @ (u_columns * layer.key_query[tile.columns]).T
            e = u_rows[:, None] * u_columns
        else:
            e = values.view(*tile.shape, width) if source.kind == TILE else load_tile(values, source.n, tile)
            delta = torch.matmul(e, layer.key_query[tile.rows, :, None])[..., 0]
            delta = delta - torch.matmul(e.transpose(0, 1), layer.key_query[tile.columns, :, None])[..., 0].T
        delta = delta + (layer.key_bias[tile.rows, None] - layer.key_bias[None, tile.columns])
        gate = torch.sigmoid(delta / math.sqrt(width))
        row, column = gate, 1 - gate
        if dropout is not None:
            identity = dropout.identity
            scales = dropout_scales(
                dropout.seed, dropout.layer, dropout.p, identity[tile.rows], identity[tile.columns]
            )
            row, column = row * scales[0].to(row), column * scales[1].to(row)
        w = e + row[..., None] * layer.value[tile.rows, None]
        w += column[..., None] * layer.value[None, tile.columns]
        w = w.flatten(0, 1)
        out.copy_(aten.native_layer_norm(aten.gelu(w), [width], layer.ln_weight, layer.ln_bias, EPS)[0])
        return Mix(gate, row, column, w)

    def hidden(
        self, h0: Tensor, out: Tensor, n: int, tile: Tile, *, packed: bool = False, stash: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """gelu of the hidden layer into ``out`` (R S, 4D), which may be ``h0``; its mean and 1/deviation, (R S,).

        ``packed``: whether h0 is. ``stash``: (P, 4D) packed, receives h0.

        A variance from sums of squares is safe here: the mean of a gelu is of the size of its deviation.
        """
        if packed:
            h0 = load_tile(h0, n, tile, out=out).flatten(0, 1)
        if stash is not None:
            self.store(stash, n, tile, h0)
        aten.gelu.out(h0, out=out)
        mean = out.mean(1)
        square = torch.linalg.vector_norm(out, dim=1).square_().div_(out.shape[1])
        return mean, torch.rsqrt((square - mean.square()).clamp_(min=0) + EPS)

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
        """(13) behind its products: the hidden norm on ``y`` (R S, D), the residual, gelu and norm.

        ``y`` becomes w2, what the last gelu is taken of; ``stash`` (P, D) receives it. ``out``: (R S, D), or packed.
        """
        layer = prepared.layer
        y.addr_(mean, prepared.row_sums, alpha=-1).mul_(rstd[:, None]).add_(prepared.shift).add_(x)
        if stash is not None:
            self.store(stash, n, tile, y)
        value = aten.native_layer_norm(aten.gelu(y), [y.shape[-1]], layer.ln_weight, layer.ln_bias, EPS)[0]
        if packed:
            self.store(out, n, tile, value)
        else:
            out.copy_(value)

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
        """Backward of :meth:`epilogue`: the gradient of w2 to ``out``, times rstd to ``scaled``, both (R S, D).

        ``grad``: (R S, D), or packed, where each unordered pair's gradient belongs to its upper evaluation.

        Returns:
            The two row means (R S,) that the hidden norm's backward needs; they follow from vectors of width D.
        """
        layer, hidden_width = prepared.layer, prepared.folded.shape[1]
        if packed:
            grad = load_tile(grad, n, tile, symmetric=False).flatten(0, 1)
        w2 = load_tile(state.w2, n, tile).flatten(0, 1) if state.packed else state.w2
        activated = aten.gelu(w2)
        stats = aten.native_layer_norm(activated, [x.shape[-1]], None, None, EPS)[1:]
        out.copy_(_backward_activation_norm(grad, w2, activated, stats, layer, sums))
        torch.mul(out, rstd[:, None], out=scaled)
        # Not by a matrix-vector product, which adds the pairs of a tile one after the other: what that loses is lost by
        # a whole row of the gradient of ff2_weight.
        sums.folded_mean += (scaled * mean[:, None]).sum(0)
        sums.shift += out.sum(0)
        mapped = (w2 - x).sub_(prepared.shift)
        return torch.mv(out, prepared.row_sums) / hidden_width, mapped.mul_(out).sum(1) / hidden_width

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
        """Backward of :meth:`hidden`: ``grad`` (R S, 4D), the product with the folded map, becomes that of h0."""
        mean_grad, mean_product = means
        slope = rstd.square() * mean_product
        grad.addcmul_(hidden, slope[:, None], value=-1).add_((slope * mean - rstd * mean_grad)[:, None])
        h0 = load_tile(state.h0, n, tile).flatten(0, 1) if state.packed else state.h0
        aten.gelu_backward.grad_input(grad, h0, grad_input=grad)
        sums.ff1_bias += grad.sum(0)

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
        """Backward of :meth:`prologue`: from the gradient of x (R S, D) to that of the edges, in place."""
        width, (r, s) = grad.shape[-1], tile.shape
        e = self.edges(source, tile, torch.empty_like(grad)).view(r, s, width)
        activated = aten.gelu(mix.w)
        stats = aten.native_layer_norm(activated, [width], None, None, EPS)[1:]
        grad_w = _backward_activation_norm(grad, mix.w, activated, stats, layer, sums).view(r, s, width)
        value_rows, value_columns = layer.value[tile.rows], layer.value[tile.columns]
        sums.value[tile.rows] += torch.bmm(mix.weight_row[:, None, :], grad_w)[:, 0]
        sums.value[tile.columns] += (mix.weight_column[..., None] * grad_w).sum(0)
        along_row = torch.bmm(grad_w, value_rows[:, :, None])[..., 0]
        along_column = (grad_w * value_columns[None]).sum(-1)
        # (10): a two-way softmax is a sigmoid of the difference of logits.
        kappa = mix.weight_row * (1 - mix.gate) * along_row - mix.weight_column * mix.gate * along_column
        kappa = kappa / math.sqrt(width)
        sums.key_query[tile.rows] += torch.bmm(kappa[:, None, :], e)[:, 0]
        sums.key_query[tile.columns] -= (kappa[..., None] * e).sum(0)
        sums.key_bias[tile.rows] += kappa.sum(1)
        sums.key_bias[tile.columns] -= kappa.sum(0)
        if not need_input:
            return None
        grad_w += kappa[..., None] * layer.key_query[tile.rows, None]
        grad_w -= kappa[..., None] * layer.key_query[None, tile.columns]
        return grad_w.flatten(0, 1)

    # -- products with what follows them -------------------------------------------------------------------------

    def edge_mlp(
        self, x: Tensor, prepared: Prepared, n: int, tile: Tile, out: Tensor, *, packed: bool = False
    ) -> bool:
        """All of (13) on x (R S, D), to ``out``, keeping nothing; False where the steps below have to do it."""
        return False

    def first_map(
        self, x: Tensor, prepared: Prepared, h0: Tensor, out: Tensor, n: int, tile: Tile, *, stash: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first map of x (R S, D) to ``h0`` (R S, 4D), and :meth:`hidden` of it to ``out``, which may be ``h0``.

        Where it is, nobody reads h0 afterwards.
        """
        linear(x, prepared.ff1_weight, prepared.ff1_bias, h0)
        return self.hidden(h0, out, n, tile, stash=stash)

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
        """The folded map of ``hidden`` (R S, 4D) to ``w2`` (R S, D), and :meth:`epilogue` of it to ``out``.

        Without ``keep`` nobody reads ``w2`` afterwards.
        """
        product(hidden, prepared.folded.T, w2)
        self.epilogue(w2, x, mean, rstd, prepared, n, tile, out, packed=packed, stash=stash)

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
        """The product of ``scaled`` (R S, D) with the folded map, and :meth:`hidden_backward` of it: to ``out``."""
        product(scaled, prepared.folded, out)
        self.hidden_backward(out, hidden, state, mean, rstd, means, n, tile, sums)

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
        """Messages (7) along edges that are products of ``nodes`` (N, D), map included; False: make the edges first."""
        return False

    # -- messages ------------------------------------------------------------------------------------------------

    def messages(self, before: Tensor, n: int, tile: Tile, out: Tensor, *, stash: Tensor | None = None) -> None:
        """(7): adds gelu of ``before`` (R S, D), summed over partners, to ``out`` (N, D); may overwrite before."""
        if stash is not None:
            self.store(stash, n, tile, before)
        rows, columns = split_mirror(aten.gelu_(before).view(*tile.shape, -1), tile)
        out[tile.rows] += rows
        out[tile.mirrored] += columns

    def messages_backward(
        self, grad: Tensor, before: Tensor, n: int, tile: Tile, out: Tensor, bias: Tensor, *, packed: bool = False
    ) -> None:
        """Gradient of before (R S, D) to ``out``, from that of the sums (N, D); its column sum is added to ``bias``."""
        if packed:
            before = load_tile(before, n, tile).flatten(0, 1)
        received = grad[tile.rows, None].repeat(1, tile.shape[1], 1)
        received[:, tile.mirror :] += grad[None, tile.mirrored]
        out.copy_(aten.gelu_backward(received.flatten(0, 1), before))
        bias += out.sum(0)

    # -- gates ---------------------------------------------------------------------------------------------------

    def gates(
        self, logits: Tensor, n: int, tile: Tile, *, stash: Tensor | None = None, spread: GateSpread | None = None
    ) -> None:
        """Sigmoid of ``logits`` (R S, D) in place; ``stash`` (P, D) receives the gates, ``spread`` their sums."""
        values = logits.sigmoid_().view(*tile.shape, -1)
        if stash is not None:
            self.store(stash, n, tile, logits)
        if spread is None:
            return
        centered = values - spread.center
        rows, columns = split_mirror(centered, tile)
        spread.row_sums[tile.rows] += rows
        spread.row_sums[tile.mirrored] += columns
        per_channel = centered.square_().sum(0)
        total = per_channel.sum(dtype=torch.float64) + per_channel[tile.mirror :].sum(dtype=torch.float64)
        spread.squares.add_(total)

    def spread_gradient(self, gates: Tensor, row_means: Tensor, scale: Tensor, tile: Tile, out: Tensor) -> None:
        """Gradient of (26) to ``out`` (R S, D): the deviations of both orders of a pair from their row's mean."""
        values, wide = gates.view(*tile.shape, -1), out.view(*tile.shape, -1)
        torch.sub(values, row_means[tile.rows, None], out=wide)
        mirrored = wide[:, tile.mirror :]
        mirrored += values[:, tile.mirror :] - row_means[None, tile.mirrored]
        wide *= scale

    def gate_logits_gradient(self, grad: Tensor, gates: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """The gradient of the logits to ``out`` (R S, D), which may be ``grad``, from that of the gates.

        ``bias`` (D,), where given, receives its column sum.
        """
        aten.sigmoid_backward.grad_input(grad, gates, grad_input=out)
        if bias is not None:
            bias += out.sum(0)

    def center(self, values: Tensor, mean: Tensor, out: Tensor) -> None:
        """``values`` (R S, D) minus the mean (D,), to ``out``."""
        torch.sub(values, mean, out=out)

    def norm_gradient(
        self, grad: Tensor, e: Tensor, weights: Tensor, mean: Tensor, constant: Tensor, linear: Tensor
    ) -> None:
        """Subtract what batch statistics send back: ``grad`` (B, D) -= weights (constant + (e - mean) linear)."""
        grad -= weights * torch.addcmul(constant, e - mean, linear)

    def moments(
        self, values: Tensor, weights: Tensor, shift: Tensor, total: Tensor, squares: Tensor
    ) -> None:
        """Add weighted sums of ``values`` (B, D) - shift, and of its squares, to float64 totals; weights (B, 1)."""
        centered = values - shift
        weighted = centered * weights
        total += weighted.sum(0)
        squares += (weighted * centered).sum(0)


def _backward_activation_norm(
    grad: Tensor, x: Tensor, activated: Tensor, stats: Sequence[Tensor], layer: EdgeLayer, sums: LayerSums
) -> Tensor:
    """Gradient of A(x) = LN(gelu(x)) from gelu(x) and the mean and rstd of its rows."""
    grad_activated, grad_weight, grad_bias = aten.native_layer_norm_backward(
        grad, activated, [x.shape[-1]], *stats, layer.ln_weight, layer.ln_bias, [True, True, True]
    )
    sums.ln_weight += grad_weight
    sums.ln_bias += grad_bias
    return aten.gelu_backward(grad_activated, x)
