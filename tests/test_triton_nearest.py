"""The Triton search for nearest rows, interpreted: bit for bit the blocked path, whatever the splits and panels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import nearest as kernels
from gcng.kernels.launch import recorded_launches
from gcng.ops import nearest as blocked
from tests.op_checks import LargestTensor
from tests.run_case import LAYOUTS, equal_bits, lay_out
from tests.triton_interpreter import check_isolated, spread_rows

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHIPPED = kernels.NearestSchedule.for_shape


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 queries, 32 references and 16 channels, two shares, panels of about 70 rows of 20 channels."""

    def for_shape(queries: int, references: int, k: int) -> kernels.NearestSchedule:
        return replace(SHIPPED(queries, references, k), block_i=16, block_j=32, block_d=16, splits=2)

    monkeypatch.setattr(kernels.NearestSchedule, "for_shape", for_shape)
    monkeypatch.setattr(kernels, "PANEL_ELEMENTS", 70 * 20)


def random_search(queries: int = 37, references: int = 101, width: int = 20, *, dtype=torch.float32) -> dict:
    """Arguments of a search; every third reference is the same row, one has no direction."""
    reference = torch.randn(references, width, dtype=torch.float64)
    reference[::3] = reference[:1].clone()
    reference[4:5] = 0.7
    return {
        "query": torch.randn(queries, width, dtype=torch.float64).to(dtype),
        "reference": reference.to(dtype),
        "self_index": torch.randint(max(references, 1), (queries,)),
        "labels": torch.randint(4, (queries,)),
        "reference_labels": torch.randint(4, (references,)),
    }


def check_equal_to_blocked(inputs: dict, k: int, *, centered: bool) -> tuple[Tensor, Tensor]:
    """Runs both paths: the indices must agree, and the similarities, NaN included."""
    values, indices = kernels.nearest_rows(**inputs, k=k, centered=centered)
    expected_values, expected = blocked.nearest_rows(**inputs, k=k, centered=centered)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    return values, indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
def test_equals_the_blocked_path(centered: bool, dtype: torch.dtype, small_tiles) -> None:
    """Several tiles, shares and panels in every direction, many ties, a row without direction, self and class."""
    check_equal_to_blocked(random_search(dtype=dtype), 7, centered=centered)


