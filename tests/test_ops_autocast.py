"""What autocast makes of the operands of products, on a GPU that is pretended: dtypes of what would be launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from gcng import functional
from gcng.kernels.launch import RecordedLaunch, recorded_launches
from gcng.losses import n_pair
from gcng.ops import attention, class_cross_entropy
from gcng.ops.layout import class_major_beside
from gcng.ops.triton_path import triton_everywhere

BODIES = {
    "gcng::linear_cross_entropy": class_cross_entropy._linear_cross_entropy,
    "gcng::linear_cross_entropy_backward": class_cross_entropy._linear_cross_entropy_backward,
    "gcng::negative_attention": attention._negative_attention,
    "gcng::negative_attention_backward": attention._negative_attention_backward,
}
NARROW = (torch.bfloat16, torch.float16)


def without_numbers(x: object) -> object:
    """A meta tensor in the place of a tensor, whatever its device."""
    return torch.empty(tuple(x.shape), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


class Bodies(TorchDispatchMode):
    """Runs the implementations of ops on meta tensors of the same dtypes; a fake would only tell shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in BODIES:
            with unset_fake_temporarily():
                BODIES[func.name()](*map(without_numbers, args))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches() -> Iterator[list[RecordedLaunch]]:
    """CUDA tensors without a GPU, and the launches on them, which are kept instead of started."""
    with FakeTensorMode(), recorded_launches(90) as recording, triton_everywhere(), Bodies():
        yield recording.launches


@contextlib.contextmanager
def autocast_on_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)``, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True), torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0]), torch.set_autocast_dtype("cuda", before[1])


def dtypes(launches: list[RecordedLaunch], *names: str) -> set[torch.dtype]:
    """Of the arguments of these names, in all launches that have one."""
    names = tuple(f"{name}_ptr" for name in names)
    return {launch.arguments[name].dtype for launch in launches for name in names if name in launch.arguments}


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("given", [torch.float32, *NARROW])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_classifier_multiplies_in_the_dtype_of_autocast(launches, dtype, given):
    x, weight, bias = on_gpu(64, 32, dtype=given), on_gpu(100, 32), on_gpu(100)
    target = on_gpu(64, dtype=torch.int64)
    with autocast_on_a_gpu(dtype):
        losses = functional.linear_cross_entropy(x, weight, target, bias=bias, reduction="none")
    assert dtypes(launches, "rows", "weight") == {dtype} and losses.dtype == torch.float32
    assert dtypes(launches, "maximum", "total", "target_logit") == {torch.float32}
    launches.clear()
    functional.linear_cross_entropy(x.float(), weight, target, bias=bias)
    assert dtypes(launches, "rows", "weight") == {torch.float32}


@pytest.mark.parametrize("given", [torch.float32, *NARROW])
@pytest.mark.parametrize("dtype", NARROW)
def test_attention_multiplies_in_the_dtype_of_autocast(launches, dtype, given):
    q, k, v = on_gpu(64, 2, 32, dtype=given), on_gpu(64, 2, 32), on_gpu(64, 2, 32)
    labels = on_gpu(64, dtype=torch.int64)
    with autocast_on_a_gpu(dtype):
        out = functional.negative_attention(q, k, v, labels)
    assert out.dtype == dtype
    assert dtypes(launches, "q", "k", "v", "out") == {dtype} and dtypes(launches, "shares") == {torch.float32}
    launches.clear()
    functional.negative_attention(q.float(), k, v, labels)
    assert dtypes(launches, "q", "k", "v") == {torch.float32}


def test_exact_numbers_stay_float64(launches):
    x, weight = on_gpu(8, 4, dtype=torch.float64), on_gpu(9, 4, dtype=torch.float64)
    target = on_gpu(8, dtype=torch.int64)
    with autocast_on_a_gpu(torch.bfloat16):
        functional.linear_cross_entropy(x, weight, target)
    assert dtypes(launches, "rows", "weight") == {torch.float64}


def test_the_plain_n_pair_loss_stays_outside_of_autocast(monkeypatch):
    seen = []

    def noted(x, weight, target):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, weight.dtype))
        return functional.linear_cross_entropy(x, weight, target)

    monkeypatch.setattr(n_pair, "linear_cross_entropy", noted)
    layout = class_major_beside("n_pair", torch.arange(8).repeat_interleave(2), None, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        n_pair.n_pair(torch.randn(16, 32, dtype=torch.bfloat16), layout, l2_reg=0.0)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, torch.float32, torch.float32)]
