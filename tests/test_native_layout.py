"""Compiled class layout: every bit of the torch path, for labels of any kind in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcng.ops import layout, native
from gcng.reference import layout as definition
from tests.run_case import equal_bits

pytestmark = pytest.mark.skipif(native.cpu_status().path is None, reason=f"no C++ kernels: {native.cpu_status().cause}")

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_layout(labels: torch.Tensor) -> None:
    """class_major and the op behind it: compiled equals torch."""
    ours = (*layout._class_layout(labels), *layout.class_major(labels))
    with native.disabled():
        theirs = (*layout._class_layout(labels), *layout.class_major(labels))
    assert all(equal_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=3000)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_layout_has_the_bits_of_torch(seed):
    draw = np.random.default_rng(seed)
    n, num_labels = int(draw.choice([0, 1, 2, 5, 17, 64])), int(draw.integers(1, 40))
    pool = draw.integers(-(2**62), 2**62, num_labels) if draw.random() < 0.5 else np.arange(num_labels) << 32
    labels = torch.from_numpy(draw.choice(pool, n)).to(INTEGERS[seed % len(INTEGERS)])
    check_layout(labels)


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(1000, dtype=torch.int64),
        torch.arange(1000).flip(0),
        torch.arange(5000) * 2**40,  # equal low bits: one place of the table for a weak hash
        torch.tensor([2**63 - 1, -(2**63), 0, -1, 2**63 - 1, -(2**63)]),
        (torch.arange(3000) % 7)[::3],
    ],
    ids=["one class", "all different", "equal low bits", "ends of the range", "strided"],
)
def test_labels_that_can_break_a_table(labels):
    check_layout(labels)


def test_the_order_is_that_of_the_definition():
    labels = torch.randint(0, 12, (60,))
    order, class_index, rank, class_start = layout._class_layout(labels)
    expected = definition.class_layout(labels)
    assert torch.equal(order, torch.cat(expected.members))
    assert torch.equal(class_index, expected.class_index[order]) and torch.equal(rank, expected.rank[order])
    counts = torch.tensor([len(members) for members in expected.members])
    assert torch.equal(class_start[: len(counts) + 1], torch.cat([torch.zeros(1), counts.cumsum(0)]).long())


def test_wrong_outputs_are_an_error_and_not_a_wild_pointer():
    vectors = [torch.zeros(3, dtype=torch.int64) for _ in range(5)]
    with pytest.raises(RuntimeError, match="class_start has size 3 in dimension 0; expected 4"):
        native.cpu().class_layout(*vectors)