@pytest.mark.parametrize("given", [(), ("self_index",), ("labels", "reference_labels")])
@pytest.mark.parametrize("k", [1, 16, 150])
def test_equals_the_blocked_path_with_any_exclusion(given: tuple[str, ...], k: int, small_tiles) -> None:
    """Lists shorter than a tile, as long as their places, and longer than there are references."""
    inputs = random_search(17, 70)
    check_equal_to_blocked({name: inputs[name] for name in ("query", "reference", *given)}, k, centered=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_blocked_path_in_every_layout(layout: str, small_tiles) -> None:
    inputs = {name: lay_out(random_search(18, 40)[name], layout) for name in ("query", "reference")}
    check_equal_to_blocked(inputs, 3, centered=True)


@pytest.mark.parametrize("k", [8, 300, 512])
def test_equals_the_blocked_path_on_the_shipped_tiles(k: int) -> None:
    check_equal_to_blocked(random_search(70, 140, 40), k, centered=False)


@pytest.mark.parametrize("width", [1, 16, 513])
def test_equals_the_blocked_path_at_every_width(width: int) -> None:
    check_equal_to_blocked(random_search(9, 40, width), 5, centered=width > 1)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_huge_and_tiny_rows_keep_their_direction(scale: float) -> None:
    inputs = {name: x * scale for name, x in random_search(9, 20).items() if name in ("query", "reference")}
    values, _ = check_equal_to_blocked(inputs, 5, centered=False)
    assert bool((values != 0).all())


def test_the_same_for_every_split(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_search(20, 130)
    whole = kernels.nearest_rows(**inputs, k=9, centered=True)
    for splits, block_j, panel in ((1, 16, 130), (3, 32, 50), (5, 16, 97)):

        def for_shape(queries, references, k, splits=splits, block_j=block_j) -> kernels.NearestSchedule:
            return replace(SHIPPED(queries, references, k), block_i=16, block_j=block_j, block_d=16, splits=splits)

        monkeypatch.setattr(kernels.NearestSchedule, "for_shape", for_shape)
        monkeypatch.setattr(kernels, "PANEL_ELEMENTS", panel * 20)
        for a, b in zip(kernels.nearest_rows(**inputs, k=9, centered=True), whole, strict=True):
            assert equal_bits(a, b)


def test_ties_go_by_lower_index(small_tiles) -> None:
    """Channels in pairs x, -x: correlations are multiples of 1/4, most of them tied."""
    half = torch.randint(2, (60, 8), dtype=torch.float32) * 2 - 1
    x = torch.cat([half, -half], 1)
    values, indices = check_equal_to_blocked({"query": x, "reference": x}, 59, centered=True)
    tied = values[:, 1:] == values[:, :-1]
    assert tied.float().mean() > 0.5
    assert bool((indices[:, 1:] > indices[:, :-1])[tied].all())


def test_constant_rows_correlate_with_nothing(small_tiles) -> None:
    x = torch.randn(8, 5)
    x[3] = 0.7
    values, indices = check_equal_to_blocked(
        {"query": x, "reference": x, "self_index": torch.arange(8)}, 7, centered=True
    )
    assert values[3].tolist() == [0.0] * 7
    assert indices[3].tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_non_finite_rows_rank_first(small_tiles) -> None:
    """A NaN or an infinity makes all similarities of its row NaN; they rank first, where not left out."""
    inputs = random_search(18, 50)
    inputs["query"][3, 1] = math.nan
    inputs["reference"][20, 0], inputs["reference"][33, 19] = math.inf, math.nan
    values, indices = check_equal_to_blocked(inputs, 6, centered=True)
    assert values[3].isnan().all()
    allowed = (inputs["labels"] != inputs["reference_labels"][20]) & (inputs["self_index"] != 20)
    allowed[3] = False
    assert allowed.any()
    assert indices[allowed, 0].tolist() == [20] * int(allowed.sum())


@pytest.mark.parametrize(("queries", "references"), [(0, 5), (3, 0), (1, 1)])
def test_nothing_to_find(queries: int, references: int) -> None:
    inputs = random_search(queries, references)
    inputs["labels"], inputs["reference_labels"] = inputs["labels"] * 0, inputs["reference_labels"] * 0
    values, indices = check_equal_to_blocked(inputs, 3, centered=True)
    assert values.tolist() == [[-math.inf] * 3] * queries
    assert indices.tolist() == [[-1] * 3] * queries


def test_large_labels_are_not_truncated(small_tiles) -> None:
    inputs = random_search(17, 40)
    inputs["labels"], inputs["reference_labels"] = inputs["labels"] << 40, inputs["reference_labels"] << 40
    check_equal_to_blocked(inputs, 40, centered=True)


@pytest.mark.parametrize(("k", "dtype"), [(513, torch.float32), (3, torch.float64)])
def test_what_a_list_does_not_hold_is_refused(k: int, dtype: torch.dtype) -> None:
    assert not kernels.holds(k, dtype)
    with pytest.raises(ValueError, match=r"nearest_rows: k is .* gcng\.ops\.nearest"):
        kernels.nearest_rows(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype), k, centered=True)


@pytest.mark.parametrize("queries", [1, 100, 5000, 10**6])
@pytest.mark.parametrize("references", [0, 1, 5000, 10**6])
@pytest.mark.parametrize("k", [1, 16, 17, 512])
def test_schedule(queries: int, references: int, k: int) -> None:
    """Room for the list, tiles that tl.dot takes, shares that are worth a program."""
    schedule = SHIPPED(queries, references, k)
    assert k <= schedule.block_k < 2 * max(k, 16)
    assert schedule.block_i >= 16
    assert schedule.block_i * schedule.block_k <= 8192
    assert schedule.splits == 1 or schedule.splits <= references // 1024


@pytest.mark.raw_memory
def test_the_matrix_of_similarities_does_not_exist() -> None:
    x = torch.empty(40000, 64, device="meta")
    with recorded_launches(90) as recording, LargestTensor() as largest:
        kernels.nearest_rows(x, x, 10, centered=True)
    assert largest.elements == x.numel()
    assert [launch.kernel.fn.__name__ for launch in recording.launches].count("nearest_kernel") == 1


GUARDED = """
import torch
from dataclasses import replace
from gcng.kernels import nearest as kernels
from tests.triton_interpreter import guard_allocations, guarded
shipped = kernels.NearestSchedule.for_shape
kernels.NearestSchedule.for_shape = lambda *a: replace(shipped(*a), block_i=16, block_j=32, block_d=16, splits=2)
x, y, own = torch.randn(19, 21), torch.randn(70, 21), torch.arange(19)
labels, others = torch.randint(3, (19,)), torch.randint(3, (70,))
def run(x, y, own, labels, others):
    return kernels.nearest_rows(
        x, y, 5, centered=True, self_index=own, labels=labels, reference_labels=others)
expected = run(x, y, own, labels, others)
guard_allocations()
got = run(*map(guarded, (x, y, own, labels, others)))
assert all(torch.equal(a, b) for a, b in zip(expected, got))
"""


def test_no_access_outside_the_tensors() -> None:
    check_isolated(GUARDED)


def test_offsets_beyond_32_bits() -> None:
    """Rows spread over more than 2^31 elements, where the overflow check is on."""
    x = torch.randn(3, 20).to(torch.float16)
    far = spread_rows(x, 2**30 + 8)
    for a, b in zip(
        kernels.nearest_rows(far, far, 2, centered=True), kernels.nearest_rows(x, x, 2, centered=True), strict=True
    ):
        assert equal_bits(a, b)


def test_indices_beyond_32_bits() -> None:
    """The last rows of more than 2^31: their keys hold the whole index, and order by it."""
    x = torch.ones(2, 4)
    fixed, spoiled = kernels._fixed_point(x, False)
    best = (kernels.MISSING + torch.arange(3)).expand(2, 1, 3).contiguous()
    schedule = SHIPPED(2, 2, 3)
    first = 2**32 - 2
    kernels.launch(
        kernels.nearest_kernel, (1, 1), fixed, fixed, spoiled, spoiled, None, None, None, best, 2, 2, first, 3, 64,
        schedule=schedule, HAS_SELF=False, HAS_LABELS=False, WIDTH=4, **schedule.tiles,
    )  # fmt: skip
    values, indices = kernels._decode(best.flatten(1).sort(descending=True).values)
    assert indices.tolist() == [[first, first + 1, -1]] * 2
    assert values.tolist() == [[1.0, 1.0, -math.inf]] * 2
