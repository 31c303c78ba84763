"""The Triton kernels of (4)-(6), interpreted: the op's cases through the closeness gate, then their own corners."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import attention as kernels
from gcng.kernels.attention_tiles import AttentionSchedule, attention_schedules
from gcng.kernels.launch import recorded_launches
from gcng.ops import attention as op
from gcng.reference.attention import negative_attention as definition
from tests.closeness import assert_close_to_truth
from tests.mutants import OPERATIONS
from tests.op_checks import LargestTensor, outputs_and_gradients
from tests.run_case import equal_bits
from tests.triton_interpreter import check_isolated, spread_rows

pytestmark = pytest.mark.interpreter


class _Attention(torch.autograd.Function):
    """The launchers as an op of autograd, which is how gcng/ops calls them."""

    @staticmethod
    def forward(ctx, q, k, v, labels):
        out, shares = kernels.negative_attention_forward(q, k, v, labels)
        ctx.save_for_backward(q, k, v, labels, shares)
        return out

    @staticmethod
    def backward(ctx, grad):
        needed = list(ctx.needs_input_grad[:3])
        grads = kernels.negative_attention_backward(grad, *ctx.saved_tensors, needed)
        return *(x if need else None for x, need in zip(grads, needed, strict=True)), None


def attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    return _Attention.apply(q, k, v, labels)


OPERATION = replace(OPERATIONS["negative_attention"], function=attention)
# 16 bits and float64 run the same code: of them the cases that depend on digits, range or the mask are enough.
ALSO = {
    torch.float64: ("mxk, confident", "skewed"),
    torch.bfloat16: ("mxk, large",),
    torch.float16: ("mxk, large",),
}
LEFT_OUT = ("mxk_triple", "mxk, all_equal", "mxk, zero_row")  # the same code as others, for many seconds
RUNS = [
    (case, dtype)
    for case, dtype in OPERATION.all_runs()
    if case.name.startswith(ALSO.get(dtype, "")) and not case.name.startswith(LEFT_OUT)
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 receivers, 32 senders and 16 channels: every case has several, with remainders."""
    tile = AttentionSchedule(4, 1, 16, 32, 16, 16)
    monkeypatch.setattr(kernels, "attention_schedules", lambda *_: (tile, tile))


