"""The pair ops (messages, edges, edge_moments) against the definition, and their contract with PyTorch."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from gcng import reference
from gcng.ops import dispatch
from gcng.ops.edges import edges
from gcng.ops.gates import edge_moments
from gcng.ops.messages import messages
from gcng.ops.pair_field import PairField, most_rows, with_smaller_tiles
from gcng.ops.synthesis_tiles import sums_between
from gcng.ops.tiles import plan_tiles
from tests.closeness import assert_close_to_truth
from tests.edge_chains import gradients, make_edge_case, worst_error

LABELS = [0, 0, 0, 1, 1, 2, 3, 3, 3]
PAIRS = (1, 4, 17, 1000)  # tiles of one pair, of less than a row, of some rows, of everything
BOUND = 1e-11


def upstream(shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """A random, non-uniform upstream gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("stash", (False, True))
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("num_layers", "p"), ((0, 0.0), (1, 0.0), (2, 0.3)))
def test_messages(num_layers: int, p: float, pairs: int, stash: bool) -> None:
    case = make_edge_case(LABELS, num_layers=num_layers, p=p)
    weight, bias = (upstream(size).requires_grad_() for size in ((8, 8), (8,)))
    leaves = [*case.leaves, weight, bias]
    truth = reference.messages(case.dense(), weight, bias)
    ours, _ = messages(*case.field(), weight, bias, pairs, stash)
    assert worst_error([ours], [truth]) <= BOUND
    grad = upstream(truth.shape)
    assert worst_error(gradients((ours * grad).sum(), leaves), gradients((truth * grad).sum(), leaves)) <= BOUND


