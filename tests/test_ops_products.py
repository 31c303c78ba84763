"""Products over pairs: both libraries of the CPU give the same numbers, to about the same digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gcng.ops import products

SIZES = {"shortest sum": (700, 256, 512), "up": (300, 512, 2048), "longest sum": (130, 1024, 1024)}


def _operands(name: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, columns = SIZES[name]
    draw = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, length, generator=draw),
        torch.randn(columns, length, generator=draw),
        torch.randn(columns, generator=draw),
    )


def _no_room() -> Tensor:
    raise AssertionError("asked for room although oneDNN brings its own")


@pytest.fixture
def onednn() -> None:
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.usefixtures("onednn")
def test_onednn_gives_what_mm_gives(name: str) -> None:
    x, weight, bias = _operands(name)
    room = lambda: x.new_empty(x.shape[0], weight.shape[0])  # noqa: E731
    transposed = weight.T.contiguous()
    ours = products.linear(x, weight, bias, _no_room), products.product(x, transposed, _no_room)
    with torch.backends.mkldnn.flags(enabled=False):
        theirs = products.linear(x, weight, bias, room), products.product(x, transposed, room)
    truth = x.double() @ weight.double().T
    for got, standard, exact in zip(ours, theirs, (truth + bias, truth), strict=True):
        error, eager = ((value.double() - exact).norm() for value in (got, standard))
        assert 0 < error <= 2 * eager


@pytest.mark.parametrize("name", ("short sum", "long sum", "few rows", "float64", "wider result"))
def test_the_rest_goes_to_room(name: str) -> None:
    length = {"short sum": 128, "long sum": 1040}.get(name, 512)
    dtype = {"float64": torch.float64, "wider result": torch.bfloat16}.get(name, torch.float32)
    rows = 8 if name == "few rows" else 600
    x, weight = torch.randn(rows, length, dtype=dtype), torch.randn(640, length, dtype=dtype)
    wide = torch.float32 if name == "wider result" else dtype
    out = torch.full((x.shape[0], 640), torch.nan, dtype=wide)
    assert products.product(x, weight.T, lambda: out) is out
    assert torch.allclose(out.double(), x.double() @ weight.double().T, atol=1e-3)
    if name != "wider result":
        assert products.linear(x, weight, torch.ones(640, dtype=dtype), lambda: out) is out
        assert torch.allclose(out.double(), x.double() @ weight.double().T + 1, atol=1e-3)


def test_a_torch_without_the_op_multiplies_with_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    x, weight, bias = _operands("up")
    out = torch.empty(x.shape[0], weight.shape[0])
    assert products.linear(x, weight, bias, lambda: out) is out
