"""The edges of a batch as an object: lazy, or in packed storage, by the memory plan.

Everything that is known about all pairs is asked of this object. ``EdgeField`` answers through the ops,
``DenseEdges`` through the dense definition (``gcng.reference_mode()``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcng import reference
from gcng.memory import MemoryPlan
from gcng.ops.edges import edges
from gcng.ops.gates import EPS, edge_moments
from gcng.ops.generator import generator_synthesis
from gcng.ops.layout import ClassMajor
from gcng.ops.messages import messages
from gcng.ops.n_pair import n_pair_synthesis
from gcng.ops.pair_field import CHAIN_WIDTH


@dataclass(frozen=True)
class GateParameters:
    """The head (14): the gain of the batch norm over edges and the gate map."""

    norm_weight: Tensor  # (D,)
    weight: Tensor  # (D, D)
    bias: Tensor  # (D,)


@dataclass(frozen=True)
class DropoutState:
    """Dropout of a phase: its 64-bit seed (0-dim int64) and probability; 0 outside training."""

    seed: Tensor
    p: float


@dataclass(frozen=True)
class EdgeField:
    """Edges of a class-major batch after some layers: a function of ``base`` and ``chain``."""

    base: Tensor  # (N, D) centered unit nodes, or (P, D) packed edges
    packed: bool
    chain: tuple[Tensor, ...]
    first_layer: int
    layout: ClassMajor
    dropout: DropoutState
    plan: MemoryPlan

    @property
    def _field(self) -> tuple:
        drop = self.dropout
        chain = list(self.chain)
        return self.base, self.packed, chain, self.layout.identity, drop.seed, drop.p, self.first_layer

    def messages(self, linear: nn.Linear) -> Tensor:
        """(7), the sum over partners, (N, D)."""
        stash = self.plan.stash_small and torch.is_grad_enabled()
        return messages(*self._field, linear.weight, linear.bias, self.plan.pairs_per_tile, stash)[0]

    def extend(self, chain: list[Tensor]) -> EdgeField:
        """The field one layer up; still lazy."""
        return replace(self, chain=self.chain + tuple(chain))

    def materialize(self) -> EdgeField:
        """The same field in packed storage if the plan keeps edges, else as it is."""
        if not self.plan.stash_edges or not self.chain:
            return self
        stash = self.plan.stash_hidden and torch.is_grad_enabled() and len(self.chain) == CHAIN_WIDTH
        packed, _, _ = edges(*self._field, self.plan.pairs_per_tile, stash)
        layers = self.first_layer + len(self.chain) // CHAIN_WIDTH
        return replace(self, base=packed, packed=True, chain=(), first_layer=layers)

    def detach(self) -> EdgeField:
        """The same edges as constants."""
        return replace(self, base=self.base.detach(), chain=tuple(x.detach() for x in self.chain))

    def n_pair(self, z: Tensor, head: GateParameters, kappa: Tensor, mix: Tensor, l2_reg: float) -> Tensor:
        """(20), not yet weighted by 1 - gamma; the gates are constants, ``z`` (N, D) is differentiated."""
        with torch.no_grad():
            field = self.detach().materialize()
        constants = [x.detach() for x in (head.norm_weight, head.weight, head.bias)]
        return n_pair_synthesis(
            z, kappa, mix, self.layout.class_start, *field._field, *constants, l2_reg, self.plan.pairs_per_tile,
            self.plan.stash_small,
        )[0]  # fmt: skip

    def generator(
        self,
        z: Tensor,
        head: GateParameters,
        kappa: Tensor,
        mix: Tensor,
        dropped_class: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(24) without its factor, (25), (26); ``z`` is a constant."""
        field = self.materialize()
        return generator_synthesis(
            z, kappa, mix, self.layout.class_start, *field._field, head.norm_weight, head.weight, head.bias,
            self.layout.labels, dropped_class, weight, bias, self.plan.pairs_per_tile, self.plan.stash_small,
        )[:3]  # fmt: skip

    def gates(self, head: GateParameters, i: Tensor, j: Tensor) -> Tensor:
        """(14) for pairs of class-major slots, (len(i), D); differentiable, O(len(i) D) beside the statistics."""
        mean, var = edge_moments(*self._field, self.plan.pairs_per_tile)
        e = self.edges(i, j)
        normalized = ((e - mean) * torch.rsqrt(var + EPS)).to(head.norm_weight.dtype) * head.norm_weight
        return torch.sigmoid(F.linear(normalized, head.weight, head.bias))

    def edges(self, i: Tensor, j: Tensor) -> Tensor:
        """Edges of pairs of class-major slots, (len(i), D), by plain torch."""
        n = self.layout.order.shape[0]
        if self.packed:
            low, high = torch.minimum(i, j), torch.maximum(i, j)
            e = self.base[low * n - low * (low - 1) // 2 + high - low]
        else:
            e = self.base[i] * self.base[j]
        for start in range(0, len(self.chain), CHAIN_WIDTH):
            layer = self.first_layer + start // CHAIN_WIDTH
            e = self._one_layer(e, i, j, self.chain[start : start + CHAIN_WIDTH], layer)
        return e

    def _one_layer(self, e: Tensor, i: Tensor, j: Tensor, chain: tuple[Tensor, ...], layer: int) -> Tensor:
        key, key_bias, value, ff1_w, ff1_b, ffln_w, ffln_b, ff2_w, ff2_b, ln_w, ln_b = chain
        width = e.shape[-1]
        delta = (e * (key[i] - key[j])).sum(-1) + key_bias[i] - key_bias[j]
        gate = torch.sigmoid(delta / width**0.5)
        row, column = gate, 1 - gate
        if self.dropout.p:
            identity, seed = self.layout.identity, self.dropout.seed
            scale_row, scale_column = reference.dropout_pairs(seed, layer, self.dropout.p, identity[i], identity[j])
            row, column = row * scale_row.to(row), column * scale_column.to(row)
        x = reference.activation_norm(e + row[:, None] * value[i] + column[:, None] * value[j], ln_w, ln_b)
        hidden = F.layer_norm(F.gelu(F.linear(x, ff1_w, ff1_b)), (4 * width,), ffln_w, ffln_b, EPS)
        return reference.activation_norm(x + F.linear(hidden, ff2_w, ff2_b), ln_w, ln_b)


@dataclass(frozen=True)
class DenseEdges:
    """The dense definition behind the same questions; class-major order as well."""

    gate: Tensor  # (N, N, D)
    layout: ClassMajor

    def n_pair(self, z: Tensor, head: GateParameters, kappa: Tensor, mix: Tensor, l2_reg: float) -> Tensor:
        """As :meth:`EdgeField.n_pair`."""
        labels = self.layout.labels
        syn = reference.synthesize_negatives(z, labels, self.gate.detach(), kappa=kappa.to(z), mix=mix.to(z))
        return reference.losses.synthetic_n_pair(z, labels, syn, l2_reg=l2_reg)

    def generator(
        self,
        z: Tensor,
        head: GateParameters,
        kappa: Tensor,
        mix: Tensor,
        dropped_class: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`EdgeField.generator`."""
        labels = self.layout.labels
        syn = reference.synthesize_negatives(z, labels, self.gate, kappa=kappa.to(z), mix=mix.to(z))
        official = not torch.equal(dropped_class, self.layout.class_index)
        return (
            reference.losses.class_cross_entropy(labels, syn, weight, bias, softmax_factor=1.0),
            reference.losses.similarity(z, labels, syn, official_mask=official),
            reference.losses.diversity(self.gate),
        )

    def gates(self, head: GateParameters, i: Tensor, j: Tensor) -> Tensor:
        """As :meth:`EdgeField.gates`."""
        return self.gate[i, j]
