"""The lazy edge field: a tile of e_l as a function of the nodes, and its backward.

Owns the edge layer (9)-(13) on a tile of pairs, forward and hand-derived backward (docs/derivations.md). The ops of the
pair pipeline are reductions over this field: they ask for a tile of edges and hand back its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gcng.ops.registration import compute_dtype
from gcng.ops.tiles import Tile, add_tile, load_tile
from gcng.reference.dropout import dropout_scales

EPS = 1e-5
T = TypeVar("T")
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


CHAIN_WIDTH = len(EdgeLayer._fields)
# How the schema of an op spells a field.
FIELD = "Tensor base, bool packed, Tensor[] chain, Tensor identity, Tensor seed, float p, int first_layer"


class Dropout(NamedTuple):
    """Counter-based dropout of (11): see gcng.reference.dropout."""

    identity: Tensor  # (N,) int64 node identities
    seed: Tensor  # 0-dim int64
    p: float
    first_layer: int  # layer index of the first layer of the chain


class LayerState(NamedTuple):
    """What the backward of a layer needs of one tile; pairs flattened to R * S rows."""

    e: Tensor  # (R, S, D) the layer's input
    gate: Tensor  # (R, S) sigmoid of (10): the row endpoint's weight
    scale_row: Tensor | float
    scale_column: Tensor | float
    w: Tensor  # (RS, D) before the first A
    h0: Tensor  # (RS, 4D) before the hidden gelu
    w2: Tensor  # (RS, D) before the second A


class _Prepared(NamedTuple):
    """A layer with the hidden norm folded into the second map (identity I4): only row statistics are left of it."""

    layer: EdgeLayer
    folded: Tensor  # (D, 4D) Wff2 diag(gain)
    row_sums: Tensor  # (D,) of folded: what a constant hidden row would give
    shift: Tensor  # (D,) Wff2 shift + bff2


class Workspace:
    """Scratch tensors by name, allocated once and handed out again for every tile.

    The hidden tensors of a tile are four times as wide as everything else. Taken from the allocator for every tile
    they would leave its heap in pieces, and the process would grow with the number of tiles.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self._buffers = like, {}

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """(rows, width), contents undefined; valid until the name is taken again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self._buffers[name] = self._like.new_empty(rows * width)
        return buffer[: rows * width].view(rows, width)


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
        self.dtype = compute_dtype(base.dtype)
        self.base, self.packed, self.n, self.dropout = base.to(self.dtype), packed, n, dropout
        wide = [x.to(self.dtype) for x in chain]
        starts = range(0, len(chain), CHAIN_WIDTH)
        self.layers = [_prepare(EdgeLayer(*wide[i : i + CHAIN_WIDTH])) for i in starts]
        self.workspace = Workspace(self.base)

    # -- forward ------------------------------------------------------------------------------------------------

    def initial(self, tile: Tile) -> Tensor:
        """The tile before the chain, (R, S, D)."""
        if self.packed:
            return load_tile(self.base, self.n, tile)
        return self.base[tile.rows, None] * self.base[None, tile.columns]

    def edges(self, tile: Tile) -> Tensor:
        """The tile after the chain, (R, S, D)."""
        e = self.initial(tile)
        for index in range(len(self.layers)):
            e, _ = self.forward_layer(index, e, tile)
        return e

    def edges_with_states(self, tile: Tile) -> tuple[Tensor, list[LayerState]]:
        """The tile after the chain, and what its backward needs."""
        e, states = self.initial(tile), []
        for index in range(len(self.layers)):
            e, state = self.forward_layer(index, e, tile)
            states.append(state)
        return e, states

    def attend(self, index: int, e: Tensor, tile: Tile) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor]:
        """(9)-(11) and the mix of (12): gate (R, S), the two dropout scales, w (R S, D)."""
        layer, width = self.layers[index].layer, e.shape[-1]
        if index == 0 and not self.packed:
            # e0 is a product, so both logits of the whole tile are two small matrix products.
            u_rows, u_columns = self.base[tile.rows], self.base[tile.columns]
            delta = (u_rows * layer.key_query[tile.rows]) @ u_columns.T
            delta = delta - u_rows @ (u_columns * layer.key_query[tile.columns]).T
        else:
            delta = torch.matmul(e, layer.key_query[tile.rows, :, None])[..., 0]
            delta = delta - torch.matmul(e.transpose(0, 1), layer.key_query[tile.columns, :, None])[..., 0].T
        delta = delta + (layer.key_bias[tile.rows, None] - layer.key_bias[None, tile.columns])
        gate = torch.sigmoid(delta / math.sqrt(width))
        scale_row, scale_column = self.scales(index, tile)
        w = e + (gate * scale_row)[..., None] * layer.value[tile.rows, None]
        w += ((1 - gate) * scale_column)[..., None] * layer.value[None, tile.columns]
        return gate, scale_row, scale_column, w.flatten(0, 1)

    def scales(self, index: int, tile: Tile) -> tuple[Tensor | float, Tensor | float]:
        """Dropout scales of a tile's two weights; (1, 1) without dropout."""
        if self.dropout is None or self.dropout.p == 0:
            return 1.0, 1.0
        identity = self.dropout.identity
        layer = self.dropout.first_layer + index
        row, column = dropout_scales(
            self.dropout.seed, layer, self.dropout.p, identity[tile.rows], identity[tile.columns]
        )
        return row.to(self.dtype), column.to(self.dtype)

    def forward_layer(self, index: int, e: Tensor, tile: Tile) -> tuple[Tensor, LayerState]:
        """One edge layer on a tile."""
        prepared, width = self.layers[index], e.shape[-1]
        layer = prepared.layer
        gate, scale_row, scale_column, w = self.attend(index, e, tile)
        x = aten.native_layer_norm(aten.gelu(w), [width], layer.ln_weight, layer.ln_bias, EPS)[0]
        h0 = self.workspace.take(f"h0 of layer {index}", x.shape[0], 4 * width)
        torch.addmm(layer.ff1_bias, x, layer.ff1_weight.T, out=h0)
        hidden, mean, rstd = _hidden(self.workspace, h0)
        w2 = torch.mm(hidden, prepared.folded.T).addr_(mean[:, 0], prepared.row_sums, alpha=-1)
        w2.mul_(rstd).add_(prepared.shift).add_(x)
        out = aten.native_layer_norm(aten.gelu(w2), [width], layer.ln_weight, layer.ln_bias, EPS)[0]
        return out.view(*tile.shape, width), LayerState(e, gate, scale_row, scale_column, w, h0, w2)

    def restored_state(self, index: int, e: Tensor, tile: Tile, h0: Tensor, w2: Tensor) -> LayerState:
        """The state of a layer from its input and the two stashed tensors, without a matrix product over pairs."""
        gate, scale_row, scale_column, w = self.attend(index, e, tile)
        return LayerState(e, gate, scale_row, scale_column, w, h0, w2)


