"""Blocked linear cross-entropy and class-masked attention, right by default and wrong on request.

Small, honest implementations in the style of a kernel (tiles with zero-padded tails, online softmax, a hand-
written backward that recomputes), each with a ``bug`` that plants one mistake. ``tests/test_mutants.py``
proves that the closeness gate accepts the honest version and refuses every mistake.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_ROWS = 8
BLOCK_CLASSES = 32
BLOCK_WIDTH = 16
BLOCK_PAIRS = 16

REMEMBERED: dict[str, Tensor] = {}  # what mutants that keep state between calls keep; tests clear it


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of accumulators: float32 for 16-bit storage, else the storage dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def padded(x: Tensor, start: int, size: int, fill: float = 0.0) -> Tensor:
    """Rows ``start .. start + size`` of ``x``, rows beyond the end filled, as a masked load gives them."""
    part = x[start : start + size]
    return torch.cat([part, part.new_full((size - part.shape[0], *part.shape[1:]), fill)])


def as_if_contiguous(grad: Tensor) -> Tensor:
    """What a kernel reads that takes the upstream gradient for a contiguous vector."""
    available = grad.untyped_storage().nbytes() // grad.element_size() - grad.storage_offset()
    index = torch.arange(grad.numel()).clamp(max=available - 1)
    return torch.as_strided(grad, (available,), (1,))[index].view(grad.shape)


def summed(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of the blocks' parts: pairwise in the accumulator dtype, one after another in a narrower one."""
    if dtype != parts[0].dtype:
        total = torch.zeros_like(parts[0], dtype=dtype)
        for part in parts:
            total += part.to(dtype)
        return total
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(parts) - len(parts) % 2 :]
    return parts[0]


def _logits(x: Tensor, weight: Tensor, bias: Tensor, start: int, bug: str) -> tuple[Tensor, Tensor]:
    """One (rows, BLOCK_CLASSES) tile of logits and its class indices; classes beyond the last are -inf."""
    dtype = wide_dtype(x)
    tile = padded(weight, start, BLOCK_CLASSES).to(dtype)
    logits = x.new_zeros((x.shape[0], BLOCK_CLASSES), dtype=dtype)
    for d in range(0, x.shape[1], BLOCK_WIDTH):
        logits += x[:, d : d + BLOCK_WIDTH].to(dtype) @ tile[:, d : d + BLOCK_WIDTH].T
        # Last, so that a large bias costs one rounding and not one per block.
        if d + BLOCK_WIDTH >= x.shape[1] or bug == "bias_per_width_block":
            logits += padded(bias, start, BLOCK_CLASSES).to(dtype)
    classes = start + torch.arange(BLOCK_CLASSES)
    if bug not in ("tail_unmasked", "tail_after_maximum"):
        logits = logits.masked_fill(classes >= weight.shape[0], -math.inf)
    return logits, classes


def _class_starts(weight: Tensor, bug: str) -> range:
    blocks = (
        weight.shape[0] // BLOCK_CLASSES
        if bug == "floor_grid"
        else math.ceil(weight.shape[0] / BLOCK_CLASSES)
    )
    return range(0, blocks * BLOCK_CLASSES, BLOCK_CLASSES)


