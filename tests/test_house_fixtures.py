"""The fixtures of conftest.py do what they say: NaN in uninitialized memory, the same seed for every test."""

from __future__ import annotations

import pytest
import torch


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


@pytest.mark.raw_memory
def test_raw_memory_turns_the_fill_off():
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("position", ["first", "second"])
def test_every_test_starts_from_the_same_seed(position):
    expected = torch.rand(3, generator=torch.Generator().manual_seed(20250101))
    assert torch.equal(torch.rand(3), expected), f"the {position} test saw another state"
