"""Definition of the whole graph (1)-(14): dense, every ordered pair, every layer kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gcng.reference.attention import negative_attention
from gcng.reference.correlation import center_normalize, initial_edges
from gcng.reference.edges import activation_norm, edges
from gcng.reference.gates import batch_norm
from gcng.reference.messages import messages


class DenseGraph(NamedTuple):
    """Every intermediate of the dense graph."""

    u: Tensor  # (N, D) centered unit nodes (1)
    edges: list[Tensor]  # L + 1 tensors (N, N, D): e0 .. eL
    nodes: list[Tensor]  # L + 1 tensors (N, D): f0 .. fL
    edge_mean: Tensor  # (D,)
    edge_var: Tensor  # (D,)
    node_mean: Tensor  # (D,)
    node_var: Tensor  # (D,)
    gate: Tensor  # (N, N, D)
    node_logits: Tensor  # (N, C)


def select(p: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters under ``prefix.``, with the prefix taken off."""
    return {name[len(prefix) + 1 :]: x for name, x in p.items() if name.startswith(prefix + ".")}


def linear(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    """The linear map ``name`` of ``p``."""
    return F.linear(x, p[f"{name}.w"], p[f"{name}.b"])


def node_layer(f: Tensor, e: Tensor, labels: Tensor, p: Mapping[str, Tensor], num_heads: int) -> Tensor:
    """(4)-(8): attention over negatives, messages of the edges, feed-forward; one norm used three times."""
    heads = (f.shape[0], num_heads, f.shape[1] // num_heads)
    q, k, v = (linear(f, p, name).reshape(heads) for name in "qkv")
    attended = negative_attention(q, k, v, labels).reshape(f.shape)
    f = activation_norm(f + linear(attended, p, "o"), p["ln.w"], p["ln.b"])
    f = activation_norm(f + messages(e, p["e2n.w"], p["e2n.b"]), p["ln.w"], p["ln.b"])
    return activation_norm(f + linear(F.gelu(linear(f, p, "ff1")), p, "ff2"), p["ln.w"], p["ln.b"])


def graph(
    z: Tensor,
    labels: Tensor,
    p: Mapping[str, Tensor],
    *,
    num_layers: int = 1,
    num_heads: int = 2,
    scales: Tensor | None = None,
    initial: Tensor | None = None,
) -> DenseGraph:
    """The graph of docs/maths.md 1-4 by its formulas.

    Args:
        z: (N, D) embeddings. labels: (N,). p: parameters by the names of docs/maths.md and tests/golden/README.md.
        scales: (L, N, N, 2) dropout scales of (11), per ORDERED pair, or None.
        initial: (N, N, D) in place of e0 (2), to take derivatives with respect to it.
    """
    u = center_normalize(z)
    e_all, f_all = [initial_edges(u) if initial is None else initial], [linear(z, p, "inp")]
    for layer in range(num_layers):
        f_all.append(node_layer(f_all[-1], e_all[-1], labels, select(p, f"node{layer}"), num_heads))
        dropped = None if scales is None else scales[layer]
        e_all.append(edges(e_all[-1], f_all[-1], select(p, f"edge{layer}"), dropped))
    edge_hat, edge_mean, edge_var = batch_norm(e_all[-1], p["bn_edge.w"])
    node_hat, node_mean, node_var = batch_norm(f_all[-1], p["bn_node.w"])
    gate = torch.sigmoid(linear(edge_hat, p, "gate"))
    logits = linear(node_hat, p, "ncls")
    return DenseGraph(u, e_all, f_all, edge_mean, edge_var, node_mean, node_var, gate, logits)
