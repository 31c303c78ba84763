"""The public ops with their Triton kernels, in Triton's interpreter: the wiring from function to launcher and back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

import gcng
from gcng import functional as F
from gcng.ops.triton_path import triton_everywhere
from tests.closeness import assert_close_to_truth

pytestmark = pytest.mark.interpreter

N, D, H = 21, 24, 2


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(N, H, D // H, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    x, weight = (torch.randn(size, D, generator=generator, dtype=torch.float64).to(dtype) for size in (N, 33))
    return dict(q=q, k=k, v=v, x=x, weight=weight, labels=torch.arange(N) % 5, target=torch.arange(N) * 7 % 33)


CALLS = {
    "center_normalize": (lambda t: F.center_normalize(t["x"]), ("x",)),
    "negative_attention": (lambda t: F.negative_attention(t["q"], t["k"], t["v"], t["labels"]), ("q", "k", "v")),
    "linear_cross_entropy": (lambda t: F.linear_cross_entropy(t["x"], t["weight"], t["target"]), ("x", "weight")),
}


def _run(name: str, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    call, leaves = CALLS[name]
    tensors = tensors | {leaf: tensors[leaf].clone().requires_grad_() for leaf in leaves}
    out = call(tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [tensors[leaf] for leaf in leaves], upstream)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_op_and_gradients(name: str, dtype: torch.dtype) -> None:
    tensors = _inputs(dtype)
    with triton_everywhere():
        ours = _run(name, tensors)
    with gcng.reference_mode():
        baseline = _run(name, tensors)
        wide = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}
        truth = _run(name, wide)
    for index, (x, expected, eager) in enumerate(zip(ours, truth, baseline, strict=True)):
        assert_close_to_truth(f"{name} {index}", x, expected, eager)


def test_neighbors() -> None:
    tensors = _inputs()
    with triton_everywhere():
        values, indices = F.correlation_topk(tensors["x"], 4, labels=tensors["labels"])
        near, where = F.knn(tensors["x"], k=3)
    expected_values, expected = F.correlation_topk(tensors["x"], 4, labels=tensors["labels"])
    assert torch.equal(indices, expected) and torch.equal(values, expected_values)
    expected_values, expected = F.knn(tensors["x"], k=3)
    assert torch.equal(where, expected) and torch.equal(near, expected_values)
