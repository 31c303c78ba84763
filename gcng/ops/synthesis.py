"""Op (15)-(18), the dense drop-in form: synthetic negatives from the caller's gates, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from gcng import reference
from gcng.batch_layout import BatchLayout
from gcng.mode import in_reference_mode
from gcng.ops.dispatch import synthesis_kernels
from gcng.ops.layout import class_boundaries, class_major, host_labels
from gcng.ops.registration import compute_dtype, define_autocast, define_gradient, define_op
from gcng.ops.synthesis_tiles import EmbeddingGradients, Side, Synthesis, Synthetic, SyntheticGradients
from gcng.ops.transfers import kept_on_device, sent
from gcng.ops.validation import (
    check_channels,
    check_float_matrix,
    check_kappa,
    check_labels,
    check_mix,
    check_mix_tensor,
    check_same_device,
    check_same_dtype,
)

# (anchor, negative) pairs of one block of the dense form: in cache on a CPU, and enough to fill a GPU, where a block
# costs about 15 launches. Counted, not timed there; 134 MB of gates in float32 at D = 512.
DENSE_PAIRS, DENSE_PAIRS_ON_GPU = 4096, 65_536
IN_PLACE = 8  # times as many where a block holds a few numbers of each pair, not its channels


def dense_pairs(device: torch.device) -> int:
    """Pairs of one block of the dense form on a device."""
    return DENSE_PAIRS_ON_GPU if device.type == "cuda" else DENSE_PAIRS


@kept_on_device
def _class_order(labels: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Class-major order of a batch on a device, and its class starts, which end with N."""
    layout = class_major(torch.tensor(labels, dtype=torch.int64))
    return sent(layout.order, device), tuple(class_boundaries(layout.class_start)) if labels else (0,)