def _log_mass(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, bug: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over class tiles: largest logit, log of the shifted mass, logit of the target.

    The two parts of the log-sum-exp stay apart: their sum would lose what a small loss consists of.
    """
    highest = x.new_full((x.shape[0],), -math.inf, dtype=wide_dtype(x))
    mass, picked = torch.zeros_like(highest), torch.zeros_like(highest)
    for start in _class_starts(weight, bug):
        logits, classes = _logits(x, weight, bias, start, bug)
        raised = torch.maximum(highest, logits.amax(1))
        if bug == "no_maximum":
            highest, raised = torch.zeros_like(highest), torch.zeros_like(highest)
        share = torch.exp(logits - raised[:, None])
        if bug == "tail_after_maximum":
            share = share.masked_fill(classes >= weight.shape[0], 0.0)
        mass = mass * torch.exp(highest - raised) + share.sum(1)
        picked += torch.where(classes == target[:, None], logits, torch.zeros_like(logits)).sum(1)
        highest = raised
    return highest, mass.log(), picked


def _row_gradient(grad: Tensor, target: Tensor, reduction: str, bug: str) -> Tensor:
    """The upstream gradient of each row's loss, 0 for ignored rows."""
    valid = target != -100
    if bug == "upstream_ignored":
        grad = torch.ones_like(grad)
    if bug == "upstream_first_only":
        grad = grad.reshape(-1)[0]
    if bug == "upstream_assumed_contiguous":
        grad = as_if_contiguous(grad)
    if reduction == "mean" and bug != "mean_gradient_undivided":
        grad = grad / (len(target) if bug == "ignored_counted" else valid.sum().clamp(min=1))
    if bug == "gradient_scaled":
        grad = grad * 1.02
    return torch.where(valid, grad, torch.zeros_like(grad))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, reduction, bug):
        valid = target != -100
        if bug == "stale_row_mask":
            valid = REMEMBERED.setdefault(f"valid {len(target)}", valid)
        seen = target.to(torch.uint8).long() if bug == "label_narrowed" else target
        highest, log_mass, losses = (x.new_empty(len(target), dtype=wide_dtype(x)) for _ in range(3))
        for start in range(0, len(target), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            highest[rows], log_mass[rows], picked = _log_mass(x[rows], weight, bias, seen[rows], bug)
            loss = (highest[rows] - picked) + log_mass[rows]
            losses[rows] = torch.where(valid[rows], loss, torch.zeros_like(loss))
        if bug == "last_row_dropped":
            losses[-1] = 0.0
        ctx.save_for_backward(x, weight, bias, target, highest, log_mass)
        ctx.reduction, ctx.bug = reduction, bug
        if bug == "tensor_on_context":
            ctx.log_mass = log_mass
        if reduction == "none":
            return losses
        count = len(target) if bug == "ignored_counted" else valid.sum()
        return losses.sum() / (count if bug == "all_ignored_divided" else max(int(count), 1))

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, target, highest, log_mass = ctx.saved_tensors
        bug, dtype = ctx.bug, wide_dtype(x)
        seen = target.to(torch.uint8).long() if bug == "label_narrowed" else target
        row_grad = _row_gradient(grad, target, ctx.reduction, bug).to(dtype).expand(len(target))
        grad_x = x.new_empty(x.shape, dtype=dtype)
        weight_parts, bias_parts = [], []
        for start in range(0, len(target), BLOCK_ROWS):
            if bug == "last_block_unwritten" and start + BLOCK_ROWS >= len(target):
                break
            rows = slice(start, start + BLOCK_ROWS)
            block, wide = torch.zeros_like(grad_x[rows]), x[rows].to(dtype)
            weight_parts.append(torch.zeros_like(weight, dtype=dtype))
            bias_parts.append(torch.zeros_like(bias, dtype=dtype))
            for first in _class_starts(weight, bug):
                logits, classes = _logits(x[rows], weight, bias, first, bug)
                share = torch.exp(logits - highest[rows, None] - log_mass[rows, None])
                if bug == "rounded_before_one":
                    share = share.to(x.dtype).to(dtype)
                delta = (share - (classes == seen[rows, None]).to(dtype)) * row_grad[rows, None]
                if bug == "last_row_dropped" and start + BLOCK_ROWS >= len(target):
                    delta[-1] = 0.0
                delta = delta[:, : weight.shape[0] - first]
                tile = slice(first, first + BLOCK_CLASSES)
                block += delta @ weight[tile].to(dtype)
                if bug == "last_rows_not_summed" and start + BLOCK_ROWS > len(target):
                    continue
                weight_parts[-1][tile] = delta.T @ wide
                bias_parts[-1][tile] = delta.sum(0)
            grad_x[rows] = block
        sums = x.dtype if bug == "sums_in_storage" else dtype
        grad_weight, grad_bias = summed(weight_parts, sums), summed(bias_parts, sums)
        if bug == "buffer_kept":
            grad_weight = REMEMBERED.setdefault("grad weight", torch.zeros_like(grad_weight)).add_(
                grad_weight
            )
        if bug == "one_element_off":
            grad_weight[0, 0] += 0.5 / len(target)
        if bug == "writes_input":
            x.data.copy_(grad_x)
        if bug == "writes_saved":
            log_mass.data.add_(1e-3)
        if bug == "writes_upstream":
            grad.data.mul_(0.5)
        return grad_x.to(x.dtype), grad_weight.to(x.dtype, copy=True), grad_bias.to(x.dtype), None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, reduction: str = "mean", bug: str = ""
) -> Tensor:
    """``CE(x weightᵀ + bias, target)`` in row and class blocks; the loss in the accumulator dtype."""
    return _LinearCrossEntropy.apply(x, weight, bias, target, reduction, bug)


def _scores(q: Tensor, k: Tensor, labels: Tensor, rows: slice, start: int, bug: str) -> Tensor:
    """One (H, rows, BLOCK_PAIRS) tile of logits, -inf where the sender is no negative of the receiver."""
    dtype, size = wide_dtype(q), k.shape[0]
    scores = torch.einsum("bhd,ahd->hba", q[rows].to(dtype), padded(k, start, BLOCK_PAIRS).to(dtype))
    if bug != "scale_missing":
        scores = scores / math.sqrt(q.shape[-1])
    sender = start + torch.arange(BLOCK_PAIRS)
    allowed = labels[rows, None] != padded(labels, start, BLOCK_PAIRS, fill=-1)
    if bug == "mask_inverted":
        allowed = ~allowed
    if bug == "diagonal_counted":
        allowed |= torch.arange(size)[rows, None] == sender
    if bug == "positives_counted":
        allowed = torch.ones_like(allowed)
    if bug != "tail_unmasked":
        allowed = allowed & (sender < size)
    return scores.masked_fill(~allowed, -math.inf)


