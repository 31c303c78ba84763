"""Definition of (1)-(2): centered unit nodes and the edge feature of a pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def center_normalize(x: Tensor) -> Tensor:
    """(1): rows centered over channels and scaled to unit length, (N, D) -> (N, D); constant rows give 0."""
    centered = x - x.mean(-1, keepdim=True)
    squared = (centered * centered).sum(-1, keepdim=True)
    floor = 8 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]) * x.detach().abs().amax(-1, keepdim=True)
    constant = squared.detach().sqrt() <= floor
    # The inner where keeps the square root away from 0, whose gradient is infinite.
    norm = torch.where(constant, torch.ones_like(squared), squared).sqrt()
    return torch.where(constant, torch.zeros_like(centered), centered / norm)


def initial_edges(u: Tensor) -> Tensor:
    """(2): elementwise products of all ordered pairs, (N, D) -> (N, N, D)."""
    return u[:, None, :] * u[None, :, :]
