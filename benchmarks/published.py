"""The published formulation of GCA-HNG as a benchmark provider: what the paper's code computes, at its cost.

Written from the formulas of the paper (numbers in parentheses as in the documentation of gcng). It is not a
path of gcng and nothing in gcng uses it. What makes it the published formulation and not the dense reference:

* every ORDERED pair is an edge, self pairs included: edges are (N, N, D);
* the edge attention maps the edge (query) and BOTH endpoints of every ordered pair (key and value of an
  (N, N, 2, D) tensor of broadcast nodes): with the map of (7) and the edge MLP, 14 D^2 multiply-adds per
  ordered pair and layer, plus D^2 for the gate;
* autograd keeps every intermediate, and batch normalization is `nn.BatchNorm1d` over the N^2 edges;
* synthetic negatives are dense (K, M, K, M, D) tensors;
* the structure of the batch is positional: slot n = k M + i is sample k of class i;
* the terms of the metric phase hold the gates of their graph. The metric loss treats them as constants, so
  its backward never reaches the last edge layer, and that graph stays alive until the terms are dropped.

Its proof is `tests/golden`: losses and gradients of both phases in float64 (`tests/test_benchmarks.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

_DISTANCE_EPS = 1e-6  # (15): added to every channel of a difference before its norm


@dataclass(frozen=True)
class LossConstants:
    """Constants of (16), (19)-(27); the defaults are those of `gcng.losses.GCAHNGLoss`."""

    alpha: float = 5.0
    beta: float = 20.0
    softmax_factor: float = 20.0
    similarity_weight: float = 20.0
    diversity_weight: float = 60.0
    l2_reg: float = 3e-3
    official_sim_mask: bool = False


class NodeLayer(nn.Module):
    """Formulas (4)-(8): attention over the negatives, messages of all edges, feed-forward."""

    def __init__(self, embedding_size: int, num_heads: int):
        super().__init__()
        D = embedding_size
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o, self.e2n = (nn.Linear(D, D) for _ in range(5))
        self.ff1, self.ff2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.ln = nn.LayerNorm(D)

    def forward(
        self,
        f: Tensor,  # (N, D)
        e: Tensor,  # (N, N, D)
        differs: Tensor,  # (N, N) bool, true where the classes differ
    ) -> Tensor:  # (N, D)
        N, D = f.shape
        maps = (self.q, self.k, self.v)
        q, k, v = (linear(f).view(N, self.num_heads, -1).transpose(0, 1) for linear in maps)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])  # (H, receiver, sender)
        scores = scores.masked_fill(~differs, -math.inf)
        extra = scores.new_zeros(scores.shape[0], N, 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(dim=-1)[..., :N]
        attended = (weights @ v).transpose(0, 1).reshape(N, D)
        f = self.ln(nnf.gelu(f + self.o(attended)))
        f = self.ln(nnf.gelu(f + nnf.gelu(self.e2n(e)).sum(dim=1)))
        return self.ln(nnf.gelu(f + self.ff2(nnf.gelu(self.ff1(f)))))


class EdgeLayer(nn.Module):
    """Formulas (9)-(13) with query, key and value maps on every ordered pair."""

    def __init__(self, embedding_size: int, dropout: float):
        super().__init__()
        D = embedding_size
        self.dropout = dropout
        self.q, self.k, self.v, self.n2e = (nn.Linear(D, D) for _ in range(4))
        self.ff1, self.ff2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.ffln, self.ln = nn.LayerNorm(4 * D), nn.LayerNorm(D)

    def forward(
        self,
        f: Tensor,  # (N, D)
        e: Tensor,  # (N, N, D)
    ) -> Tensor:  # (N, N, D)
        N, D = f.shape
        g = nnf.gelu(self.n2e(f))
        endpoints = torch.stack((g[:, None].expand(N, N, D), g[None].expand(N, N, D)), dim=2)
        query, key, value = self.q(e), self.k(endpoints), self.v(endpoints)
        scores = (key @ query.unsqueeze(-1)).squeeze(-1) / math.sqrt(D)  # (N, N, 2)
        weights = nnf.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        mixed = (weights.unsqueeze(-2) @ value).squeeze(-2)
        e = self.ln(nnf.gelu(mixed + e))
        return self.ln(nnf.gelu(e + self.ff2(self.ffln(nnf.gelu(self.ff1(e))))))


class PublishedLoss(nn.Module):
    """GCA-HNG as published, with the calls of `gcng.losses.GCAHNGLoss` that a benchmark needs.

    Args:
        embedding_size: D. num_classes: C of the training set. num_layers: L. num_heads: H.
        dropout: probability of (11); masks are drawn per ordered pair.
        constants: factors of the losses.

    Memory: dense; `docs/benchmarks.md` has the measured peaks.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        num_layers: int = 1,
        num_heads: int = 2,
        *,
        dropout: float = 0.1,
        constants: LossConstants | None = None,
    ):
        super().__init__()
        D = embedding_size
        self.num_layers, self.constants = num_layers, constants or LossConstants()
        self.j_avg = self.j_gen = 1e6
        self.inp = nn.Linear(D, D)
        for layer in range(num_layers):
            setattr(self, f"node{layer}", NodeLayer(D, num_heads))
            setattr(self, f"edge{layer}", EdgeLayer(D, dropout))
        self.bn_edge, self.bn_node = nn.BatchNorm1d(D), nn.BatchNorm1d(D)
        self.bn_edge.bias.requires_grad_(False)
        self.bn_node.bias.requires_grad_(False)
        self.gate = nn.Linear(D, D)
        self.ncls, self.scls = nn.Linear(D, num_classes), nn.Linear(D, num_classes)

    def named_golden_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their names in `tests/golden` (`node0.q.w`, `bn_edge.w`, ...)."""
        trainable = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        return {name.replace(".weight", ".w").replace(".bias", ".b"): p for name, p in trainable}

    def load_golden(self, weights: dict[str, Tensor]) -> None:
        """Copies weights by golden names; a missing or an unknown name is a ValueError that lists them."""
        own = self.named_golden_parameters()
        if own.keys() != weights.keys():
            raise ValueError(
                f"PublishedLoss.load_golden: weights has unknown names {sorted(weights.keys() - own.keys())} "
                f"and lacks {sorted(own.keys() - weights.keys())}; "
                "pass exactly the names of named_golden_parameters()"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def build_graph(self, z: Tensor, labels: Tensor) -> SimpleNamespace:
        """Formulas (1)-(14) for z (N, D): nodes, edges, gate (N, N, D) and node_logits (N, C)."""
        N, D = z.shape
        M = _classes_in_batch(labels)
        classes = torch.arange(N, device=z.device) % M
        differs = classes[:, None] != classes[None]
        centered = z - z.mean(dim=1, keepdim=True)
        unit = centered / centered.norm(dim=1, keepdim=True)
        nodes, edges = [self.inp(z)], [unit[:, None] * unit[None]]
        for layer in range(self.num_layers):
            nodes.append(getattr(self, f"node{layer}")(nodes[-1], edges[-1], differs))
            edges.append(getattr(self, f"edge{layer}")(nodes[-1], edges[-1]))
        normalized = self.bn_edge(edges[-1].view(N * N, D))
        gate = torch.sigmoid(self.gate(normalized)).view(N, N, D)
        node_logits = self.ncls(self.bn_node(nodes[-1]))
        return SimpleNamespace(nodes=nodes, edges=edges, gate=gate, node_logits=node_logits)

    def synthesize(self, z: Tensor, gate: Tensor, mix: Tensor, num_batch_classes: int) -> Tensor:
        """Formulas (15)-(18): z (N, D), gate (N, N, D), mix (K, K-1) -> (K, M, M, D)."""
        M, D = num_batch_classes, z.shape[1]
        K = z.shape[0] // M
        groups = z.view(K, M, D)
        anchor, negative = groups[:, :, None, None], groups[None, None]
        positive = groups.roll(-1, dims=0)[:, :, None, None]
        to_positive = (anchor - positive + _DISTANCE_EPS).norm(dim=-1, keepdim=True)
        to_negative = (anchor - negative + _DISTANCE_EPS).norm(dim=-1, keepdim=True)  # (K, M, K, M, 1)
        kappa = math.exp(-self.constants.alpha / self.j_avg)
        reach = to_positive + (to_negative - to_positive) * kappa * gate.view(K, M, K, M, D)
        harder = anchor + (negative - anchor) * reach / to_negative
        hard = torch.where(to_positive >= to_negative, negative.expand_as(harder), harder)
        chain = hard[:, :, 0]
        for sample in range(1, K):
            share = mix[:, sample - 1].view(K, 1, 1, 1).to(z.dtype)
            chain = (1 - share) * hard[:, :, sample] + share * chain
        return chain

    def metric_terms(self, z: Tensor, labels: Tensor, *, mix: Tensor) -> SimpleNamespace:
        """Formulas (19)-(22): total (), its parts, and the graph that they came from."""
        graph, M = self.build_graph(z, labels), _classes_in_batch(labels)
        synthetic = self.synthesize(z, graph.gate.detach(), mix, M)
        n_pair = self._n_pair(z, labels, M)
        plain = self._synthetic_n_pair(z, synthetic, M)
        weighted = (1 - math.exp(-self.constants.beta / self.j_gen)) * plain
        node_ce = nnf.cross_entropy(graph.node_logits, labels.to(z.device))
        return SimpleNamespace(
            n_pair=n_pair,
            synthetic=weighted,
            node_ce=node_ce,
            total=n_pair + weighted + node_ce,
            graph=graph,
            negatives=synthetic,
        )

    def classifier_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        """Formula (23), z constant."""
        return 10 * nnf.cross_entropy(self.scls(z.detach()), labels.to(z.device))

    def generator_terms(self, z: Tensor, labels: Tensor, *, mix: Tensor) -> SimpleNamespace:
        """Formulas (24)-(27) on a graph of its own, z constant: total (), its parts, and the graph."""
        z, M, constants = z.detach(), _classes_in_batch(labels), self.constants
        graph = self.build_graph(z, labels)
        synthetic = self.synthesize(z, graph.gate, mix, M)
        rows = synthetic.reshape(-1, z.shape[1])
        targets = labels[:M].to(z.device).repeat(z.shape[0])
        class_ce = constants.softmax_factor * nnf.cross_entropy(self.scls(rows), targets)
        similarity = self._similarity(z, synthetic, M)
        spread = ((graph.gate - graph.gate.mean(dim=1, keepdim=True)) ** 2).sum() / z.shape[0] ** 2
        diversity = 0.01 * (1 - spread.sqrt())
        weighted = constants.similarity_weight * similarity + constants.diversity_weight * diversity
        return SimpleNamespace(
            class_ce=class_ce,
            similarity=similarity,
            diversity=diversity,
            total=0.5 * (class_ce + weighted),
            graph=graph,
            negatives=synthetic,
        )

    def _n_pair(self, z: Tensor, labels: Tensor, M: int) -> Tensor:
        """Formula (19)."""
        groups, group_labels = z.split(M), labels.split(M)
        losses = []
        for candidates, candidate_labels in zip(groups[1:], group_labels[1:], strict=True):
            same = (group_labels[0][:, None] == candidate_labels[None]).to(z)
            target = same / same.sum(dim=1, keepdim=True)
            losses.append(nnf.cross_entropy(groups[0] @ candidates.T, target))
        return torch.stack(losses).mean() + 0.25 * self.constants.l2_reg * z.square().sum() / M

    def _synthetic_n_pair(self, z: Tensor, synthetic: Tensor, M: int) -> Tensor:
        """Formula (20)."""
        groups = z.view(-1, M, z.shape[1])
        own = torch.eye(M, dtype=torch.bool, device=z.device)[None, :, :, None]
        positive = groups.roll(-1, dims=0)[:, :, None]
        candidates = torch.where(own, positive, synthetic)
        logits = (candidates @ groups[..., None]).squeeze(-1)  # (K, M, M)
        K = groups.shape[0]
        target = torch.arange(M, device=z.device).repeat(K)
        cross_entropy = nnf.cross_entropy(logits.reshape(K * M, M), target)
        squares = groups.square().sum() / M + candidates.square().sum() / M**2
        return cross_entropy + 0.25 * self.constants.l2_reg * squares / K

    def _similarity(self, z: Tensor, synthetic: Tensor, M: int) -> Tensor:
        """Formula (25); `official_sim_mask` leaves out column floor(n / K), not the own class n mod M."""
        N, K = z.shape[0], z.shape[0] // M
        cosine = nnf.cosine_similarity(z[:, None], synthetic.view(N, M, -1), dim=-1)
        slot = torch.arange(N, device=z.device)
        left_out = slot // K if self.constants.official_sim_mask else slot % M
        counted = torch.arange(M, device=z.device)[None] != left_out[:, None]
        return ((1 - cosine) * counted).sum() / (N * M)


def _classes_in_batch(labels: Tensor) -> int:
    """M of a batch in slot order; a batch in another order is a ValueError."""
    M = int(labels.unique().numel())
    if labels.numel() % M or not torch.equal(labels, labels[:M].repeat(labels.numel() // M)):
        raise ValueError(
            "PublishedLoss: labels must repeat the same M classes K times in the same order "
            "(slot k M + i is sample k of class i); sort the batch, "
            "or use gcng.losses.GCAHNGLoss, which takes any order"
        )
    return M
