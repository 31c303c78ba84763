"""Definition of (9)-(13): the edge layer, with explicit query, key and value maps on every ordered pair."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def activation_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``A(x) = LN(gelu(x))`` over the last axis: gelu first, eps 1e-5."""
    return F.layer_norm(F.gelu(x), (x.shape[-1],), weight, bias, 1e-5)


def edges(e: Tensor, f: Tensor, p: Mapping[str, Tensor], scales: Tensor | None = None) -> Tensor:
    """One edge layer (9)-(13) on all ordered pairs.

    Args:
        e: (N, N, D) edges, row endpoint first. f: (N, D) nodes after the node layer.
        p: parameters ``q, k, v, n2e, ff1, ff2, ffln, ln`` with ``.w`` and ``.b`` as docs/maths.md names them.
        scales: (N, N, 2) dropout scales of (11), 0 or 1 / (1 - p), index 0 the row endpoint; None without dropout.

    Returns:
        (N, N, D).
    """
    width = e.shape[-1]
    g = F.gelu(F.linear(f, p["n2e.w"], p["n2e.b"]))
    key, value = F.linear(g, p["k.w"], p["k.b"]), F.linear(g, p["v.w"], p["v.b"])
    query = F.linear(e, p["q.w"], p["q.b"])
    logits = torch.stack([(query * key[:, None]).sum(-1), (query * key[None]).sum(-1)], -1) / math.sqrt(width)
    weights = logits.softmax(-1)
    if scales is not None:
        weights = weights * scales
    mixed = weights[..., :1] * value[:, None] + weights[..., 1:] * value[None]
    x = activation_norm(mixed + e, p["ln.w"], p["ln.b"])
    hidden = F.gelu(F.linear(x, p["ff1.w"], p["ff1.b"]))
    hidden = F.layer_norm(hidden, (hidden.shape[-1],), p["ffln.w"], p["ffln.b"], 1e-5)
    return activation_norm(x + F.linear(hidden, p["ff2.w"], p["ff2.b"]), p["ln.w"], p["ln.b"])
