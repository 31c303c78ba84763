"""Definition of the counter-based dropout of (11): a mask is a pure function of (seed, layer, unordered pair).

Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

* key: the two 32-bit halves of the 64-bit seed, the layer added to the high half;
* counter: the 64-bit identities of the two nodes, the smaller one first;
* output word 0 decides for the smaller node's weight, word 1 for the larger one's, word < round(p 2^32) drops.

A node's identity is a 64-bit mix of (label, rank in its class), so that neither the order of the batch nor the
tile that asks changes a mask. The diagonal pair (a, a) uses word 0 for both endpoints: both copies are one weight.
Unsigned 32-bit arithmetic is done in int64, whose products wrap modulo 2^64 as needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of an int64 tensor."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def node_identity(labels: Tensor, rank: Tensor) -> Tensor:
    """64-bit identity of every node from its label and its rank in the class, (N,) int64 (splitmix64 finalizer)."""
    x = labels.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + rank.to(torch.int64) + 1
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """First two 32-bit words of Philox 4x32-10, as int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1


def dropout_pairs(seed: Tensor, layer: int, p: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the two weights of (10) for pairs of nodes.

    Args:
        seed: 0-dim int64, one draw for a phase. layer: index of the propagation layer, from 0.
        p: probability of dropping a weight, in [0, 1).
        rows, columns: identities of the two endpoints (:func:`node_identity`), int64 of one shape.

    Returns:
        Two float64 tensors of that shape, 0 or 1 / (1 - p): the row endpoint's and the column endpoint's scale.
    """
    small, large = torch.minimum(rows, columns), torch.maximum(rows, columns)
    counter = (small & _MASK, _shift_right(small, 32), large & _MASK, _shift_right(large, 32))
    seed = seed.to(rows.device)
    words = philox(counter, (seed & _MASK, (_shift_right(seed, 32) + layer) & _MASK))
    threshold = round(p * 2**32)
    scales = [(word >= threshold).double() / (1.0 - p) for word in words]
    row_is_large = rows > columns
    return (
        torch.where(row_is_large, scales[1], scales[0]),
        torch.where(row_is_large | (rows == columns), scales[0], scales[1]),
    )


def dropout_scales(seed: Tensor, layer: int, p: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`dropout_pairs` for a block: identities (R,) and (S,) to two (R, S) float64 tensors."""
    return dropout_pairs(seed, layer, p, *torch.broadcast_tensors(rows[:, None], columns[None, :]))
