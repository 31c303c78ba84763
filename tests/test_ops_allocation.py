"""An allocation that fails is tried once more, with half as much: what counts as one, and what is given back before."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from gcng.ops import allocation, nearest, recycled, streamed_logits
from gcng.ops.allocation import is_allocation_failure, tried_twice
from gcng.ops.pair_field import PairField, with_smaller_tiles
from gcng.ops.triton_path import triton_everywhere

HERE, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAILURES = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("gcng: the synthesis kernel gcng_pairs was not launched on cuda:0: CUDA error 2"),
)
OTHERS = (
    RuntimeError("gcng: the synthesis kernel gcng_pairs was not launched on cuda:0: CUDA error 209"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    ValueError("out of memory"),
)


def failing_once(error: BaseException, seen: list[int]):
    """A run that fails the first time, and notes by how much it was to be smaller."""

    def run(shrink: int) -> int:
        seen.append(shrink)
        if len(seen) == 1:
            raise error
        return shrink

    return run


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_every_text_of_an_allocation_failure_is_answered_once(error):
    seen: list[int] = []
    assert is_allocation_failure(error)
    assert with_smaller_tiles(failing_once(error, seen), 64, PairField(torch.ones(4, 3), False, 4, ())) == 32
    assert seen == [64, 32]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_the_callers(error):
    seen: list[int] = []
    assert not is_allocation_failure(error)
    with pytest.raises(type(error)) as raised:
        tried_twice(failing_once(error, seen), HERE)
    assert raised.value is error and seen == [1]


def test_a_second_failure_is_the_callers():
    def run(shrink: int) -> None:
        raise torch.OutOfMemoryError(f"at {shrink}")

    message = r"gcng: not enough memory on cpu, neither for tiles of 64 .* \(at 2\)"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        tried_twice(run, HERE, size="tiles of 64 pairs")


@pytest.mark.parametrize(("capturing", "emptied"), [(False, 1), (True, 0)])
def test_the_cache_of_a_gpu_is_emptied_unless_a_graph_is_captured(capturing, emptied, monkeypatch):
    calls = []
    monkeypatch.setattr(allocation, "capturing", lambda device: capturing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    assert tried_twice(failing_once(torch.OutOfMemoryError(), []), GPU) == 2
    assert len(calls) == emptied
    assert tried_twice(lambda shrink: shrink, GPU) == 1 and len(calls) == emptied


def test_what_waits_on_the_cpu_is_given_back_and_so_is_the_first_try(monkeypatch):
    waiting = np.empty(64, np.uint8)
    monkeypatch.setattr(recycled, "_free", {64: [waiting]})
    held: list[weakref.ref] = []

    def run(shrink: int) -> int:
        if held:
            assert held[0]() is None, "a tensor of the first try is still alive"
            assert not recycled._free
            return shrink
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        raise RuntimeError("std::bad_alloc")

    assert tried_twice(run, HERE) == 2


def test_panels_of_logits_and_of_rows_are_halved_once(monkeypatch):
    """On meta tensors, with launchers that fail: what they are called with the second time."""
    pytest.importorskip("triton", exc_type=ImportError)
    from gcng.kernels import class_cross_entropy
    from gcng.kernels import nearest as nearest_kernels

    calls = []

    def fails_first(*arguments, shrink, **options):
        calls.append(shrink)
        if shrink == 1:
            raise torch.OutOfMemoryError
        return "done"

    monkeypatch.setattr(class_cross_entropy, "streamed_logit_gradient", fails_first)
    monkeypatch.setattr(nearest_kernels, "nearest_rows", fails_first)
    x = torch.empty(8, 4, device="meta")
    with triton_everywhere():
        gradient = streamed_logits.streamed_logit_gradient(x, x, None, x, x, x, need_weight=True)
        assert gradient == "done" and calls == [1, 2]
        assert nearest.nearest_rows(x, x, 3, centered=True) == "done" and calls == [1, 2, 1, 2]


def test_a_shrunken_panel_is_half_as_large():
    pytest.importorskip("triton", exc_type=ImportError)
    from gcng.kernels import nearest as nearest_kernels
    from gcng.kernels.class_cross_entropy import logit_tile, panel_shape, streamed_logit_gradient
    from gcng.kernels.launch import recorded_launches

    for width in (64, 512):
        tile = logit_tile(torch.bfloat16, width, False)
        whole, half = (np.prod(panel_shape(2**15, 2**17, width, tile, shrink)) for shrink in (1, 2))
        assert half == whole // 2
    rows = torch.empty(2**12, 512, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(2**14, 512, device="meta", dtype=torch.bfloat16)
    target = torch.empty(2**12, device="meta", dtype=torch.int64)
    scale, lse = torch.empty(2**12, device="meta"), torch.empty(2**12, device="meta", dtype=torch.float64)
    for shrink in (1, 2, 4):
        with recorded_launches(90) as recording:
            streamed_logit_gradient(rows, weight, None, target, lse, scale, need_weight=True, shrink=shrink)
        assert len(recording.launches) == 2 * shrink
    wide = torch.empty(2**10, 2**14, device="meta")
    for shrink in (1, 2):
        with recorded_launches(90) as recording:
            nearest_kernels.nearest_rows(wide, wide, 3, centered=False, shrink=shrink)
        names = [launch.kernel.fn.__name__ for launch in recording.launches]
        assert names.count("nearest_kernel") == shrink**2