def random_inputs(n: int, heads: int = 2, width: int = 3, *, classes: int = 4, dtype=torch.float64) -> dict:
    q, k, v = torch.randn(3, n, heads, width, dtype=torch.float64).to(dtype).unbind(0)
    return {"q": q, "k": k, "v": v, "labels": torch.randint(classes, (n,))}


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=[f"{c.name}-{c.layout}-{c.upstream}-{d}" for c, d in RUNS])
def test_close_to_truth(case, dtype) -> None:
    """Values, gradients, repeats, layouts and untouched inputs in every data regime."""
    assert OPERATION.run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_truth_on_the_shipped_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows and channels than a shipped tile has, with remainders, in both directions."""
    monkeypatch.setattr(kernels, "attention_schedules", attention_schedules)
    inputs = random_inputs(68, 1, 40, classes=5, dtype=dtype)
    upstream = torch.randn(68, 1, 40, dtype=torch.float64).to(dtype)

    def results(function, kind: torch.dtype) -> list[Tensor]:
        leaves = [inputs[name].to(kind).requires_grad_() for name in "qkv"]
        out = function(*leaves, inputs["labels"])
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind))]

    each = results(attention, dtype), results(definition, torch.float64), results(definition, dtype)
    for name, ours, truth, baseline in zip(("out", "grad q", "grad k", "grad v"), *each, strict=True):
        assert assert_close_to_truth(name, ours, truth, baseline, dtype=dtype)


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("width", [1, 16, 64, 100, 512])
def test_schedules(arch: int, width: int) -> None:
    """Blocks that tl.dot can take, one order of channels for all kernels, nothing wider than the head needs."""
    for dtype in DTYPES:
        for precision in ("ieee", "tf32"):
            by_receiver, by_sender = attention_schedules(width, dtype, precision, arch)
            assert by_receiver.block_k == by_sender.block_k
            for size in (*by_receiver.tiles.values(), *by_sender.tiles.values()):
                assert size >= 16
                assert size & (size - 1) == 0
            assert by_receiver.block_d < 2 * max(16, width)
    # Two stages, or 64 channels of float32 a step, spill there, in the loop: tests/test_triton_compiles.py.
    assert attention_schedules(64, torch.bfloat16, "ieee", 90)[1].num_stages == 1
    assert attention_schedules(64, torch.float32, "tf32", 90)[1].block_k == 32


def test_gradients_alone_and_together() -> None:
    """Each of q, k, v alone gets the bits that it gets with the others."""
    inputs = random_inputs(40, dtype=torch.float32)
    q, k, v, labels = inputs.values()
    out, shares = kernels.negative_attention_forward(q, k, v, labels)
    together = kernels.negative_attention_backward(out, q, k, v, labels, shares, [True] * 3)
    for place in range(3):
        needed = [place == other for other in range(3)]
        alone = kernels.negative_attention_backward(out, q, k, v, labels, shares, needed)
        assert equal_bits(alone[place], together[place])
        assert [x.numel() for x in alone] == [
            x.numel() if need else 0 for x, need in zip(together, needed, strict=True)
        ]


def test_equals_the_blocked_path() -> None:
    """Output, shares and gradients of the op's own path in float64, with a head over four blocks of channels."""
    q, k, v, labels = random_inputs(37, 1, 50).values()
    ours, theirs = kernels.negative_attention_forward(q, k, v, labels), op._negative_attention(q, k, v, labels)
    grad = torch.randn_like(q)
    ours += kernels.negative_attention_backward(grad, q, k, v, labels, ours[1], [True] * 3)
    theirs += op._negative_attention_backward(grad, q, k, v, labels, theirs[1], [True] * 3)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_zero_logit_by_hand() -> None:
    """Two samples of different classes with score s: weight exp(s) / (1 + exp(s))."""
    q = torch.tensor([[[2.0]], [[3.0]]], dtype=torch.float64)
    k = torch.tensor([[[0.5]], [[-1.0]]], dtype=torch.float64)
    v = torch.tensor([[[10.0]], [[100.0]]], dtype=torch.float64)
    out = attention(q, k, v, torch.tensor([0, 1]))
    assert out[0].item() == pytest.approx(100 * math.exp(-2) / (1 + math.exp(-2)), rel=1e-14)
    assert out[1].item() == pytest.approx(10 * math.exp(1.5) / (1 + math.exp(1.5)), rel=1e-14)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_scores_stay_finite(magnitude: float) -> None:
    """Scores of +-1e8: the weights are 1 or 0, and the gradients are numbers."""
    q = torch.ones(4, 1, 1)
    v = torch.arange(4.0).reshape(4, 1, 1)
    inputs = {"q": q * abs(magnitude), "k": q * magnitude, "v": v, "labels": torch.tensor([0, 0, 1, 1])}
    out, *grads = outputs_and_gradients(attention, inputs)
    assert out.flatten().tolist() == ([2.5, 2.5, 0.5, 0.5] if magnitude > 0 else [0.0] * 4)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_gradient_of_scores_cancels_where_one_weight_is_one() -> None:
    """One sender has all the weight: dP - radial is 0 to the last digit, and so are the gradients of q and k."""
    n, width = 40, 24
    k = torch.randn(n, 1, width)
    labels = torch.arange(n)
    leader = (labels + 1) % n
    k = k / k.norm(dim=-1, keepdim=True)
    inputs = {"q": k[leader] * 3e4, "k": k, "v": torch.randn(n, 1, width) * 1e3, "labels": labels}
    _, grad_q, grad_k, grad_v = outputs_and_gradients(attention, inputs)
    assert not grad_q.any()
    assert not grad_k.any()
    assert grad_v.any(-1).all()


