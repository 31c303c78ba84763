"""What the kernels of (4)-(6) share: their tiles and launch table, scores of a tile, the mask, weights from the shares.

Scores are computed here and nowhere else, in one order of channels, so that a pair has the same bits in every kernel:
where a weight is near 1, dP - radial of the backward cancels to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gcng.kernels.arithmetic import dot
from gcng.kernels.launch import Schedule, unspecialized

PER_BATCH = unspecialized((), ("labels_ptr",))


@dataclass(frozen=True)
class AttentionSchedule(Schedule):
    """Tiles of a kernel: receivers, senders, channels of a step of a score, channels that a program writes."""

    block_i: int = 64
    block_j: int = 64
    block_k: int = 64
    block_d: int = 64

    @property
    def tiles(self) -> dict[str, int]:
        """The constexpr parameters of the kernels."""
        return {"BLOCK_I": self.block_i, "BLOCK_J": self.block_j, "BLOCK_K": self.block_k, "BLOCK_D": self.block_d}


def attention_schedules(
    width: int, dtype: torch.dtype, precision: str, arch: int
) -> tuple[AttentionSchedule, AttentionSchedule]:
    """Tiles of the kernels that own receivers, and of the one that owns senders.

    Not timed on a GPU: the largest tiles tried that keep what a program owns in registers
    (tests/test_triton_compiles.py). Channels of a step are the same for both, so that sums run in one order.
    """
    channels = max(16, min(64, triton.next_power_of_2(width)))
    if dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee"):
        # Without tensor cores a product holds one side of a whole step in registers.
        return AttentionSchedule(8, 2, 32, 32, 16, channels), AttentionSchedule(8, 2, 16, 32, 16, min(32, channels))
    step = min(32, channels) if dtype == torch.float32 else channels
    if arch < 90:
        return (AttentionSchedule(8, 2, 64, 32, step, channels),) * 2
    # Where one step holds a head of 64 channels, loads that run ahead leave the owner of senders no registers.
    stages = 1 if arch < 100 and 32 < width <= step else 2
    return AttentionSchedule(8, 2, 64, 64, step, channels), AttentionSchedule(8, stages, 64, 64, step, channels)


@triton.jit
def finite(x):
    """x with 0 in place of NaN and infinities: in a product, a weight of 0 times NaN is NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def load_rows(x_ptr, stride_n, stride_d, rows, channels, N, WIDTH: tl.constexpr):
    """(rows, channels) of one head, 0 outside; rows and channels are int64."""
    inside = (rows < N)[:, None] & (channels < WIDTH)[None, :]
    return tl.load(x_ptr + rows[:, None] * stride_n + channels[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def products(
    a_ptr, b_ptr, stride_an, stride_ad, stride_bn, stride_bd, rows, columns, N,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[rows] . b[columns] over the channels of one head, (BLOCK_I, BLOCK_J); the sum runs BLOCK_K channels a step."""
    tile = tl.zeros((rows.shape[0], columns.shape[0]), ACCUMULATOR)
    for first in range(0, WIDTH, BLOCK_K):
        channels = first + tl.arange(0, BLOCK_K).to(tl.int64)
        a = load_rows(a_ptr, stride_an, stride_ad, rows, channels, N, WIDTH)
        inside = (channels < WIDTH)[:, None] & (columns < N)[None, :]
        b = tl.load(b_ptr + channels[:, None] * stride_bd + columns[None, :] * stride_bn, mask=inside, other=0.0)
        tile = dot(a, b, tile, PRECISION)
    return tile


@triton.jit
def negatives(labels_ptr, rows, columns, N):
    """(BLOCK_I, BLOCK_J) bool: pairs of different classes, False outside the batch."""
    row_labels = tl.load(labels_ptr + rows, mask=rows < N, other=0)
    column_labels = tl.load(labels_ptr + columns, mask=columns < N, other=0)
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    return (row_labels[:, None] != column_labels[None, :]) & inside


@triton.jit
def weights_again(
    q_ptr, k_ptr, shares_ptr, stride_qn, stride_qd, stride_kn, stride_kd, rows, columns, negative, head, N, H,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(5) again from the saved shares: (BLOCK_I, BLOCK_J), 0 within a class."""
    TYPE: tl.constexpr = shares_ptr.dtype.element_ty
    scores = products(
        q_ptr, k_ptr, stride_qn, stride_qd, stride_kn, stride_kd, rows, columns, N, WIDTH, BLOCK_K, TYPE, PRECISION
    )
    maximum = tl.load(shares_ptr + head * N + rows, mask=rows < N, other=0.0)
    total = tl.load(shares_ptr + (H + head) * N + rows, mask=rows < N, other=1.0)
    # Masked last: outside their class pairs may overflow, and a NaN share must not reach the class of its row.
    return tl.where(negative, tl.exp(scores * SCALE - maximum[:, None]) / total[:, None], 0.0)
