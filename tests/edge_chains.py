"""Inputs of the pair ops: nodes, unfolded edge layers for the reference, and the same layers folded for the ops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gcng import reference
from gcng.ops.layout import ClassMajor, class_major


@dataclass
class EdgeCase:
    """A class-major batch, L edge layers with their nodes, and the leaves that gradients are taken of."""

    z: Tensor  # (N, D)
    layout: ClassMajor
    nodes: list[Tensor]  # L tensors (N, D)
    layers: list[dict[str, Tensor]]
    seed: Tensor
    p: float

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that requires a gradient."""
        return [self.z, *self.nodes, *(x for layer in self.layers for x in layer.values())]

    def dense(self) -> Tensor:
        """Edges (N, N, D) by the definition."""
        e, identity = reference.initial_edges(reference.center_normalize(self.z)), self.layout.identity
        for index, (f, layer) in enumerate(zip(self.nodes, self.layers, strict=True)):
            scales = torch.stack(reference.dropout_scales(self.seed, index, self.p, identity, identity), -1)
            e = reference.edges(e, f, layer, scales.to(e.dtype))
        return e

    def field(self) -> tuple:
        """The arguments by which ops take a field: base, packed, chain, identity, seed, p, first_layer."""
        chain = [x for f, layer in zip(self.nodes, self.layers, strict=True) for x in fold(f, layer)]
        return reference.center_normalize(self.z), False, chain, self.layout.identity, self.seed, self.p, 0


def fold(f: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
    """The chain entry of one layer: query folded into the nodes (identity I2)."""
    g = F.gelu(F.linear(f, p["n2e.w"], p["n2e.b"]))
    key, value = F.linear(g, p["k.w"], p["k.b"]), F.linear(g, p["v.w"], p["v.b"])
    names = ("ff1.w", "ff1.b", "ffln.w", "ffln.b", "ff2.w", "ff2.b", "ln.w", "ln.b")
    return [key @ p["q.w"], key @ p["q.b"], value, *(p[name] for name in names)]


def make_layer(width: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Random parameters of one edge layer, none of them at a special value."""
    maps = {"q": (width, width), "k": (width, width), "v": (width, width), "n2e": (width, width)}
    maps |= {"ff1": (4 * width, width), "ff2": (width, 4 * width)}
    p: dict[str, Tensor] = {}
    for name, (rows, columns) in maps.items():
        p[f"{name}.w"] = torch.randn(rows, columns, generator=generator, dtype=dtype) / math.sqrt(columns)
        p[f"{name}.b"] = 0.3 * torch.randn(rows, generator=generator, dtype=dtype)
    for name, size in (("ffln", 4 * width), ("ln", width)):
        p[f"{name}.w"] = 1 + 0.3 * torch.randn(size, generator=generator, dtype=dtype)
        p[f"{name}.b"] = 0.3 * torch.randn(size, generator=generator, dtype=dtype)
    return {name: x.requires_grad_() for name, x in p.items()}


def make_edge_case(
    labels: list[int], width: int = 8, num_layers: int = 1, p: float = 0.0, dtype: torch.dtype = torch.float64
) -> EdgeCase:
    """A case from a fixed seed."""
    generator = torch.Generator().manual_seed(len(labels) * 1000 + width * 10 + num_layers)
    layout = class_major(torch.tensor(labels))
    n = len(labels)

    def draw() -> Tensor:
        return torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()

    layers = [make_layer(width, dtype, generator) for _ in range(num_layers)]
    return EdgeCase(draw(), layout, [draw() for _ in layers], layers, torch.tensor(-7_777_777_777_777), p)


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, zeros where there is none."""
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def worst_error(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference relative to the largest entry of each array; arrays below 1e-6 are compared absolutely."""
    pairs = zip(ours, truth, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs if b.numel())
