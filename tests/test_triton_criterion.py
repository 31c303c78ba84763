"""The whole criterion as it runs on a GPU, in Triton's interpreter: every op and every pass in Triton, all dtypes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

import gcng
from gcng.ops.dispatch import forced_kernels
from gcng.ops.triton_pair_kernels import TritonPairKernels
from gcng.ops.triton_path import triton_everywhere
from gcng.ops.triton_synthesis_kernels import TritonSynthesisKernels

pytestmark = pytest.mark.interpreter

LABELS = torch.tensor([3, 1, 0, 1, 3, 2, 3])  # ragged, with two samples alone in their classes
WIDTH = 16


def _criterion(dtype: torch.dtype) -> gcng.losses.GCAHNGLoss:
    torch.manual_seed(3)
    criterion = gcng.losses.GCAHNGLoss(WIDTH, 7, dropout=0.2)
    for name, parameter in criterion.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.rand_like(parameter) - 0.1
        # What the 16-bit module holds, in every dtype.
        parameter.data = parameter.data.to(dtype).float()
    criterion.schedule.j_avg, criterion.schedule.j_gen = 1.5, 30.0
    return criterion


def _outcome(criterion: gcng.losses.GCAHNGLoss, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses and gradients of both phases, float64, by name."""
    found, mix = {}, torch.tensor([[0.3, 0.8], [0.6, 0.1], [0.9, 0.4]])
    for phase in ("metric", "generator"):
        criterion.zero_grad(set_to_none=True)
        z = z.detach().requires_grad_()
        generator = torch.Generator().manual_seed(9)
        terms = getattr(criterion, f"{phase}_terms")(z, LABELS, mix=mix, generator=generator)
        terms.total.backward()
        found |= {f"{phase} loss": terms.total.detach().double()}
        grads = {"z": z.grad} | {name: p.grad for name, p in criterion.named_parameters()}
        # Mathematically 0: the bias of a key shifts both logits of a pair alike.
        skipped = [name for name in grads if name.startswith("graph.edge_layers") and name.endswith("key.bias")]
        found |= {f"{phase} {k}": g.double() for k, g in grads.items() if g is not None and k not in skipped}
    return found


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_loses_no_more_accuracy_than_the_definition(dtype: torch.dtype) -> None:
    z = torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    with triton_everywhere(), forced_kernels(TritonPairKernels(), TritonSynthesisKernels()):
        ours = _outcome(_criterion(dtype).to(dtype), z.to(dtype))
    with gcng.reference_mode():
        eager = _outcome(_criterion(dtype).to(dtype), z.to(dtype))
        truth = _outcome(_criterion(dtype).double(), z.double())
    assert ours.keys() == truth.keys()

    def error(outcome: dict[str, torch.Tensor], name: str) -> float:
        return ((outcome[name] - truth[name]).norm() / truth[name].norm().clamp(min=1e-6)).item()

    # The factor of the benchmarks' gate: a whole iteration has a hundred arrays. Eager float16 overflows somewhere.
    floor = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    limits = {name: 4 * (0.0 if math.isnan(error(eager, name)) else error(eager, name)) + floor for name in truth}
    lost = {name: error(ours, name) for name in truth}
    assert not {name: (lost[name], limits[name]) for name in truth if not lost[name] <= limits[name]}