def _prepare(layer: EdgeLayer) -> _Prepared:
    folded = layer.ff2_weight * layer.ffln_weight
    return _Prepared(layer, folded, folded.sum(1), torch.addmv(layer.ff2_bias, layer.ff2_weight, layer.ffln_bias))


def _hidden(workspace: Workspace, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu of the hidden rows (P, 4D), and the mean and reciprocal deviation of each (P, 1).

    A variance from sums of squares is safe here: the mean of a gelu is of the size of its deviation.
    """
    hidden = workspace.take("hidden", *h0.shape)
    aten.gelu.out(h0, out=hidden)
    mean = hidden.mean(1, keepdim=True)
    square = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).square_().div_(h0.shape[1])
    return hidden, mean, torch.rsqrt((square - mean.square()).clamp_(min=0) + EPS)


class FieldGradients:
    """Accumulates the gradients of a field over tiles, in the order of the tiles.

    Args:
        field: the field. need_base: whether the gradient of the base is wanted. need_chain: of the chain.
    """

    def __init__(self, field: PairField, *, need_base: bool, need_chain: bool) -> None:
        self.field, self.need_base, self.need_chain = field, need_base, need_chain
        self.base = torch.zeros_like(field.base) if need_base else None
        self.sums = [_LayerSums(prepared) for prepared in field.layers]

    @property
    def wanted(self) -> bool:
        """Whether any gradient of the field is wanted at all."""
        return self.need_base or (self.need_chain and bool(self.sums))

    def add(self, tile: Tile, grad: Tensor, states: list[LayerState]) -> None:
        """Backpropagate the gradient (R, S, D) of a tile of edges."""
        for index in reversed(range(len(states))):
            need_input = index > 0 or self.need_base
            grad = backward_layer(self.field, index, states[index], tile, grad, self.sums[index], need_input)
        if self.base is None:
            return
        if self.field.packed:
            add_tile(self.base, self.field.n, tile, grad)
            return
        nodes = self.field.base
        self.base[tile.rows] += (grad * nodes[None, tile.columns]).sum(1)
        # Every evaluation depends on both of its endpoints, mirrored or not.
        self.base[tile.columns] += (grad * nodes[tile.rows, None]).sum(0)

    def chain(self) -> list[Tensor]:
        """Gradients of the chain, in its order."""
        pairs = zip(self.sums, self.field.layers, strict=True)
        return [grad for sums, prepared in pairs for grad in sums.unfold(prepared)]


class _LayerSums:
    """Sums over pairs from which the gradients of one edge layer follow."""

    def __init__(self, prepared: _Prepared) -> None:
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

    def unfold(self, prepared: _Prepared) -> EdgeLayer:
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


def backward_layer(
    field: PairField, index: int, state: LayerState, tile: Tile, grad: Tensor, sums: _LayerSums, need_input: bool
) -> Tensor | None:
    """Gradient of one edge layer on a tile: adds to ``sums``, returns the gradient of the layer's input (R, S, D)."""
    prepared, width = field.layers[index], grad.shape[-1]
    layer = prepared.layer
    r, s = tile.shape

    # (13): the second A, the two maps and the hidden norm between them.
    activated = aten.gelu(state.w2)
    stats = aten.native_layer_norm(activated, [width], None, None, EPS)[1:]
    grad_w2 = _backward_activation_norm(grad.reshape(r * s, width), state.w2, activated, stats, layer, sums)
    activated = aten.gelu(state.w)
    x, *stats = aten.native_layer_norm(activated, [width], layer.ln_weight, layer.ln_bias, EPS)
    grad_h0 = _backward_hidden(field.workspace, prepared, state, grad_w2, x, sums)
    sums.ff1_weight.addmm_(grad_h0.T, x)
    sums.ff1_bias += grad_h0.sum(0)
    grad_x = torch.addmm(grad_w2, grad_h0, layer.ff1_weight)

    # (12): the first A and the mix of the two values.
    grad_w = _backward_activation_norm(grad_x, state.w, activated, stats, layer, sums).view(r, s, width)
    weight_row, weight_column = state.gate * state.scale_row, (1 - state.gate) * state.scale_column
    value_rows, value_columns = layer.value[tile.rows], layer.value[tile.columns]
    sums.value[tile.rows] += torch.bmm(weight_row[:, None, :], grad_w)[:, 0]
    sums.value[tile.columns] += (weight_column[..., None] * grad_w).sum(0)
    along_row = torch.bmm(grad_w, value_rows[:, :, None])[..., 0]
    along_column = (grad_w * value_columns[None]).sum(-1)

    # (10): a two-way softmax is a sigmoid of the difference of logits.
    slope = state.gate * (1 - state.gate) / math.sqrt(width)
    kappa = slope * (state.scale_row * along_row - state.scale_column * along_column)
    sums.key_query[tile.rows] += torch.bmm(kappa[:, None, :], state.e)[:, 0]
    sums.key_query[tile.columns] -= (kappa[..., None] * state.e).sum(0)
    sums.key_bias[tile.rows] += kappa.sum(1)
    sums.key_bias[tile.columns] -= kappa.sum(0)
    if not need_input:
        return None
    grad_w += kappa[..., None] * layer.key_query[tile.rows, None]
    grad_w -= kappa[..., None] * layer.key_query[None, tile.columns]
    return grad_w


def _backward_hidden(
    workspace: Workspace, prepared: _Prepared, state: LayerState, grad: Tensor, x: Tensor, sums: _LayerSums
) -> Tensor:
    """Gradient of h0 (P, 4D) from that of w2 (P, D), through the second map, the hidden norm and the gelu.

    The two row means that the norm's backward needs follow from vectors of width D, before the product.
    """
    hidden, mean, rstd = _hidden(workspace, state.h0)
    scaled = grad * rstd
    sums.folded.addmm_(scaled.T, hidden)
    sums.folded_mean.addmv_(scaled.T, mean[:, 0])
    sums.shift += grad.sum(0)
    mean_grad = torch.mv(grad, prepared.row_sums)[:, None] / hidden.shape[1]
    mapped = (state.w2 - x).sub_(prepared.shift)
    mean_product = mapped.mul_(grad).sum(1, keepdim=True) / hidden.shape[1]
    slope = rstd.square() * mean_product
    out = torch.mm(scaled, prepared.folded, out=workspace.take("grad_h0", *hidden.shape))
    out.addcmul_(hidden, slope, value=-1).add_(slope * mean - rstd * mean_grad)
    return aten.gelu_backward.grad_input(out, state.h0, grad_input=out)


def _backward_activation_norm(
    grad: Tensor, x: Tensor, activated: Tensor, stats: Sequence[Tensor], layer: EdgeLayer, sums: _LayerSums
) -> Tensor:
    """Gradient of A(x) = LN(gelu(x)) from gelu(x) and the mean and rstd of its rows."""
    grad_activated, grad_weight, grad_bias = aten.native_layer_norm_backward(
        grad, activated, [x.shape[-1]], *stats, layer.ln_weight, layer.ln_bias, [True, True, True]
    )
    sums.ln_weight += grad_weight
    sums.ln_bias += grad_bias
    return aten.gelu_backward(grad_activated, x)


def with_smaller_tiles(run: Callable[[int], T], pairs_per_tile: int) -> T:
    """Run with a tile size; an allocation failure is answered once with half of it."""
    try:
        return run(pairs_per_tile)
    except (MemoryError, torch.OutOfMemoryError) as error:
        failure: BaseException = error
    except RuntimeError as error:
        # The CPU allocator of torch has no exception type of its own.
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        failure = error
    if pairs_per_tile <= 1:
        raise failure
    return run(pairs_per_tile // 2)
