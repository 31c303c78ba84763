"""synthesize_negatives, the dense drop-in form of (15)-(18)."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import gcng
from gcng import functional as F
from gcng.ops import synthesis
from tests.golden_data import load

BATCHES = ([0, 1, 2, 0, 1, 2], [5, 1, 5, 2, 2, 5, 1, 6], [1, 1, 1], [2], [0, 1, 1])


def make(labels: list[int], width: int = 5) -> tuple[torch.Tensor, ...]:
    """Embeddings, labels, gates and mixing numbers."""
    generator = torch.Generator().manual_seed(len(labels))
    y, n = torch.tensor(labels), len(labels)
    most = int(torch.bincount(y).max())
    z = torch.randn(n, width, generator=generator, dtype=torch.float64).requires_grad_()
    gate = torch.rand(n, n, width, generator=generator, dtype=torch.float64).requires_grad_()
    return z, y, gate, torch.rand(most, most - 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("block", (1, 9, 4096))
@pytest.mark.parametrize("labels", BATCHES, ids=str)
def test_equals_the_definition(labels: list[int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "DENSE_PAIRS", block)
    z, y, gate, mix = make(labels)
    ours = F.synthesize_negatives(z, y, gate, kappa=0.3, mix=mix)
    with gcng.reference_mode():
        truth = F.synthesize_negatives(z, y, gate, kappa=0.3, mix=mix)
    assert ours.shape == (len(labels), len(set(labels)), 5)
    assert torch.allclose(ours, truth, rtol=1e-13, atol=1e-14)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, expected = (torch.autograd.grad((x * grad).sum(), (z, gate)) for x in (ours, truth))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ("tiny", "odd", "first"))
def test_golden(name: str) -> None:
    golden = load(name)
    z, y, gate = golden.tensor("in/z"), golden.tensor("in/labels"), golden.tensor("out/gate")
    kappa = math.exp(-golden.cfg("alpha") / golden.scalar("in/j_avg"))
    ours = F.synthesize_negatives(z, y, gate, kappa=kappa, mix=golden.tensor("in/lam1"))
    k, m = golden.cfg("K"), golden.cfg("M")
    assert golden.error("out/syn1", ours.view(k, m, m, -1)) <= 1e-12


def test_rows_of_singletons_are_zero() -> None:
    z, y, gate, mix = make([0, 1, 1])
    ours = F.synthesize_negatives(z, y, gate, kappa=0.5, mix=mix)
    assert bool((ours[0] == 0).all()) and bool((ours[1:] != 0).all())
    grad_z, grad_gate = torch.autograd.grad(ours.sum(), (z, gate))
    assert bool((grad_gate[0] == 0).all()), "no anchor, no gradient of its gates"
    assert bool((grad_z[0] != 0).any()), "but it is a negative of the others"


def test_gradcheck_and_opcheck() -> None:
    z, y, gate, mix = make([0, 1, 0, 1, 2], width=3)
    kappa = torch.tensor(0.3, dtype=torch.float64)

    def run(z: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return F.synthesize_negatives(z, y, gate, kappa=kappa, mix=mix)

    assert torch.autograd.gradcheck(run, (z, gate))
    result = torch.library.opcheck(torch.ops.gcng.synthesize_negatives.default, (z, y, gate, kappa, mix, 4))
    assert set(result.values()) == {"SUCCESS"}


def test_only_asked_for_gradients() -> None:
    z, y, gate, mix = make([0, 1, 0, 1])
    F.synthesize_negatives(z.detach(), y, gate, kappa=0.2, mix=mix).square().sum().backward()
    assert z.grad is None and gate.grad is not None
    with pytest.raises(NotImplementedError, match="synthesize_negatives: double backward is not supported"):
        torch.autograd.grad(F.synthesize_negatives(z, y, gate, kappa=0.2, mix=mix).sum(), z, create_graph=True)


BAD = {
    "gate shape": (dict(gate=torch.rand(4, 3, 5)), ValueError, r"gate has shape \(4, 3, 5\); expected \(N, N, D\)"),
    "gate dims": (dict(gate=torch.rand(4, 4)), ValueError, r"gate must be \(N, N, D\), got shape \(4, 4\)"),
    "gate dtype": (dict(gate=torch.rand(4, 4, 5).half()), TypeError, "embeddings is torch.float32 but gate is torch.f"),
    "mix": (dict(mix=torch.rand(1, 1)), ValueError, r"mix has shape \(1, 1\); expected \(K, K - 1\) = \(2, 1\)"),
    "labels": (dict(labels=torch.zeros(3).long()), ValueError, r"labels has shape \(3,\); expected \(4,\)"),
    "no channels": (dict(embeddings=torch.rand(4, 0)), ValueError, "embeddings has no channels"),
    "kappa NaN": (dict(kappa=float("nan")), ValueError, r"kappa is nan; expected a hardness in \[0, 1\]"),
    "kappa negative": (dict(kappa=-0.1), ValueError, r"kappa is -0.1; expected a hardness in \[0, 1\]"),
    "kappa above 1": (dict(kappa=torch.tensor(3.0)), ValueError, r"kappa is 3.0; expected a hardness in \[0, 1\]"),
    "kappa shape": (dict(kappa=torch.rand(2)), ValueError, r"kappa has shape \(2,\) .*; expected one number"),
    "kappa text": (dict(kappa="hard"), TypeError, "kappa must be a number or a tensor of one number, got str"),
    "no mix": (dict(mix=None), TypeError, r"mix must be a \(K, K - 1\) torch.Tensor, got NoneType; draw it with"),
    "integer mix": (dict(mix=torch.ones(2, 1).long()), TypeError, "mix has dtype torch.int64; use a floating dtype"),
    "layout of another batch": (
        dict(layout=gcng.BatchLayout([0, 1, 1, 1])), ValueError, "layout belongs to other labels: at 2 it has 1, and",
    ),
    "layout": (dict(layout="2 x 2"), TypeError, "layout must be a gcng.BatchLayout, got str"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("reference", (False, True))
def test_bad_inputs(name: str, reference: bool) -> None:
    change, error, message = BAD[name]
    arguments = dict(embeddings=torch.rand(4, 5), labels=torch.tensor([0, 1, 0, 1]), gate=torch.rand(4, 4, 5))
    arguments |= dict(kappa=0.5, mix=torch.rand(2, 1)) | change
    with pytest.raises(error, match=message):
        if reference:
            with gcng.reference_mode():
                F.synthesize_negatives(**arguments)
        else:
            F.synthesize_negatives(**arguments)


def test_kappa_may_be_a_tensor_of_any_one_number_shape() -> None:
    z, y, gate, mix = make([0, 1, 0, 1])
    expected = F.synthesize_negatives(z, y, gate, kappa=0.25, mix=mix)
    for kappa in (torch.tensor(0.25), torch.tensor([[0.25]]).double(), torch.nn.Parameter(torch.full((1,), 0.25))):
        assert torch.equal(F.synthesize_negatives(z, y, gate, kappa=kappa, mix=mix), expected)
    for kappa in (0, 1, 1.0):
        assert F.synthesize_negatives(z, y, gate, kappa=kappa, mix=mix).isfinite().all()


@pytest.mark.parametrize("mode", (contextlib.nullcontext, gcng.reference_mode), ids=("op", "reference"))
def test_empty_batch(mode) -> None:
    z, y, gate = torch.rand(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64), torch.rand(0, 0, 5)
    with mode():
        out = F.synthesize_negatives(z, y, gate, kappa=0.5, mix=torch.rand(1, 0))
    assert out.shape == (0, 0, 5)
    assert torch.autograd.grad(out.sum(), z)[0].shape == (0, 5)
