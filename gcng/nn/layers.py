"""The two layers of the graph: what has parameters in (3)-(13)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcng.nn.field import EdgeField
from gcng.ops.attention import negative_attention


def activation_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``A(x) = LN(gelu(x))``: gelu first."""
    return norm(F.gelu(x))


class NodeLayer(nn.Module):
    """(4)-(8): attention over negatives, messages of the edges, feed-forward; one norm, used three times."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.edge_to_node = nn.Linear(width, width)
        self.ff1, self.ff2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, f: Tensor, edges: EdgeField, class_index: Tensor) -> Tensor:
        """f (N, D), the edge field below, class of each node (N,) -> (N, D)."""
        heads = (f.shape[0], self.num_heads, f.shape[1] // self.num_heads)
        q, k, v = (linear(f).view(heads) for linear in (self.query, self.key, self.value))
        attended = negative_attention(q, k, v, class_index).flatten(1)
        f = activation_norm(f + self.output(attended.to(f.dtype)), self.norm)
        f = activation_norm(f + edges.messages(self.edge_to_node).to(f.dtype), self.norm)
        return activation_norm(f + self.ff2(F.gelu(self.ff1(f))), self.norm)


class EdgeLayer(nn.Module):
    """(9)-(13): parameters of the edge update; the pairs themselves are the field's business."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.node_to_edge = nn.Linear(width, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.ff1, self.ff2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ff_norm = nn.LayerNorm(4 * width)
        self.norm = nn.LayerNorm(width)

    def chain(self, f: Tensor) -> list[Tensor]:
        """Node tensors and weights of this layer, as the field's ops take them; the query folded into the nodes."""
        g = F.gelu(self.node_to_edge(f))
        key, value = self.key(g), self.value(g)
        return [
            torch.matmul(key, self.query.weight),
            torch.mv(key, self.query.bias.to(key.dtype)),
            value,
            self.ff1.weight,
            self.ff1.bias,
            self.ff_norm.weight,
            self.ff_norm.bias,
            self.ff2.weight,
            self.ff2.bias,
            self.norm.weight,
            self.norm.bias,
        ]
