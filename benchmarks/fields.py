"""The edge field of a batch, outside a loss: what the benchmarks of the pair ops build on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gcng.nn.field import DropoutState, EdgeField
from gcng.nn.graph import memory_plan
from gcng.ops.layout import class_major_beside


def edge_field(base: Tensor, labels: Tensor, *, packed: bool = False, num_layers: int = 1) -> EdgeField:
    """A field over unit nodes (N, D), or over packed edges (P, D), with the memory plan that a loss would make.

    Args:
        labels: (N,) in class-major order, so that slots are batch positions.
    """
    n = labels.shape[0]
    nodes = base if not packed else base.new_empty((n, base.shape[-1]))
    plan = memory_plan(nodes, num_layers, None)
    layout = class_major_beside("fields", labels, None, nodes.device)
    dropout = DropoutState(torch.zeros((), dtype=torch.int64), 0.0)
    # What is measured is the op that keeps its edges, whether or not a loss could afford to.
    return EdgeField(base, packed, (), 0, layout, dropout, replace(plan, stash_edges=True))


def class_major_labels(num_samples: int, samples_per_class: int) -> Tensor:
    """(N,) on the CPU, where no op has to wait for them."""
    return torch.arange(num_samples // samples_per_class).repeat_interleave(samples_per_class)


def upper_triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the packed pairs r <= c, (P,) each."""
    return tuple(torch.triu_indices(n, n, device=device))
