"""Blocked norm, messages, edge mixing and synthesis, right by default and wrong on request.

As ``tests/mutants_rows.py``, for what runs over pairs of samples: ``A(x) = LN(gelu(x))``, the messages (7),
the two-way mixing of (10)-(12) with its dropout, and the synthesis (15)-(18). Formulas: docs/maths.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gcng import reference
from tests.mutants_rows import BLOCK_PAIRS, BLOCK_ROWS, padded, summed, wide_dtype


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact gelu."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _normalized(x: Tensor, bug: str) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(x), its normalized rows and one over their spread."""
    active = F.gelu(x, approximate="tanh" if bug == "gelu_tanh" else "none")
    # The mean is corrected once by what it left: a constant row is then exactly 0.
    centered = active - active.mean(-1, keepdim=True)
    centered = centered - centered.mean(-1, keepdim=True)
    var = centered.square().mean(-1, keepdim=True)
    if bug == "variance_from_squares":
        var = active.square().mean(-1, keepdim=True) - active.mean(-1, keepdim=True).square()
    if bug == "variance_unbiased":
        var = var * x.shape[-1] / max(x.shape[-1] - 1, 1)
    rstd = 1 / (var.sqrt() + 1e-5) if bug == "eps_outside_root" else 1 / torch.sqrt(var + 1e-5)
    return active, centered * rstd, rstd


class _ActivationNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bug):
        ctx.save_for_backward(x, weight)
        ctx.bug = bug
        out, dtype = torch.empty_like(x, memory_format=torch.contiguous_format), wide_dtype(x)
        for start in range(0, x.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            out[rows] = (_normalized(x[rows].to(dtype), bug)[1] * weight.to(dtype) + bias.to(dtype)).to(
                x.dtype
            )
        return out.T.contiguous().T if bug == "output_transposed" else out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        bug, dtype = ctx.bug, wide_dtype(x)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        weight_parts, bias_parts = [], []
        for start in range(0, x.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            wide, upstream = x[rows].to(dtype), grad[rows].to(dtype)
            active, unit, rstd = _normalized(wide, bug)
            q = upstream * weight.to(dtype)
            delta = q
            if bug != "mean_term_dropped":
                delta = delta - q.mean(-1, keepdim=True)
            if bug != "variance_term_dropped":
                delta = delta - unit * (q * unit).mean(-1, keepdim=True)
            slope = gelu_slope(active if bug == "slope_of_output" else wide)
            grad_x[rows] = (delta * rstd * slope).to(x.dtype)
            if bug == "last_rows_not_summed" and weight_parts and start + BLOCK_ROWS > x.shape[0]:
                continue
            operand = active if bug == "weight_from_wrong_operand" else unit
            weight_parts.append((upstream * operand).sum(0))
            bias_parts.append(upstream.sum(0))
        sums = x.dtype if bug == "sums_in_storage" else dtype
        return grad_x, summed(weight_parts, sums).to(x.dtype), summed(bias_parts, sums).to(x.dtype), None


def activation_norm(x: Tensor, weight: Tensor, bias: Tensor, *, bug: str = "") -> Tensor:
    """``A(x) = LN(gelu(x))`` over the last axis in row blocks, (N, D) -> (N, D)."""
    if bug == "norm_before_gelu":
        return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias))
    return _ActivationNorm.apply(x, weight, bias, bug)