def _sender_starts(size: int, bug: str) -> range:
    blocks = size // BLOCK_PAIRS if bug == "last_block_dropped" else math.ceil(size / BLOCK_PAIRS)
    return range(0, blocks * BLOCK_PAIRS, BLOCK_PAIRS)


class _NegativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, labels, bug):
        dtype, size = wide_dtype(q), q.shape[0]
        out = q.new_empty(q.shape)
        highest_all, mass_all = (q.new_empty((q.shape[1], size), dtype=dtype) for _ in range(2))
        for begin in range(0, size, BLOCK_PAIRS):
            rows = slice(begin, begin + BLOCK_PAIRS)
            # The extra zero logit is the state before the first tile: highest 0, mass exp(0 - 0).
            highest = torch.zeros_like(mass_all[:, rows])
            mass = torch.zeros_like(highest) if bug == "zero_logit_missing" else torch.ones_like(highest)
            if bug == "empty_row_shift":
                highest, mass = torch.full_like(highest, -math.inf), torch.zeros_like(highest)
            summed = torch.zeros_like(q[rows], dtype=dtype).transpose(0, 1)
            for start in _sender_starts(size, bug):
                scores = _scores(q, k, labels, rows, start, bug)
                raised = torch.maximum(highest, scores.amax(-1))
                if bug == "no_maximum":
                    raised = torch.zeros_like(raised)
                weights, shrink = torch.exp(scores - raised[..., None]), torch.exp(highest - raised)
                values = padded(v, start, BLOCK_PAIRS).to(dtype)
                mass = mass * shrink + weights.sum(-1)
                summed = summed * shrink[..., None] + torch.einsum("hba,ahd->hbd", weights, values)
                highest = raised
            if bug == "empty_row_shift":
                mass = mass + torch.exp(-highest)
            out[rows] = (summed / mass[..., None]).transpose(0, 1).to(q.dtype)
            highest_all[:, rows], mass_all[:, rows] = highest, mass
        ctx.save_for_backward(q, k, v, labels, highest_all, mass_all)
        ctx.bug = bug
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, labels, highest, mass = ctx.saved_tensors
        bug, dtype, size = ctx.bug, wide_dtype(q), q.shape[0]
        grads = [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
        scale = 1.0 if bug == "scale_missing" else 1 / math.sqrt(q.shape[-1])
        for begin in range(0, size, BLOCK_PAIRS):
            rows = slice(begin, begin + BLOCK_PAIRS)
            upstream = grad[rows].to(dtype)
            tiles, inner = [], torch.zeros_like(mass[:, rows, None])
            for start in _sender_starts(size, bug):
                columns = slice(start, start + BLOCK_PAIRS)
                scores = _scores(q, k, labels, rows, start, bug)[..., : min(BLOCK_PAIRS, size - start)]
                weights = torch.exp(scores - highest[:, rows, None]) / mass[:, rows, None]
                through = torch.einsum("bhd,ahd->hba", upstream, v[columns].to(dtype))
                tiles.append((columns, weights, through))
                # Not out · upstream: a rounded output does not cancel against the weights it came from.
                if bug != "inner_product_dropped":
                    inner += (weights * through).sum(-1, keepdim=True)
            for columns, weights, through in tiles:
                delta = weights * (through - inner)
                grads[0][rows] += scale * torch.einsum("hba,ahd->bhd", delta, k[columns].to(dtype))
                key_scale = 1.0 if bug == "key_scale_missing" else scale
                grads[1][columns] += key_scale * torch.einsum("hba,bhd->ahd", delta, q[rows].to(dtype))
                if bug == "value_gradient_overwritten":
                    grads[2][columns] = 0.0
                grads[2][columns] += torch.einsum("hba,bhd->ahd", weights, upstream)
        return *(x.to(q.dtype) for x in grads), None, None


def negative_attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, *, bug: str = "") -> Tensor:
    """(4)-(6) of docs/maths.md in tiles of receivers and senders, (N, H, h) x3 -> (N, H, h)."""
    if bug == "sender_receiver_swapped":
        q, k = k, q
    if bug == "normalized_over_receivers":
        scores = torch.cat(
            [_scores(q, k, labels, slice(None), i, "") for i in _sender_starts(len(q), "")], -1
        )
        weights = torch.exp(scores[..., : q.shape[0]])
        weights = weights / (1 + weights.sum(1, keepdim=True))
        return torch.einsum("hba,ahd->bhd", weights, v.to(weights.dtype)).to(q.dtype)
    out = _NegativeAttention.apply(q, k, v, labels, bug)
    if bug == "heads_interleaved":
        return out.transpose(0, 1).reshape(out.shape)
    return out
