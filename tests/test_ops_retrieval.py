"""knn and the exact neighbor loop behind it: ties, blocks, missing places, odd rows, contract, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import gcng
from gcng.ops import nearest
from gcng.ops.nearest import nearest_rows
from gcng.ops.retrieval import knn
from gcng.reference.retrieval import knn as definition
from tests.op_checks import LargestTensor, check_compiled
from tests.run_case import LAYOUTS, equal_bits, lay_out

TILES = [(1, 3), (5, 7), (16, 32), (256, 2048)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 5, 7)


def set_tiles(monkeypatch: pytest.MonkeyPatch, queries: int, references: int) -> None:
    monkeypatch.setattr(nearest, "TILE_QUERIES", queries)
    monkeypatch.setattr(nearest, "TILE_REFERENCES", references)


def signs(rows: int, width: int = 16) -> torch.Tensor:
    """Rows of +-1 with a few distinct cosines, all exact: ties everywhere."""
    return torch.randint(2, (rows, width)).float() * 2 - 1


def same(first: tuple, second: tuple) -> bool:
    return all(equal_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_equals_the_definition(dtype: torch.dtype, exclude_self: bool, small_tiles) -> None:
    """Values to the rounding of the dtype; the neighbors are those of float64 wherever cosines differ visibly."""
    x = torch.randn(38, 9, dtype=dtype)
    values, indices = knn(x, k=11, exclude_self=exclude_self)
    exact, _ = definition(x.double(), x.double(), 11, exclude_self=exclude_self)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert values.dtype == wide
    assert indices.dtype == torch.int64
    tolerance = 4e-15 if dtype == torch.float64 else 1.2e-7
    assert (values.double() - exact).abs().max() <= tolerance
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    found = (unit @ unit.T).gather(1, indices)
    assert (found - exact).abs().max() <= 2 * tolerance
    assert bool((indices == torch.arange(38)[:, None]).any(1).all()) is not exclude_self
    assert all(len(set(row)) == 11 for row in indices.tolist())


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiles_change_no_bit(tiles: tuple[int, int], dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random data and a width of no power of two: every cosine must have the same bits in every tile."""
    query, reference = torch.randn(37, 33, dtype=dtype), torch.randn(50, 33, dtype=dtype)
    whole = knn(query, reference, 50)
    set_tiles(monkeypatch, *tiles)
    assert same(knn(query, reference, 50), whole)
    assert same(knn(query[11:13], reference, 50), (whole[0][11:13], whole[1][11:13]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cosine_depends_on_its_two_rows_alone(dtype) -> None:
    """Order of the gallery, order of the channels, number of threads: the same bits for the same pair."""
    query, reference = torch.randn(20, 77, dtype=dtype), torch.randn(3000, 77, dtype=dtype)
    values, indices = knn(query, reference, 40)
    order = torch.randperm(3000)
    shuffled_values, shuffled = knn(query, reference[order], 40)
    assert equal_bits(shuffled_values, values)
    assert torch.equal(order[shuffled], indices)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert same(knn(query, reference, 40), (values, indices))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("k", [1, 2, 6, 7, 8, 23, 60])
def test_ties_go_by_lower_index(tiles: tuple[int, int], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact cosines with many ties, across tiles and at the end of the list."""
    set_tiles(monkeypatch, *tiles)
    query, reference = signs(13, 4), signs(60, 4)
    assert same(knn(query, reference, k), definition(query, reference, k, exclude_self=False))


def test_equal_rows_tie_exactly() -> None:
    """Copies of one random row, far apart in the gallery, have one cosine and rank by index."""
    query, reference = torch.randn(3, 100), torch.randn(5000, 100)
    copies = [7, 130, 2047, 2048, 4999]
    reference[copies] = query[0] * 0.5 + 0.1 * reference[0]
    values, indices = knn(query, reference, 5)
    assert indices[0].tolist() == copies
    assert values[0].unique().numel() == 1


@pytest.mark.parametrize("k", [1, 3, 10])
def test_all_rows_equal(k: int, small_tiles) -> None:
    """A collapsed network: every cosine is 1, every list is the lowest indices without the query."""
    values, indices = knn(torch.full((12, 3), 0.3), k=k)
    for row in range(12):
        assert indices[row].tolist() == [i for i in range(12) if i != row][:k]
    assert values.unique().numel() == 1
    assert values[0, 0].item() == pytest.approx(1.0, abs=1e-7)


def test_self_is_excluded_by_identity() -> None:
    """The twin of a row stays its nearest neighbor, and a negative copy its last."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    values, indices = knn(x, k=3)
    assert indices.tolist() == [[2, 1, 3], [0, 2, 3], [0, 1, 3], [1, 0, 2]]
    assert values[0].tolist() == [1.0, 0.0, -1.0]


def test_exclude_self_with_a_gallery_that_starts_with_the_queries() -> None:
    x = torch.randn(9, 4)
    gallery = torch.cat([x, x.flip(0)])
    values, indices = knn(x, gallery, 1, exclude_self=True)
    assert indices.squeeze(1).tolist() == [17 - i for i in range(9)]
    assert values.squeeze(1).tolist() == pytest.approx([1.0] * 9, abs=1e-6)
    included = knn(x, gallery, 2)[1]
    assert included.tolist() == [[i, 17 - i] for i in range(9)]


@pytest.mark.parametrize("tiles", TILES)
def test_missing_places(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, *tiles)
    x = torch.randn(4, 3)
    values, indices = knn(x, k=6)
    assert bool((values[:, :3] > -1.001).all())
    assert values[:, 3:].tolist() == [[-math.inf] * 3] * 4
    assert indices[:, 3:].tolist() == [[-1] * 3] * 4
    assert same(knn(x, k=6), definition_with_values(x, values))


def definition_with_values(x: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition's indices with the values given: float32 cosines round differently."""
    return values, definition(x.double(), x.double(), values.shape[1], exclude_self=True)[1]


@pytest.mark.parametrize(("queries", "references"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty_and_single(queries: int, references: int) -> None:
    values, indices = knn(torch.randn(queries, 3), torch.randn(references, 3), 2)
    assert values.shape == indices.shape == (queries, 2)
    assert bool((indices[:, references:] == -1).all())
    lone_values, lone = knn(torch.ones(1, 3))
    assert (lone_values.tolist(), lone.tolist()) == ([[-math.inf]], [[-1]])


def test_zero_rows_have_cosine_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]])
    values, indices = knn(x, k=2)
    assert values.tolist() == [[0.0, 0.0], [0.0, -1.0], [0.0, -1.0]]
    assert indices.tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_scale_of_a_row_does_not_matter(scale: float) -> None:
    """Squares of these overflow or vanish in float32; subnormal rows have few digits, but a direction."""
    x = signs(6, 8)
    assert same(knn(x * scale, x, 6), knn(x, x, 6))


def test_nan_reaches_its_own_pairs_only(small_tiles) -> None:
    """A NaN row has NaN with every row and comes first, as in torch.sort; other pairs keep their bits."""
    x = torch.randn(20, 4)
    clean_values, clean = knn(x, k=19)
    x[6, 2] = math.nan
    values, indices = knn(x, k=19)
    others = [i for i in range(20) if i != 6]
    assert values[6].isnan().all()
    assert indices[others, 0].tolist() == [6] * 19
    for row in others:
        kept = clean[row] != 6
        assert torch.equal(indices[row, 1:], clean[row][kept])
        assert equal_bits(values[row, 1:], clean_values[row][kept])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    query, reference = lay_out(torch.randn(11, 6), layout), lay_out(torch.randn(15, 6), layout)
    assert same(knn(query, reference, 4), knn(query.contiguous(), reference.contiguous(), 4))


def test_inputs_are_not_changed_and_have_no_gradient() -> None:
    x = torch.randn(9, 4, requires_grad=True)
    before = x.detach().clone()
    values, _ = knn(x, k=2)
    assert not values.requires_grad
    assert equal_bits(x.detach(), before)


@pytest.mark.parametrize("with_self", [True, False])
def test_opcheck(with_self: bool) -> None:
    x = torch.randn(9, 4)
    self_index = torch.arange(9) if with_self else None
    torch.library.opcheck(torch.ops.gcng.knn.default, (x, x.T.contiguous().T, 3, self_index))
    torch.library.opcheck(torch.ops.gcng.knn.default, (x[:0], x, 3, None))


def test_compiled_equals_eager() -> None:
    def search(query, reference):
        values, indices = knn(query, reference, 3)
        among, _ = knn(query, k=2)
        return values, indices, among

    inputs = [{"query": torch.randn(n, 5), "reference": torch.randn(m, 5)} for n, m in ((6, 9), (30, 12), (13, 50))]
    check_compiled(search, inputs, differentiate=False)


def test_autocast_gives_float32() -> None:
    x = torch.randn(9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = knn(x.bfloat16(), x, 2)
    assert same(mixed, knn(x.bfloat16().float(), x, 2))


def test_reference_mode_is_the_definition() -> None:
    x = torch.randn(9, 4)
    with gcng.reference_mode():
        assert same(knn(x, k=3), definition(x, x, 3, exclude_self=True))


@pytest.mark.raw_memory
def test_nothing_of_size_queries_by_references_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 64, 128)
    query, reference = torch.randn(300, 4), torch.randn(900, 4)
    with LargestTensor() as largest:
        nearest_rows(query, reference, 5, centered=False)
    # A whole tile was seen, and nothing larger (all pairs are 33 times as much); the gallery is never copied.
    assert largest.elements == 64 * 128


BAD_INPUT = [
    ({"query": [1.0]}, TypeError, "knn: query must be a torch.Tensor, got list"),
    ({"query": torch.zeros(4)}, ValueError, r"knn: query must be \(N, D\), got shape \(4,\)"),
    ({"query": torch.zeros(2, 4).int()}, TypeError, "query has dtype torch.int32"),
    ({"query": torch.zeros(2, 0), "reference": torch.zeros(2, 0)}, ValueError, "query has no channels"),
    ({"reference": torch.zeros(5, 3)}, ValueError, r"reference has shape \(5, 3\) but query has shape \(2, 4\)"),
    ({"reference": torch.zeros(5, 4).double()}, TypeError, "query is torch.float32 but reference is torch.float64"),
    ({"reference": torch.zeros(5, 4, device="meta")}, ValueError, "query is on cpu but reference is on meta"),
    ({"k": 0}, ValueError, "knn: k is 0; it must be at least 1"),
    ({"k": 1.0}, TypeError, "knn: k must be an int, got float"),
    ({"k": True}, TypeError, "knn: k must be an int, got bool"),
    ({"reference": torch.zeros(1, 4), "exclude_self": True}, ValueError, "reference has 1 rows but query has 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    good = {"query": torch.zeros(2, 4), "reference": torch.zeros(5, 4), "k": 1}
    with pytest.raises(error, match=message):
        knn(**good | change)
