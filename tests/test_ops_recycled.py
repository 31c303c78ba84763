"""Packed storage that is used again: never while somebody holds it, always where it fits."""

from __future__ import annotations

import gc
import time

import pytest
import torch

import gcng
from gcng.ops import recycled
from gcng.ops.recycled import packed_storage

N, WIDTH = 8, 4
SIZE = 36 * WIDTH * 4


@pytest.fixture(autouse=True)
def small_blocks_too(monkeypatch: pytest.MonkeyPatch):
    gcng.empty_cache()
    monkeypatch.setattr(recycled, "FEWEST_BYTES", 64)
    yield
    gcng.empty_cache()


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_a_tensor_that_is_gone_leaves_its_memory_to_the_next() -> None:
    like = torch.zeros(1)
    first = packed_storage(like, N, WIDTH)
    assert first.shape == (36, WIDTH) and first.dtype == torch.float32 and first.is_contiguous()
    assert address(first) % 64 == 0
    place = address(first)
    second = packed_storage(like, N, WIDTH)
    assert address(second) != place, "the first is still in use"
    del first
    assert address(packed_storage(like, N, WIDTH)) == place


def test_a_view_and_a_graph_hold_it() -> None:
    like = torch.zeros(1)
    x = packed_storage(like, N, WIDTH).fill_(2.0)
    place, weight = address(x), torch.ones(WIDTH, requires_grad=True)
    product = (x * weight).sum()  # saves x
    part = x[3:5]
    del x
    other = packed_storage(like, N, WIDTH).fill_(7.0)
    assert address(other) != place
    product.backward()
    assert torch.equal(weight.grad, torch.full((WIDTH,), 72.0)) and bool((part == 2).all())
    del part, product
    assert address(packed_storage(like, N, WIDTH)) == place


def test_another_size_and_empty_cache_give_back_what_waits() -> None:
    like = torch.zeros(1)
    packed_storage(like, N, WIDTH)
    assert list(recycled._free) == [SIZE]
    larger = packed_storage(like, N, 2 * WIDTH)
    assert not recycled._free
    del larger
    assert list(recycled._free) == [2 * SIZE]
    gcng.empty_cache()
    assert not recycled._free


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_dtypes_share_memory_by_size(dtype: torch.dtype) -> None:
    width = WIDTH if dtype == torch.float64 else 2 * WIDTH
    wide = packed_storage(torch.zeros(1, dtype=dtype), N, width)
    assert wide.dtype == dtype and wide.shape == (36, width)
    wide.fill_(1.5)
    assert float(wide.sum()) == 36 * width * 1.5


def test_what_is_small_or_16_bit_comes_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_storage(torch.zeros(1, dtype=torch.bfloat16), N, WIDTH)
    packed_storage(torch.zeros(1), 0, WIDTH)
    monkeypatch.setattr(recycled, "FEWEST_BYTES", 2**25)
    packed_storage(torch.zeros(1), N, WIDTH)
    assert not recycled._free


def test_a_garbage_collection_in_the_middle_of_a_request_gives_back_without_waiting() -> None:
    class Cycle:
        pass

    like, stop = torch.zeros(1), time.monotonic() + 5
    found = gc.get_threshold()
    gc.set_threshold(1, 1, 1)  # a collection at nearly every allocation of a container
    try:
        for width in [*range(2, 40), *range(40, 2, -1)]:
            cycle = Cycle()
            cycle.own, cycle.held = cycle, packed_storage(like, N, width)
            del cycle
            assert time.monotonic() < stop
    finally:
        gc.set_threshold(*found)


def test_steps_in_recycled_memory_repeat_their_bits() -> None:
    torch.manual_seed(0)
    criterion = gcng.losses.GCAHNGLoss(16, 5, dropout=0.0)
    z, labels = torch.randn(12, 16), torch.arange(4).repeat(3)
    mix, results = torch.rand(3, 2), []
    for _ in range(3):
        x = z.clone().requires_grad_()
        criterion.generator_terms(x, labels, mix=mix).total.backward()
        results.append([p.grad.clone() for p in criterion.graph.parameters() if p.grad is not None])
        criterion.zero_grad(set_to_none=True)
        for waiting in recycled._free.values():
            for buffer in waiting:
                buffer[:] = 255  # NaN: nothing of it may be read before it is written
    assert recycled._free, "the step used none of it"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
