"""What a ranking is compared by: its similarities, and the true similarity of the rows that it names."""

from __future__ import annotations

import torch
from torch import Tensor


def compared(values: Tensor, indices: Tensor, unit: Tensor) -> dict[str, Tensor]:
    """Arrays for the gate: two rankings that differ in a near tie agree in both.

    Args:
        values, indices: (N, k) of the ranking. unit: (N, D) unit rows in float64.
    """
    named = torch.einsum("nd,nkd->nk", unit, unit[indices.clamp(min=0)])
    return {"similarities": values, "similarities of the rows named": named.to(values.dtype)}


def unit_rows(x: Tensor, *, centered: bool) -> Tensor:
    """Rows of unit length in float64, (N, D)."""
    wide = x.detach().double()
    wide = wide - wide.mean(1, keepdim=True) if centered else wide
    return torch.nn.functional.normalize(wide, dim=1)
