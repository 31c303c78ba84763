"""Definition of (4)-(6): attention over the samples of other classes, with one extra zero logit."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def negative_attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """(4)-(6) before the output map, (N, H, h) x 3 and (N,) -> (N, H, h); a row without negatives gives 0.

    The query belongs to the receiver, key and value to the sender.
    """
    scores = torch.einsum("bnd,and->nba", q, k) / math.sqrt(q.shape[-1])  # (H, receiver, sender)
    same_class = labels[:, None] == labels[None, :]
    scores = scores.masked_fill(same_class, -math.inf)
    # The zero logit makes the weights sum to less than 1; softmax shifts by max(0, max s) on its own.
    with_zero = torch.cat([scores, scores.new_zeros(scores.shape[:2] + (1,))], dim=-1)
    weights = with_zero.softmax(-1)[..., :-1]
    return torch.einsum("nba,and->bnd", weights, v)