def test_messages_are_as_accurate_over_hundreds_of_tiles() -> None:
    """A node's running sum over all of them, one after the other, would not be."""
    case = make_edge_case([*range(400)], width=16, num_layers=0, dtype=torch.float32)
    weight, bias = upstream((16, 16)).float() / 4, upstream((16,)).float()
    base = case.field()[0].detach() * 4
    truth, baseline = (
        reference.messages(reference.initial_edges(base.to(dtype)), weight.to(dtype), bias.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert len(plan_tiles(400, 200)) > 400
    ours, _ = messages(base, *case.field()[1:], weight, bias, 200, False)
    assert_close_to_truth("messages", ours, truth, baseline)


@pytest.mark.parametrize("stash", (False, True))
@pytest.mark.parametrize("pairs", PAIRS)
def test_edges_layer_by_layer(pairs: int, stash: bool) -> None:
    case = make_edge_case(LABELS, num_layers=2, p=0.3)
    n, width = case.z.shape
    truth = case.dense()
    base, _, chain, identity, seed, p, _ = case.field()
    half = len(chain) // 2
    first, *_ = edges(base, False, chain[:half], identity, seed, p, 0, pairs, stash)
    second, *_ = edges(first, True, chain[half:], identity, seed, p, 1, pairs, stash)
    r, c = torch.triu_indices(n, n)
    assert worst_error([second], [truth[r, c]]) <= BOUND
    assert torch.equal(truth, truth.transpose(0, 1)), "edges are symmetric with one mask for each unordered pair"
    grad = upstream(second.shape)
    ours, expected = (gradients((x * grad).sum(), case.leaves) for x in (second, truth[r, c]))
    assert worst_error(ours, expected) <= BOUND


def test_gradients_of_weights_are_as_accurate_over_a_large_tile() -> None:
    """Sums over tens of thousands of pairs of one tile lose no more digits than those of the dense definition."""
    narrow = make_edge_case(sorted([*range(100)] * 2), width=16, dtype=torch.float32)
    wide = replace(
        narrow,
        z=narrow.z.detach().double().requires_grad_(),
        nodes=[f.detach().double().requires_grad_() for f in narrow.nodes],
        layers=[{k: x.detach().double().requires_grad_() for k, x in layer.items()} for layer in narrow.layers],
    )
    n = len(narrow.z)
    r, c = torch.triu_indices(n, n)
    grad = upstream((len(r), 16))
    truth = gradients((wide.dense()[r, c] * grad).sum(), [*wide.layers[0].values()])
    dense = gradients((narrow.dense()[r, c] * grad.float()).sum(), [*narrow.layers[0].values()])
    with dispatch.forced_kernels(*dispatch.TORCH):
        packed, *_ = edges(*narrow.field(), n * n, False)
        ours = gradients((packed * grad.float()).sum(), [*narrow.layers[0].values()])
    for name, x, expected, baseline in zip(narrow.layers[0], ours, truth, dense, strict=True):
        # Mathematically zero is what a bias of the keys gets: it shifts both logits alike.
        if name != "k.b":
            assert_close_to_truth(name, x, expected, baseline)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("num_layers", (0, 2))
def test_edge_moments(num_layers: int, pairs: int) -> None:
    case = make_edge_case(LABELS, num_layers=num_layers, p=0.3)
    _, mean, var = reference.batch_norm(case.dense(), torch.ones(8, dtype=torch.float64))
    ours = edge_moments(*case.field(), pairs)
    assert worst_error(list(ours), [mean, var]) <= BOUND
    grads = [upstream((8,)), upstream((8,)).flip(0)]
    got, expected = (gradients((a * grads[0] + b * grads[1]).sum(), case.leaves) for a, b in (ours, (mean, var)))
    assert worst_error(got, expected) <= BOUND


def test_moments_of_a_common_offset() -> None:
    # Edges around 1000 with a spread of 1: sums of squares around 0 would lose the variance in float32.
    generator = torch.Generator().manual_seed(3)
    packed = 1000 + torch.randn(9 * 10 // 2, 6, generator=generator)
    identity, seed = torch.arange(9), torch.zeros((), dtype=torch.int64)
    mean, var = edge_moments(packed, True, [], identity, seed, 0.0, 0, 7)
    dense = torch.empty(9, 9, 6, dtype=torch.float64)
    r, c = torch.triu_indices(9, 9)
    dense[r, c] = dense[c, r] = packed.double()
    assert torch.allclose(mean.double(), dense.mean((0, 1)), rtol=1e-6)
    assert torch.allclose(var.double(), dense.var((0, 1), unbiased=False), rtol=1e-4)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("utility", OPCHECKS)
def test_opcheck(utility: str) -> None:
    case = make_edge_case([0, 0, 1, 1, 2], width=4, p=0.3)
    base, _, chain, identity, seed, p, _ = case.field()
    field = [base.detach().requires_grad_(), False, [x.detach().requires_grad_() for x in chain], identity, seed, p, 0]
    weight = upstream((4, 4)).t().requires_grad_()  # not contiguous
    for stash in (False, True):
        torch.library.opcheck(messages, (*field, weight, upstream((4,)), 5, stash), test_utils=utility)
        result = torch.library.opcheck(edges, (*field, 5, stash), test_utils=utility)
        assert set(result.values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(edge_moments, (*field, 5), test_utils=utility).values()) == {"SUCCESS"}


def test_gradcheck() -> None:
    case = make_edge_case([0, 0], width=2, p=0.3)
    weight, bias = (upstream(size).requires_grad_() for size in ((2, 2), (2,)))
    inputs = [*case.leaves, weight, bias]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        # Folding runs on the leaves of the case, which gradcheck perturbs in place.
        return messages(*case.field(), weight, bias, 2, False)[0] + 0 * sum(x.sum() for x in leaves)

    assert torch.autograd.gradcheck(run, inputs)


def test_only_asked_for_gradients() -> None:
    case = make_edge_case(LABELS)
    base, packed, chain, *rest = case.field()
    constants = [x.detach() for x in chain]
    weight = upstream((8, 8)).requires_grad_()
    out, _ = messages(base.detach(), packed, constants, *rest, weight, upstream((8,)), 10, False)
    out.sum().backward()
    assert weight.grad is not None and case.z.grad is None
    only_base = base.detach().requires_grad_()
    out, _ = messages(only_base, packed, constants, *rest, weight.detach(), upstream((8,)), 10, False)
    (grad,) = torch.autograd.grad((out * upstream(out.shape)).sum(), only_base)
    assert grad.shape == base.shape and grad.abs().max() > 0


def test_backward_repeats_and_refuses_a_second_derivative() -> None:
    case = make_edge_case(LABELS, num_layers=2, p=0.3)
    weight = upstream((8, 8)).requires_grad_()
    leaves = [*case.leaves, weight]
    out, _ = messages(*case.field(), weight, upstream((8,)), 10, True)
    value = (out * upstream(out.shape)).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(NotImplementedError, match="double backward is not supported; use gcng.reference_mode"):
        torch.autograd.grad(value, leaves, create_graph=True)


def test_upstream_gradient_layouts() -> None:
    case = make_edge_case(LABELS)
    weight = upstream((8, 8)).requires_grad_()

    def grads_for(grad: torch.Tensor) -> torch.Tensor:
        out, _ = messages(*case.field(), weight, upstream((8,)), 10, False)
        return torch.autograd.grad(out, weight, grad)[0]

    dense = upstream((9, 8))
    strided = upstream((9, 16))[:, ::2].copy_(dense)
    transposed = torch.empty(8, 9, dtype=torch.float64).t().copy_(dense)
    assert torch.equal(grads_for(dense), grads_for(strided))
    assert torch.equal(grads_for(dense), grads_for(transposed))
    row = upstream((8,))
    assert torch.equal(grads_for(row.expand(9, 8)), grads_for(row.repeat(9, 1)))


@pytest.mark.parametrize("boundaries", (None, [0, 3, 4, 9, 10, 23]))
def test_tiles_cover_every_pair_once(boundaries: list[int] | None) -> None:
    for n in (1, 2, 5, 23) if boundaries is None else (23,):
        for pairs in (1, 6, 50, 10_000):
            seen = torch.zeros(n, n)
            for tile in plan_tiles(n, pairs, boundaries):
                assert tile.c0 == tile.r0 or tile.c0 >= tile.r1
                assert boundaries is None or set(tile) <= set(boundaries)
                seen[tile.rows, tile.columns] += 1
                seen[tile.mirrored, tile.rows] += 1
            assert bool((seen == 1).all()), (n, pairs)


def test_large_tile_plans_are_cheap_and_bounded() -> None:
    tiles = plan_tiles(4096, 2048)
    assert max(t.shape[0] * t.shape[1] for t in tiles) <= 2048 + 11 * 11, "the square of the rows comes on top at most"
    pairs = sum(t.shape[0] * t.shape[1] for t in tiles)
    assert pairs <= 1.05 * 4096 * 4097 / 2, "the squares on the diagonal cost little"


@pytest.mark.parametrize(("n", "most", "extra"), [(80, 1, 2.0), (256, 1, 2.0), (1024, 5, 1.25), (4096, 70, 1.03)])
def test_a_gpu_gets_few_tiles_whose_squares_cost_little_where_there_are_many(n: int, most: int, extra: float) -> None:
    rows = most_rows(n, 512, torch.device("cuda"))
    assert most_rows(n, 512, torch.device("cpu")) == 10
    tiles = plan_tiles(n, min(n * n, 131_072), range(0, n + 1, 2), rows)
    assert len(tiles) <= most
    assert max(t.shape[0] * t.shape[1] for t in tiles) <= 131_072
    assert sum(t.shape[0] * t.shape[1] for t in tiles) <= extra * n * (n + 1) / 2


def test_a_retry_with_a_smaller_tile_finds_the_memory_of_the_first_try_free() -> None:
    field = PairField(torch.ones(4, 3), False, 4, ())
    scratch = weakref.ref(field.workspace.take("messages", 10, 10).untyped_storage())
    held: list[weakref.ref] = []

    def run(pairs: int) -> int:
        if held:
            assert held[0]() is None and scratch() is None, "tensors of the first try are still alive"
            return pairs
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError

    assert with_smaller_tiles(run, 64, field) == 32
    held.clear()
    assert with_smaller_tiles(run, 1, field) == 1, "what the field kept is free for the second try"


def test_a_second_failure_says_which_tiles_were_tried() -> None:
    def run(pairs: int) -> None:
        tried.append(pairs)
        raise MemoryError("no room")

    field, tried = PairField(torch.ones(4, 3), False, 4, ()), []
    with pytest.raises(MemoryError, match=r"not enough memory on cpu, neither for tiles of 64 pairs nor for half of"):
        with_smaller_tiles(run, 64, field)
    assert tried == [64, 32]


def test_ragged_sums_in_order_equal_those_by_index() -> None:
    values = torch.randn(3, 9, 5, dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    expected = values.new_zeros(3, 4, 5).index_add_(1, index, values)
    assert torch.allclose(sums_between(values, [0, 3, 4, 8, 9]), expected, atol=1e-14)
