"""Definition of (1)-(2): centered unit nodes and the edge feature of a pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcng.reference.norms import row_norm
from gcng.reference.retrieval import first_k


def center_normalize(x: Tensor) -> Tensor:
    """(1): rows centered over channels and scaled to unit length, (N, D) -> (N, D); constant rows give 0."""
    centered = x - x.mean(-1, keepdim=True)
    floor = 8 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]) * x.detach().abs().amax(-1, keepdim=True)
    constant = row_norm(centered.detach(), keepdim=True) <= floor
    # The inner where keeps the norm away from 0, whose gradient is not defined.
    norm = row_norm(torch.where(constant, torch.ones_like(centered), centered), keepdim=True)
    return torch.where(constant, torch.zeros_like(centered), centered / norm)


def initial_edges(u: Tensor) -> Tensor:
    """(2): elementwise products of all ordered pairs, (N, D) -> (N, N, D)."""
    return u[:, None, :] * u[None, :, :]


def correlation_topk(
    x: Tensor,
    k: int,
    *,
    labels: Tensor | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest correlations of every row, without itself (no ``ref``) and its class (``labels``)."""
    others, other_labels = (x, labels) if ref is None else (ref, ref_labels)
    correlation = (center_normalize(x) @ center_normalize(others).T).detach()
    left_out = torch.zeros_like(correlation, dtype=torch.bool)
    if ref is None:
        left_out.fill_diagonal_(True)
    if labels is not None:
        left_out |= labels[:, None] == other_labels[None, :]
    return first_k(correlation.masked_fill(left_out, -math.inf), k)
