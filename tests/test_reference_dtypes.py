"""gcng.reference in 16 bits: values and gradients of float64 on the rounded inputs, to the rounding of the dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gcng
from gcng import reference
from tests.test_losses import BATCHES, batch_of, make_criterion, run

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result in a dtype and the gradients of all inputs, for one random upstream gradient."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = normal(*out.shape, seed=9) / max(out.numel(), 1) ** 0.5
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check_dtype(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, roundings: float) -> None:
    """Within ``roundings`` units of the dtype's precision of float64 on the same inputs, in the norm of each array."""
    inputs = [x.to(dtype).double() for x in inputs]
    ours, truth = (with_gradients(function, inputs, kind) for kind in (dtype, torch.float64))
    for index, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.isfinite().all(), index
        lost = (a.double() - b).norm() / b.norm()
        assert lost <= roundings * torch.finfo(dtype).eps, (index, lost.item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (1.0, 300.0, 1e-3))
def test_center_normalize(scale: float, dtype: torch.dtype) -> None:
    # The squares of 300 are beyond float16; those of 1e-3 vanish in it.
    x = scale * normal(7, 16)
    x[3] = 0.5 * scale
    # Gradients of small rows are large: what is compared is d / d (x / scale).
    check_dtype(lambda x: reference.center_normalize(x * scale), [x / scale], dtype, 8)
    unit = reference.center_normalize(x.to(dtype))
    length = torch.linalg.vector_norm(unit.double(), dim=-1)
    assert unit[3].eq(0).all() and (length[:3] - 1).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_synthesize_negatives(dtype: torch.dtype) -> None:
    mix = torch.rand(3, 2, generator=torch.Generator().manual_seed(2)).to(dtype).double()

    def synthesis(z: Tensor, gate: Tensor) -> Tensor:
        return reference.synthesize_negatives(z, LABELS, gate, kappa=0.5, mix=mix.to(z.dtype))

    check_dtype(synthesis, [normal(7, 8), torch.sigmoid(normal(7, 7, 8, seed=1))], dtype, 16)


def test_synthesis_with_equal_positives_in_float16() -> None:
    z = normal(6, 8)
    z[3] = z[0]  # the positive at distance 1e-6, where 1 / distance is beyond float16
    z = z.half().requires_grad_()
    gate = torch.sigmoid(normal(6, 6, 8, seed=1)).half().requires_grad_()
    syn = reference.synthesize_negatives(z, LABELS[:6], gate, kappa=0.5, mix=torch.full((2, 1), 0.5).half())
    grads = torch.autograd.grad(syn, (z, gate), normal(6, 3, 8, seed=2).half())
    assert all(x.isfinite().all() for x in (syn, *grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses(dtype: torch.dtype) -> None:
    # 2^18 numbers: their squares sum to more than float16 holds.
    z, syn, gate = 2 * normal(7, 8), normal(7, 3, 8, seed=1), torch.sigmoid(normal(40, 40, 200, seed=2))
    weight, bias = normal(5, 8, seed=3), normal(5, seed=4)
    many = normal(64, 4096, seed=5)
    losses = reference.losses
    check_dtype(lambda z: losses.n_pair(z, LABELS), [z], dtype, 8)
    check_dtype(lambda z: losses.n_pair(z, torch.arange(64), l2_reg=1.0), [many], dtype, 8)
    check_dtype(lambda z, syn: losses.synthetic_n_pair(z, LABELS, syn), [z, syn], dtype, 8)
    check_dtype(lambda syn, w, b: losses.class_cross_entropy(LABELS, syn, w, b), [syn, weight, bias], dtype, 8)
    check_dtype(lambda z, syn: losses.similarity(z, LABELS, syn), [z, syn], dtype, 8)
    check_dtype(lambda gate: 2**16 * losses.diversity(gate), [gate], dtype, 8)  # gradients beyond subnormal
    assert losses.n_pair(z.to(dtype), LABELS).dtype == losses.diversity(gate.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_criterion_in_reference_mode(dtype: torch.dtype) -> None:
    z, y, mix = batch_of(BATCHES["sample-major 3 x 3"])
    narrow = make_criterion(dropout=0.0, dtype=dtype)
    wide = copy.deepcopy(narrow).double()
    with gcng.reference_mode():
        terms, grad, grads = run(narrow, z.to(dtype), y, mix.float())
        truth, grad_truth, _ = run(wide, z.to(dtype).double(), y, mix)
        metric = narrow.metric_terms(z.to(dtype), y, mix=mix.float())
        generator = narrow.generator_terms(z.to(dtype), y, mix=mix.float())
    eps = torch.finfo(dtype).eps
    assert all(x.dtype == torch.float32 for x in (*metric, *generator)) and grad.dtype == dtype
    assert ((terms - truth).abs() <= 16 * eps * truth.abs().clamp(min=1)).all()
    assert (grad.double() - grad_truth).norm() <= 16 * eps * grad_truth.norm()
    assert all(g is None or g.isfinite().all() for g in grads.values())
