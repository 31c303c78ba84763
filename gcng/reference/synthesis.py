"""Definition of (15)-(18): channel-weighted synthetic negatives, one for every anchor and class."""

from __future__ import annotations

import torch
from torch import Tensor

from gcng.reference.layout import class_layout
from gcng.reference.norms import row_norm


def pulled_negatives(z: Tensor, labels: Tensor, gate: Tensor, kappa: float | Tensor) -> tuple[Tensor, Tensor]:
    """(15)-(17) for every ordered (anchor, negative).

    Returns:
        h (N, N, D), and the boolean (N, N) of negatives that are not farther than the positive and are kept.
    """
    layout = class_layout(labels)
    positive_distance = row_norm(z - z[layout.positive] + 1e-6)[:, None]
    difference = z[None, :, :] - z[:, None, :]
    negative_distance = row_norm(-difference + 1e-6)
    near = positive_distance >= negative_distance
    reach = positive_distance + (negative_distance - positive_distance) * kappa * gate.movedim(-1, 0)
    # Where the pulled one is not taken, its quotient is not either: at distance 1e-6 it would overflow, and 0 * inf
    # is no gradient.
    divisor = torch.where(near, torch.ones_like(negative_distance), negative_distance)
    pull = (reach / divisor).movedim(0, -1)
    pulled = z[:, None, :] + difference * pull
    return torch.where(near[..., None], z[None, :, :].expand_as(pulled), pulled), near


def synthesize_negatives(
    z: Tensor, labels: Tensor, gate: Tensor, *, kappa: float | Tensor, mix: Tensor
) -> Tensor:
    """(15)-(18), differentiable in ``z`` and ``gate``.

    Args:
        z: (N, D). labels: (N,). gate: (N, N, D). kappa: hardness of (16). mix: (K, K - 1), K = largest class count.

    Returns:
        (N, M, D); classes by first appearance; the own class as (17) gives it; rows of singletons, which are
        never anchors, are 0.
    """
    layout = class_layout(labels)
    h, _ = pulled_negatives(z, labels, gate, kappa)
    columns = []
    pulled = h.unbind(1)  # one gradient for all of them, where h[:, member] would make an (N, N, D) for each
    for members in layout.members:
        first, *others = members.tolist()
        chain = pulled[first]
        for step, member in enumerate(others):
            lam = mix[layout.rank.clamp(max=mix.shape[0] - 1), step][:, None]
            chain = (1 - lam) * pulled[member] + lam * chain
        columns.append(chain)
    syn = torch.stack(columns, 1) if columns else h  # no sample, no class: h is (0, 0, D) then
    return torch.where(layout.is_anchor[:, None, None], syn, torch.zeros_like(syn))