class _Dense:
    """The dense form: class-major geometry, and the caller's gates (N, N, D), where they lie or gathered by block."""

    def __init__(self, z: Tensor, labels: Tensor, gate: Tensor, kappa: Tensor, mix: Tensor, pairs: int) -> None:
        dtype = compute_dtype(z.dtype)
        self.order, boundaries = _class_order(tuple(labels.tolist()), z.device)
        most = max((b - a for a, b in zip(boundaries, boundaries[1:], strict=False)), default=0)
        check_mix("synthesize_negatives", mix, most)
        wide = z.to(dtype)[self.order]
        self.synthesis = Synthesis(wide, boundaries, kappa, mix, synthesis_kernels(wide))
        self.gate, self.dtype, n = gate, dtype, z.shape[0]
        self.all_pairs = self.synthesis.kernels.of_all_pairs(self.synthesis, self.order, gate)
        # Nobody waits for a GPU to find out.
        self.in_order = self.order.device.type == "cpu" and torch.equal(self.order, torch.arange(n))
        rows = max(1, pairs * (1 if self.all_pairs is None else IN_PLACE) // max(n, 1))
        everyone = slice(0, n)
        self.blocks = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.side = lambda block: Side(self.synthesis, block, everyone, slice(None), mirrored=False)

    def rows(self, block: slice) -> slice | Tensor:
        """Where the caller has a block of class-major anchors."""
        return block if self.in_order else self.order[block]

    def of_anchors(self, side: Side, values: Tensor) -> Tensor:
        """(A, ...) with zeros for samples that are alone in their class."""
        if self.synthesis.num_anchors == self.order.shape[0]:
            return values
        return torch.where(side.valid[..., None], values, torch.zeros_like(values))

    def gates(self, block: slice) -> Tensor:
        """Gates (A, N, D) of a block of class-major anchors against all class-major negatives."""
        if self.in_order:
            return self.gate[block].to(self.dtype)
        # Whole rows are copied several times faster than what indexing two dimensions does.
        rows = self.gate.flatten(0, 1).index_select(0, self.pairs(block))
        return rows.view(-1, *self.gate.shape[1:]).to(self.dtype)

    def pairs(self, block: slice) -> Tensor:
        """Row-major positions, among the caller's N² pairs, of a block of class-major anchors and all negatives."""
        return (self.order[block][:, None] * self.order.shape[0] + self.order).flatten()


def _synthesize_negatives(
    z: Tensor, labels: Tensor, gate: Tensor, kappa: Tensor, mix: Tensor, pairs_per_tile: int
) -> Tensor:
    dense = _Dense(z, labels, gate, kappa, mix, pairs_per_tile)
    out = z.new_empty((z.shape[0], dense.synthesis.num_classes, z.shape[1]))
    if dense.all_pairs is not None:
        dense.all_pairs.expect_writes(out)
        for block in dense.blocks:
            dense.all_pairs.synthesize(dense.side(block), out)
        return out
    for block in dense.blocks:
        side = dense.side(block)
        syn = side.synthesize(dense.gates(block)).values
        out[dense.rows(block)] = dense.of_anchors(side, syn).to(z.dtype)
    return out


def _synthesize_negatives_fake(z, labels, gate, kappa, mix, pairs_per_tile):
    # The number of classes of a batch is data.
    num_classes = torch.library.get_ctx().new_dynamic_size(min=0)
    return z.new_empty((z.shape[0], num_classes, z.shape[1]))


def _synthesize_negatives_backward(
    grad: Tensor,
    z: Tensor,
    labels: Tensor,
    gate: Tensor,
    kappa: Tensor,
    mix: Tensor,
    pairs_per_tile: int,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:
    dense = _Dense(z, labels, gate, kappa, mix, pairs_per_tile)
    grads = EmbeddingGradients(dense.synthesis)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_gate else gate.new_empty(0)
    if dense.all_pairs is None:
        _gathered_backward(dense, grad, grads, grad_gate if need_gate else None)
    else:
        grad = grad.contiguous()
        dense.all_pairs.expect_writes(grad_gate)
        for block in dense.blocks:
            side = dense.side(block)
            if need_gate:
                dense.all_pairs.write_gate_gradient(side, grad, grad_gate)
            dense.all_pairs.backward(side, grad, grads)
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    grad_z[dense.order] = grads.finish().to(z.dtype)
    return grad_z, grad_gate


def _gathered_backward(dense: _Dense, grad: Tensor, grads: EmbeddingGradients, grad_gate: Tensor | None) -> None:
    """The gradients from gates that are copied into class-major order, block by block."""
    for block in dense.blocks:
        side, gates = dense.side(block), dense.gates(block)
        wide = grad[dense.rows(block)].to(dense.dtype)
        upstream = SyntheticGradients(dense.of_anchors(side, wide), None, None)
        if grad_gate is not None:
            in_place = dense.in_order and grad_gate.dtype == gates.dtype
            value = grad_gate[block].zero_() if in_place else torch.zeros_like(gates)
            side.add_gate_gradient(Synthetic(None, None, None), upstream, value)
            if not in_place:
                flat = value.flatten(0, 1).to(grad_gate.dtype)
                grad_gate.view(-1, grad_gate.shape[2]).index_copy_(0, dense.pairs(block), flat)
        side.backward(gates, upstream, grads)


def _synthesize_negatives_backward_fake(grad, z, labels, gate, kappa, mix, pairs_per_tile, need_gate):
    like = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_gate else gate.new_empty(0)
    return torch.empty_like(z, memory_format=torch.contiguous_format), like


_ARGUMENTS = "Tensor z, Tensor labels, Tensor gate, Tensor kappa, Tensor mix, int pairs_per_tile"
_forward = define_op(
    f"synthesize_negatives({_ARGUMENTS}) -> Tensor", _synthesize_negatives, _synthesize_negatives_fake
)
_backward = define_op(
    f"synthesize_negatives_backward(Tensor grad, {_ARGUMENTS}, bool need_gate) -> (Tensor, Tensor)",
    _synthesize_negatives_backward,
    _synthesize_negatives_backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.pairs = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad: Tensor):
    grad_z, grad_gate = _backward(grad, *ctx.saved_tensors, ctx.pairs, ctx.needs_input_grad[2])
    needs = ctx.needs_input_grad
    return grad_z if needs[0] else None, None, grad_gate if needs[2] else None, None, None, None


define_gradient("synthesize_negatives", _gradient, _setup_context)
define_autocast("synthesize_negatives")


def synthesize_negatives(
    embeddings: Tensor,
    labels: Tensor,
    gate: Tensor,
    *,
    kappa: float | Tensor,
    mix: Tensor,
    layout: BatchLayout | None = None,
) -> Tensor:
    """Synthetic hard negatives of every sample and class from given channel gates, (15)-(18) of docs/maths.md.

    The dense drop-in form: the gates are the caller's. Inside the losses the same formulas run on tiles.

    Args:
        embeddings: (N, D) floating. labels: (N,) integers in any order, on the same device or on the CPU.
        gate: (N, N, D) weights in [0, 1], anchor first, same dtype as the embeddings.
        kappa: hardness of (16), one number in [0, 1]: 0 keeps a negative at the positive's distance, 1 leaves it to
            the gate.
        mix: (K, K - 1) numbers in [0, 1] of (18), K the largest number of samples of a class in the batch.
        layout: the batch's classes, known on the host: spares waiting for labels on a GPU.

    Returns:
        (N, M, D) in the embeddings' dtype: for each sample and each of the M classes, by first appearance, one
        synthetic negative; the own column as (17) gives it. Rows of samples that are alone in their class are 0.
        Differentiable in embeddings and gate; kappa and mix are constants.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, each with the argument's name.

    Memory: the result, and in the backward the gradient of the gate, O(tile) beside them.
    """
    op = "synthesize_negatives"
    check_float_matrix(op, "embeddings", embeddings)
    check_channels(op, "embeddings", embeddings)
    n, width = embeddings.shape
    check_labels(op, labels, n)
    check_float_matrix(op, "gate", gate, dims=3, shape="(N, N, D)")
    if tuple(gate.shape) != (n, n, width):
        raise ValueError(f"{op}: gate has shape {tuple(gate.shape)}; expected (N, N, D) = ({n}, {n}, {width})")
    check_same_dtype(op, embeddings=embeddings, gate=gate)
    check_same_device(op, embeddings=embeddings, gate=gate)
    check_kappa(op, kappa)
    check_mix_tensor(op, mix)
    labels = host_labels(op, labels, layout)
    kappa = torch.as_tensor(kappa, dtype=torch.float64).reshape(())
    if in_reference_mode():
        check_mix(op, mix, int(torch.unique(labels, return_counts=True)[1].max()) if n else 0)
        device = embeddings.device
        kappa, mix = sent(kappa, device), sent(mix, device)
        return reference.synthesize_negatives(embeddings, sent(labels, device), gate, kappa=kappa, mix=mix)
    return _forward(embeddings, labels, gate, kappa, mix, dense_pairs(embeddings.device))
