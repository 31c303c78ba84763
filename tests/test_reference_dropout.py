"""The counter-based dropout of (11): published numbers of Philox 4x32-10, and the statistics of the masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gcng.reference.dropout import dropout_pairs, dropout_scales, node_identity, philox

SEED = torch.tensor(-7_777_777_777_777)
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Known answers for philox4x32 with 10 rounds from the authors' library, Random123 (kat_vectors)."""
    found = philox(tuple(torch.tensor(x) for x in counter), tuple(torch.tensor(x) for x in key))
    assert tuple(word.item() for word in found) == words


def identities(classes: int = 150, samples: int = 2) -> Tensor:
    labels = torch.arange(classes).repeat(samples)
    return node_identity(labels, torch.arange(samples).repeat_interleave(classes))


def kept(layer: int = 0, p: float = 0.3, seed: Tensor = SEED) -> tuple[Tensor, Tensor]:
    """Both masks of all pairs a < b: whether the row endpoint's and the column endpoint's weight is kept."""
    nodes = identities()
    upper = torch.ones(len(nodes), len(nodes), dtype=torch.bool).triu(1)
    row, column = dropout_scales(seed, layer, p, nodes, nodes)
    return row[upper] > 0, column[upper] > 0


def check_independent(a: Tensor, b: Tensor, p: float) -> None:
    """Two masks keep together as often as independent ones do, within five standard deviations."""
    both, expected = (a & b).double().mean().item(), (1 - p) ** 2
    assert abs(both - expected) <= 5 * (expected * (1 - expected) / a.numel()) ** 0.5


@pytest.mark.parametrize("p", (0.05, 0.3, 0.9))
def test_rate_and_scale(p: float) -> None:
    nodes = identities()
    for scales in dropout_scales(SEED, 0, p, nodes, nodes):
        assert scales.dtype == torch.float64 and scales.unique().tolist() == [0.0, 1 / (1 - p)]
    for mask in kept(p=p):
        assert abs(mask.double().mean().item() - (1 - p)) <= 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert all(bool((scales == 1).all()) for scales in dropout_scales(SEED, 0, 0.0, nodes, nodes))


def test_masks_are_independent() -> None:
    """Of the endpoint, of the layer, of the seed in either half, and of the neighboring pair."""
    row, column = kept()
    check_independent(row, column, 0.3)
    for other in (*kept(layer=1), *kept(seed=SEED + 1), *kept(seed=SEED + 2**32)):
        check_independent(row, other, 0.3)
        check_independent(column, other, 0.3)
    check_independent(row[1:], row[:-1], 0.3)


def test_the_layer_counts_on_the_high_half_of_the_seed() -> None:
    for a, b in zip(kept(layer=3), kept(layer=1, seed=SEED + 2**33), strict=True):
        assert torch.equal(a, b)


def test_one_mask_for_an_unordered_pair() -> None:
    nodes = identities(20)
    row, column = dropout_scales(SEED, 1, 0.3, nodes, nodes)
    assert torch.equal(row, column.T) and not torch.equal(row, column)
    assert torch.equal(row.diagonal(), column.diagonal())
    a, b = nodes[3:11], nodes[8:16]
    of_pairs = torch.stack(dropout_pairs(SEED, 1, 0.3, a, b))
    assert torch.equal(of_pairs, torch.stack((row, column))[:, range(3, 11), range(8, 16)])


def test_the_smaller_identity_takes_the_first_word() -> None:
    low, high = torch.tensor(-5), torch.tensor(3 << 32 | 7)
    key = (SEED & ONES, ((SEED >> 32) + 2) & ONES)
    words = philox((low & ONES, (low >> 32) & ONES, high & ONES, high >> 32), key)
    for p in (0.1, 0.5, 0.9):
        expected = [float(word.item() >= p * 2**32) / (1 - p) for word in words]
        assert [x.item() for x in dropout_pairs(SEED, 2, p, low, high)] == expected
        assert [x.item() for x in dropout_pairs(SEED, 2, p, high, low)] == expected[::-1]


def test_identities_are_those_of_label_and_rank() -> None:
    labels, rank = torch.tensor([5, 5, 2, 2**40, -1]), torch.tensor([0, 1, 0, 0, 0])
    nodes = node_identity(labels, rank)
    assert len(nodes.unique()) == 5
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(node_identity(labels[order], rank[order]), nodes[order])
    # splitmix64 from state 0, whose first output is published with the generator.
    assert node_identity(torch.tensor([1]), torch.tensor([-1])).item() & (2**64 - 1) == 0xE220A8397B1DCDAF