class _Messages(torch.autograd.Function):
    @staticmethod
    def _tile(e, weight, bias, rows, start, bug):
        """Preactivations and live pairs of one (rows, BLOCK_PAIRS) tile; partners beyond the last are
        padding.
        """
        dtype, size = wide_dtype(e), e.shape[1]
        tile = padded(e[rows].transpose(0, 1), start, BLOCK_PAIRS).transpose(0, 1).to(dtype)
        partner = start + torch.arange(BLOCK_PAIRS)
        live = (partner < size) | torch.tensor(bug == "tail_unmasked")
        if bug == "self_excluded":
            live = live & (partner != torch.arange(size)[rows, None])
        return (
            tile,
            tile @ weight.to(dtype).T + bias.to(dtype),
            live.expand(tile.shape[:2])[..., None].to(dtype),
        )

    @staticmethod
    def _starts(size, bug):
        blocks = size // BLOCK_PAIRS if bug == "last_block_dropped" else math.ceil(size / BLOCK_PAIRS)
        return range(0, blocks * BLOCK_PAIRS, BLOCK_PAIRS)

    @staticmethod
    def forward(ctx, e, weight, bias, bug):
        ctx.save_for_backward(e, weight, bias)
        ctx.bug = bug
        out = e.new_empty((e.shape[0], weight.shape[0]))
        for begin in range(0, e.shape[0], BLOCK_PAIRS):
            rows = slice(begin, begin + BLOCK_PAIRS)
            summed = torch.zeros_like(out[rows], dtype=wide_dtype(e))
            for start in _Messages._starts(e.shape[1], bug):
                _, before, live = _Messages._tile(e, weight, bias, rows, start, bug)
                summed += (F.gelu(before) * live).sum(1)
            out[rows] = summed.to(e.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        e, weight, bias = ctx.saved_tensors
        bug, dtype = ctx.bug, wide_dtype(e)
        grad_e = torch.zeros_like(e, memory_format=torch.contiguous_format)
        grad_weight, grad_bias = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(bias, dtype=dtype)
        for begin in range(0, e.shape[0], BLOCK_PAIRS):
            rows = slice(begin, begin + BLOCK_PAIRS)
            for start in _Messages._starts(e.shape[1], bug):
                tile, before, live = _Messages._tile(e, weight, bias, rows, start, bug)
                slope = torch.sigmoid(1.702 * before) if bug == "slope_approximated" else gelu_slope(before)
                delta = grad[rows, None].to(dtype) * slope * live
                inside = min(BLOCK_PAIRS, e.shape[1] - start)
                grad_e[rows, start : start + inside] = (delta @ weight.to(dtype))[:, :inside].to(e.dtype)
                grad_weight += torch.einsum("abo,abi->oi", delta, tile)
                grad_bias += delta.sum((0, 1))
        return grad_e, grad_weight.to(e.dtype), grad_bias.to(e.dtype), None


def messages(e: Tensor, weight: Tensor, bias: Tensor, *, bug: str = "") -> Tensor:
    """(7), the sum ``Σ_b gelu(e[a, b] weightᵀ + bias)`` in tiles of pairs, (N, N, D) -> (N, D)."""
    if bug == "endpoints_swapped":
        e = e.transpose(0, 1)
    return _Messages.apply(e, weight, bias, bug)


class _EdgeMix(torch.autograd.Function):
    @staticmethod
    def _weights(e, turned, shift, rows, identity, seed, p, bug):
        """Softmax weight of the row endpoint and both dropout scales for a block of row endpoints."""
        dtype = wide_dtype(e)
        turn = turned[rows, None].to(dtype) - turned[None].to(dtype)
        logit = (e[rows].to(dtype) * turn).sum(-1) + shift[rows, None].to(dtype) - shift[None].to(dtype)
        weight = torch.sigmoid(logit if bug == "scale_missing" else logit / math.sqrt(e.shape[-1]))
        columns = torch.arange(len(identity)) if bug == "dropout_by_position" else identity
        scales = reference.dropout_scales(torch.tensor(seed), 0, p, identity[rows], columns)
        scales = [scale.to(dtype) * ((1 - p) if bug == "dropout_not_rescaled" else 1) for scale in scales]
        return turn, weight, *scales

    @staticmethod
    def forward(ctx, e, turned, shift, value, identity, seed, p, bug):
        ctx.save_for_backward(e, turned, shift, value, identity)
        ctx.seed, ctx.p, ctx.bug = seed, p, bug
        out, dtype = torch.empty_like(e, memory_format=torch.contiguous_format), wide_dtype(e)
        for start in range(0, e.shape[0], BLOCK_PAIRS):
            rows = slice(start, start + BLOCK_PAIRS)
            _, weight, row_scale, column_scale = _EdgeMix._weights(
                e, turned, shift, rows, identity, seed, p, bug
            )
            if bug == "endpoints_swapped":
                weight = 1 - weight
            mixed = (weight * row_scale)[..., None] * value[rows, None].to(dtype)
            mixed = mixed + ((1 - weight) * column_scale)[..., None] * value[None].to(dtype)
            out[rows] = (mixed + e[rows].to(dtype)).to(e.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        e, turned, shift, value, identity = ctx.saved_tensors
        bug, dtype = ctx.bug, wide_dtype(e)
        seed = ctx.seed + (1 if bug == "dropout_seed_changed" else 0)
        grad_e = torch.empty_like(e, memory_format=torch.contiguous_format)
        grads = [torch.zeros_like(x, dtype=dtype) for x in (turned, shift, value)]
        root = 1.0 if bug == "scale_missing" else math.sqrt(e.shape[-1])
        for start in range(0, e.shape[0], BLOCK_PAIRS):
            rows = slice(start, start + BLOCK_PAIRS)
            turn, weight, row_scale, column_scale = _EdgeMix._weights(
                e, turned, shift, rows, identity, seed, ctx.p, bug
            )
            upstream = grad[rows].to(dtype)
            at_row = torch.einsum("abd,ad->ab", upstream, value[rows].to(dtype)) * row_scale
            at_column = torch.einsum("abd,bd->ab", upstream, value.to(dtype)) * column_scale
            slope = weight if bug == "sigmoid_slope" else weight * (1 - weight)
            delta = (at_row - at_column) * slope / root
            direct = torch.zeros_like(upstream) if bug == "residual_dropped" else upstream
            through = torch.zeros_like(delta) if bug == "logit_detached" else delta
            grad_e[rows] = (direct + through[..., None] * turn).to(e.dtype)
            turned_part = delta[..., None] * e[rows].to(dtype)
            grads[0][rows] += turned_part.sum(1)
            grads[0] -= turned_part.sum(0)
            grads[1][rows] += delta.sum(1)
            grads[1] -= delta.sum(0)
            grads[2][rows] += torch.einsum("ab,abd->ad", weight * row_scale, upstream)
            grads[2] += torch.einsum("ab,abd->bd", (1 - weight) * column_scale, upstream)
        return grad_e, *(x.to(e.dtype) for x in grads), None, None, None, None


def edge_mix(
    e: Tensor,
    turned: Tensor,
    shift: Tensor,
    value: Tensor,
    identity: Tensor,
    *,
    seed: int,
    p: float,
    bug: str = "",
) -> Tensor:
    """(10)-(12) before the norm, with the folded query: ``wr value[a] + wc value[b] + e``, (N, N, D).

    ``wr = sigmoid((e[a, b]·(turned[a] - turned[b]) + shift[a] - shift[b]) / sqrt(D))``, ``wc = 1 - wr``, both
    then scaled by the dropout of the pair.
    """
    return _EdgeMix.apply(e, turned, shift, value, identity, seed, p, bug)


def edge_mix_definition(
    e: Tensor, turned: Tensor, shift: Tensor, value: Tensor, identity: Tensor, *, seed: int, p: float
) -> Tensor:
    """What it must equal: a two-way softmax over dense logits."""
    logits = torch.stack(
        [(e * turned[:, None]).sum(-1) + shift[:, None], (e * turned[None]).sum(-1) + shift[None]], -1
    )
    weights = (logits / math.sqrt(e.shape[-1])).softmax(-1)
    scales = torch.stack(reference.dropout_scales(torch.tensor(seed), 0, p, identity, identity), -1)
    weights = weights * scales.to(weights.dtype)
    return weights[..., :1] * value[:, None] + weights[..., 1:] * value[None] + e


def _chain_weights(layout: reference.ClassLayout, anchors: Tensor, mix: Tensor, bug: str) -> Tensor:
    """(A, N) weight of every sample in the convex combination (18) of its class, for each anchor."""
    weights = torch.zeros(len(anchors), len(layout.rank), dtype=mix.dtype)
    rank = torch.zeros_like(layout.rank[anchors]) if bug == "mix_row_of_first" else layout.rank[anchors]
    for members in layout.members:
        rest = torch.ones(len(anchors), dtype=mix.dtype)
        for g in range(len(members) - 1, -1, -1):
            lam = mix[rank, g - 1] if g > 0 else torch.zeros_like(rest)
            if bug == "mix_swapped" and g > 0:
                lam = 1 - lam
            weights[:, members[g]] = (1 - lam) * rest
            rest = rest * lam
    return weights


class _Synthesis(torch.autograd.Function):
    @staticmethod
    def _geometry(z, gate, positive, anchors, kappa, bug):
        """Everything of (15)-(17) for a block of anchors, in the accumulator dtype."""
        dtype = wide_dtype(z)
        wide = z.to(dtype)
        a = wide[anchors]
        eps = 0.0 if bug == "eps_missing" else 1e-6
        to_positive = a - wide[positive[anchors]] + eps
        to_negative = a[:, None] - wide[None] + eps
        kept = slice(0, z.shape[1] - 1) if bug == "last_channel_dropped" else slice(None)
        dp = to_positive[..., kept].norm(dim=-1)[:, None]
        dn = to_negative[..., kept].norm(dim=-1)
        near = dp > dn if bug == "tie_is_far" else dp >= dn
        if bug == "near_branch_missing":
            near = torch.zeros_like(near)
        pairs = gate[:, anchors].transpose(0, 1) if bug == "gate_transposed" else gate[anchors]
        return (
            wide[None] - a[:, None],
            to_positive,
            to_negative,
            dp,
            dn,
            near[..., None],
            kappa * pairs.to(dtype),
        )

    @staticmethod
    def forward(ctx, z, labels, gate, kappa, mix, bug):
        layout = reference.class_layout(labels)
        positive = layout.positive
        if bug == "positive_previous":
            positive = torch.empty_like(positive).scatter_(0, layout.positive, torch.arange(len(positive)))
        ctx.save_for_backward(z, labels, gate, mix, positive)
        ctx.kappa, ctx.bug = kappa, bug
        classes = F.one_hot(layout.class_index, len(layout.members)).to(wide_dtype(z))
        out = z.new_zeros((z.shape[0], classes.shape[1], z.shape[1]))
        for anchors in layout.is_anchor.nonzero()[:, 0].split(BLOCK_ROWS):
            step, _, _, dp, dn, near, pull = _Synthesis._geometry(z, gate, positive, anchors, kappa, bug)
            share = pull + (dp / dn)[..., None] * (1 - pull)
            share = torch.where(near, torch.ones_like(share), share)
            h = z[anchors, None].to(share.dtype) + step * share
            weights = _chain_weights(layout, anchors, mix.to(share.dtype), bug)
            out[anchors] = torch.einsum("an,and,nm->amd", weights, h, classes).to(z.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        z, labels, gate, mix, positive = ctx.saved_tensors
        bug, kappa, dtype = ctx.bug, ctx.kappa, wide_dtype(z)
        layout = reference.class_layout(labels)
        grad_z, grad_gate = torch.zeros_like(z, dtype=dtype), torch.zeros_like(gate)
        for anchors in layout.is_anchor.nonzero()[:, 0].split(BLOCK_ROWS):
            step, to_positive, to_negative, dp, dn, near, pull = _Synthesis._geometry(
                z, gate, positive, anchors, kappa, bug
            )
            weights = _chain_weights(layout, anchors, mix.to(dtype), bug)
            grad_h = weights[..., None] * grad[anchors][:, layout.class_index].to(dtype)
            share = torch.where(near, torch.ones_like(pull), pull + (dp / dn)[..., None] * (1 - pull))
            grad_z[anchors] += ((1 - share) * grad_h).sum(1)
            grad_z += (share * grad_h).sum(0)
            through = torch.where(near, torch.zeros_like(grad_h), grad_h * step)
            factor = 1.0 if bug == "kappa_missing_in_gradient" else kappa
            if bug != "gate_detached":
                grad_gate[anchors] = (through * factor * ((dn - dp) / dn)[..., None]).to(gate.dtype)
            if bug == "distances_detached":
                continue
            grad_ratio = (through * (1 - pull)).sum(-1)
            toward = (grad_ratio / dn).sum(1, keepdim=True) * to_positive / dp
            away = (-grad_ratio * dp / dn.square() / dn)[..., None] * to_negative
            grad_z[anchors] += toward + away.sum(1)
            grad_z.index_add_(0, positive[anchors], -toward)
            grad_z -= away.sum(0)
        return grad_z.to(z.dtype), None, grad_gate, None, None, None


def synthesis(
    embeddings: Tensor, labels: Tensor, gate: Tensor, kappa: float, mix: Tensor, *, bug: str = ""
) -> Tensor:
    """(15)-(18) in blocks of anchors, each chain as the convex combination that it is, (N, M, D)."""
    return _Synthesis.apply(embeddings, labels, gate, kappa, mix, bug)


def synthesis_definition(
    embeddings: Tensor, labels: Tensor, gate: Tensor, kappa: float, mix: Tensor
) -> Tensor:
    """What it must equal."""
    return reference.synthesize_negatives(embeddings, labels, gate, kappa=kappa, mix=mix)


def constant_gate_synthesis(
    embeddings: Tensor, labels: Tensor, gate: Tensor, kappa: float, mix: Tensor, *, bug: str = ""
) -> Tensor:
    """The synthesis of the metric phase (20), where the gate is a constant."""
    return synthesis(embeddings, labels, gate if bug == "detach_missing" else gate.detach(), kappa, mix)


def constant_gate_definition(
    embeddings: Tensor, labels: Tensor, gate: Tensor, kappa: float, mix: Tensor
) -> Tensor:
    """What it must equal: no gradient reaches the gate."""
    return synthesis_definition(embeddings, labels, gate.detach(), kappa, mix)
