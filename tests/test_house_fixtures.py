"""The fixtures of conftest.py do what they say: NaN in uninitialized memory, the same seed for every test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine
from tests import conftest


def test_uninitialized_memory_is_nan():
    source = torch.zeros(3, 4)
    tensors = [
        torch.empty(64),
        torch.empty(64, dtype=torch.float64),
        torch.empty(64, dtype=torch.bfloat16),
        torch.empty_like(source),
        source.new_empty(5),
        torch.empty_strided((2, 3), (3, 1)),
        torch.zeros(2).resize_(64)[2:],
    ]
    assert all(tensor.isnan().all() for tensor in tensors)
    assert (torch.empty(64, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_row_that_nobody_writes_is_caught():
    x = torch.zeros(4, 3)
    doubled = torch.empty_like(x)
    doubled[:-1] = x[:-1] * 2
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(doubled, x * 2)


def reported(*, failed=True, marked=True):
    """What becomes of the report of a test, through the hook that watches the GPU."""
    item = SimpleNamespace(nodeid="test_it", get_closest_marker=lambda name: marked or None)
    report = SimpleNamespace(failed=failed, longreprtext="what failed")
    hook = conftest.pytest_runtest_makereport(item, None)
    next(hook)
    with pytest.raises(StopIteration) as stopped:
        hook.send(report)
    return stopped.value.value is report


def test_a_test_that_loses_the_gpu_ends_the_process_under_its_own_name(monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(machine, "gpu_error", lambda: "")
    assert reported()
    monkeypatch.setattr(machine, "gpu_error", lambda: "an illegal memory access")
    assert reported(failed=False) and reported(marked=False)
    with pytest.raises(pytest.exit.Exception, match="test_it: the GPU is lost: an illegal memory access\nwhat failed"):
        reported()
    # A worker of pytest-xdist has to crash, so that the others go on and it is replaced.
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Left, match="1"):
        reported()
    assert "test_it: what failed\nthe GPU is lost: an illegal memory access" in capsys.readouterr().err


@pytest.mark.raw_memory
def test_raw_memory_turns_the_fill_off():
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("position", ["first", "second"])
def test_every_test_starts_from_the_same_seed(position):
    expected = torch.rand(3, generator=torch.Generator().manual_seed(20250101))
    assert torch.equal(torch.rand(3), expected), f"the {position} test saw another state"