@pytest.mark.parametrize("n", [0, 1, 20])
def test_no_negatives_give_zero(n: int) -> None:
    for result in outputs_and_gradients(attention, random_inputs(n, classes=1)):
        assert result.shape == (n, 2, 3)
        assert not result.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_non_finite_at_masked_positions_has_no_effect(name: str, value: float) -> None:
    """A bad sample changes no bit of the samples of its class, and the rest is where the blocked path has it."""
    inputs = random_inputs(40, 1, classes=3)
    labels = inputs["labels"]
    bad = 5
    same = (labels == labels[bad]) & (torch.arange(40) != bad)
    assert same.any()
    clean = outputs_and_gradients(attention, inputs)
    spoiled = inputs | {name: inputs[name].clone()}
    spoiled[name][bad, :, 1] = value
    got = outputs_and_gradients(attention, spoiled)
    blocked = outputs_and_gradients(op.negative_attention, spoiled)
    for ours, theirs in zip(got, blocked, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert equal_bits(got[0][same], clean[0][same])
    assert equal_bits(got[1][same], clean[1][same])
    if name == "q":
        for ours, expected in zip(got, clean, strict=True):
            assert equal_bits(ours[same], expected[same])
    elif name == "v" or math.isnan(value):
        assert not got[0][labels != labels[bad]].isfinite().all(-1).any()


def test_non_finite_upstream_gradient_stays_in_its_row() -> None:
    inputs = random_inputs(40, classes=3)
    labels = inputs["labels"]
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    upstream = torch.randn(40, 2, 3, dtype=torch.float64)
    clean = torch.autograd.grad(attention(q, k, v, labels), (q, k, v), upstream)
    upstream[5, 0, 1] = math.nan
    grads = torch.autograd.grad(attention(q, k, v, labels), (q, k, v), upstream)
    same = (labels == labels[5]) & (torch.arange(40) != 5)
    for got, expected in zip(grads, clean, strict=True):
        assert equal_bits(got[same], expected[same])
        assert equal_bits(got[:, 1], expected[:, 1])  # the other head
    assert grads[2][labels != labels[5]][:, 0].isnan().all()


def test_large_labels_are_not_truncated() -> None:
    inputs = random_inputs(6)
    labels = torch.tensor([0, 2**32, 2**40, 0, 2**32, 2**40])
    expected = definition(**inputs | {"labels": labels})
    torch.testing.assert_close(attention(**inputs | {"labels": labels}), expected, rtol=1e-12, atol=1e-13)


def test_float16_gradients_beyond_its_range_inside() -> None:
    """dP of 1e5 and more, which float16 does not hold, in front of gradients that it does."""
    inputs = random_inputs(40, 1, 16, classes=20, dtype=torch.float16)
    inputs["q"] *= 0.05
    inputs["v"] *= 200
    grad = torch.randn(40, 1, 16).to(torch.float16) * 200
    q, k, v, labels = inputs.values()
    _, shares = kernels.negative_attention_forward(q, k, v, labels)
    got = kernels.negative_attention_backward(grad, q, k, v, labels, shares, [True, True, False])
    wide = [x.double() for x in (grad, q, k, v)]
    shares = kernels.negative_attention_forward(*wide[1:], labels)[1]
    exact = op._negative_attention_backward(*wide, labels, shares, [True, True, False])
    assert (wide[0] @ wide[3].transpose(1, 2)).abs().max() > 65504
    for ours, truth in zip(got[:2], exact[:2], strict=True):
        assert (ours.double() - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.raw_memory
def test_nothing_of_size_n_by_n_is_allocated() -> None:
    q, k, v = torch.empty(3, 16384, 2, 64, device="meta").unbind(0)
    labels = torch.empty(16384, dtype=torch.int64, device="meta")
    with recorded_launches(90) as recording, LargestTensor() as largest:
        out, shares = kernels.negative_attention_forward(q, k, v, labels)
        kernels.negative_attention_backward(out, q, k, v, labels, shares, [True] * 3)
    assert largest.elements == q.numel()
    assert len(recording.launches) == 4


GUARDED = """
import torch
from gcng.kernels import attention as kernels
from gcng.kernels.attention_tiles import AttentionSchedule
from tests.triton_interpreter import guard_allocations, guarded
tile = AttentionSchedule(4, 1, 16, 32, 16, 16)
kernels.attention_schedules = lambda *_: (tile, tile)
n, heads, width = {sizes}
q, k, v, grad = (torch.randn(n, heads, width) for _ in range(4))
labels = torch.randint(3, (n,))
def run(grad, q, k, v, labels):
    out, shares = kernels.negative_attention_forward(q, k, v, labels)
    return out, shares, *kernels.negative_attention_backward(grad, q, k, v, labels, shares, [True] * 3)
expected = run(grad, q, k, v, labels)
guard_allocations()
got = run(*map(guarded, (grad, q, k, v, labels)))
assert all(torch.equal(a, b) for a, b in zip(expected, got))
"""


@pytest.mark.parametrize("sizes", [(33, 1, 17), (5, 2, 3)])
def test_no_access_outside_the_tensors(sizes: tuple[int, int, int]) -> None:
    check_isolated(GUARDED.format(sizes=sizes))


def test_offsets_beyond_32_bits() -> None:
    """Rows spread over more than 2^31 elements, where the overflow check is on."""
    inputs = random_inputs(3, 1, 8, classes=2, dtype=torch.float16)
    labels = torch.tensor([0, 1, 0])
    near = [inputs[name] for name in "qkv"]
    far = [spread_rows(x[:, 0], 2**30 + 8 * place).unsqueeze(1) for place, x in enumerate(near, start=1)]
    expected, shares = kernels.negative_attention_forward(*near, labels)
    grads = kernels.negative_attention_backward(expected, *near, labels, shares, [True] * 3)
    got, far_shares = kernels.negative_attention_forward(*far, labels)
    assert equal_bits(got, expected)
    assert equal_bits(far_shares, shares)
    far_grads = kernels.negative_attention_backward(
        spread_rows(expected[:, 0], 2**30 + 40).unsqueeze(1), *far, labels, shares, [True] * 3
    )
    assert all(equal_bits(a, b) for a, b in zip(far_grads, grads, strict=True))
