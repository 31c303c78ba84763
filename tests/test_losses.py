"""The criterion on batches that the golden data do not have, its invariances, its schedule and its contract."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import gcng
from gcng.memory import MemoryPlan
from tests.test_losses_golden import PLANS, memory_plan

D, C = 8, 7
BATCHES = {
    "2 x 2": [0, 1, 0, 1],
    "sample-major 3 x 3": [0, 1, 2, 0, 1, 2, 0, 1, 2],
    "ragged, shuffled": [5, 1, 5, 2, 2, 5, 1, 6, 5],
    "one class": [3, 3, 3],
    "all distinct": [3, 4, 5],
    "one anchor class": [0, 1, 1, 2],
    "one sample": [2],
    "two samples": [2, 2],
}


def make_criterion(num_layers: int = 1, dropout: float = 0.2, dtype=torch.float64, **options):
    """A small criterion whose weights, gains and shifts are all at general positions."""
    torch.manual_seed(num_layers)
    criterion = gcng.losses.GCAHNGLoss(D, C, num_layers, dropout=dropout, **options).to(dtype)
    with torch.no_grad():
        for parameter in criterion.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    criterion.schedule.j_avg, criterion.schedule.j_gen = 2.0, 25.0
    return criterion


def run(criterion, z, labels, mix, seed: int = 3):
    """Both phases with their gradients: terms, gradient of the embeddings, gradients of the parameters."""
    criterion.zero_grad(set_to_none=True)
    z = z.detach().clone().requires_grad_()
    metric = criterion.metric_terms(z, labels, mix=mix, generator=torch.Generator().manual_seed(seed))
    metric.total.backward()
    generator = criterion.generator_terms(z, labels, mix=mix, generator=torch.Generator().manual_seed(seed))
    generator.total.backward()
    grads = {name: p.grad for name, p in criterion.named_parameters()}
    return torch.stack([*metric, *generator]).detach(), z.grad, grads


def assert_same(ours, truth, bound: float = 1e-11) -> None:
    """Terms and every gradient within ``bound`` of the array's maximum; a missing gradient counts as 0."""
    assert ((ours[0] - truth[0]).abs() <= bound * truth[0].abs().clamp(min=1)).all(), (ours[0], truth[0])
    arrays = [("z", ours[1], truth[1]), *((name, ours[2][name], truth[2][name]) for name in truth[2])]
    for name, a, b in arrays:
        zero = torch.zeros(())
        a, b = (zero if x is None else x for x in (a, b))
        assert a.isfinite().all(), name
        assert ((a - b).abs() <= bound * b.abs().max().clamp(min=1e-3)).all(), (name, (a - b).abs().max())


def batch_of(labels: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, labels and mixing numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)
    most = int(torch.bincount(y).max())
    z = torch.randn(len(labels), D, generator=generator, dtype=torch.float64)
    return z, y, torch.rand(most, most - 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_layers", (1, 2))
def test_blocked_equals_reference(num_layers: int, name: str, plan: MemoryPlan, monkeypatch) -> None:
    criterion, (z, y, mix) = make_criterion(num_layers), batch_of(BATCHES[name])
    with memory_plan(monkeypatch, plan):
        ours = run(criterion, z, y, mix)
    with gcng.reference_mode():
        truth = run(criterion, z, y, mix)
    assert_same(ours, truth)


@pytest.mark.parametrize("name", ("one class", "all distinct", "one sample"))
def test_batches_without_negatives(name: str) -> None:
    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES[name])
    (n_pair, synthetic, node_ce, _, class_ce, similarity, _, _), grad, grads = run(criterion, z, y, mix)
    assert synthetic == 0 and class_ce == 0 and similarity == 0
    assert n_pair > 0 and node_ce > 0
    assert grad.isfinite().all() and all(g is None or g.isfinite().all() for g in grads.values())


def test_values_that_break_naive_formulas(monkeypatch) -> None:
    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES["ragged, shuffled"])
    z[1] = 0.7  # a constant row
    z[3] = 0.0
    z[5] = z[0]  # a duplicate inside a class, and one across classes: ties of distances
    z[6] = z[2]
    with memory_plan(monkeypatch, PLANS["recompute"]):
        ours = run(criterion, z, y, mix)
    with gcng.reference_mode():
        truth = run(criterion, z, y, mix)
    assert_same(ours, truth)


# Interleavings that keep the order inside each class. The last two change the order of first appearance, by which
# classes are numbered.
ORDERS = ([0, 2, 5, 1, 3, 7, 6, 4], [7, 5, 2, 0, 3, 6, 1, 4], [2, 5, 0, 7, 1, 6, 3, 4])


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
@pytest.mark.parametrize("num_layers", (1, 2))
def test_order_of_the_batch_does_not_matter(num_layers: int, plan: MemoryPlan, order: list[int], monkeypatch) -> None:
    criterion = make_criterion(num_layers)
    labels = [4, 4, 1, 1, 1, 0, 0, 6]
    z, y, mix = batch_of(labels)
    order = torch.tensor(order)
    with memory_plan(monkeypatch, plan):
        truth = run(criterion, z, y, mix)
        ours = run(criterion, z[order], y[order], mix)
    inverse = torch.argsort(order)
    assert_same((ours[0], ours[1][inverse], ours[2]), truth)


@pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
@pytest.mark.parametrize("num_layers", (1, 2))
@pytest.mark.parametrize("phase", ("metric_terms", "generator_terms"))
def test_backward_repeats_and_gives_any_part(phase: str, num_layers: int, plan: MemoryPlan, monkeypatch) -> None:
    criterion, (z, y, mix) = make_criterion(num_layers), batch_of(BATCHES["ragged, shuffled"])

    def total(x: torch.Tensor) -> torch.Tensor:
        return getattr(criterion, phase)(x, y, mix=mix, generator=torch.Generator().manual_seed(1)).total

    # One parameter of each kind, the weight where there is one, and the embeddings.
    leaves = {name.split(".")[-2]: p for name, p in reversed(list(criterion.named_parameters()))}
    leaves |= {"z": z.clone().requires_grad_()} if phase == "metric_terms" else {}
    with memory_plan(monkeypatch, plan):
        value = total(leaves.get("z", z))
        options = dict(retain_graph=True, allow_unused=True)
        first, again = (torch.autograd.grad(value, list(leaves.values()), **options) for _ in range(2))
        for (name, leaf), a, b in zip(leaves.items(), first, again, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name
            if a is None:
                continue
            criterion.requires_grad_(False)
            alone = leaf.detach().clone().requires_grad_() if name == "z" else leaf.requires_grad_()
            (grad,) = torch.autograd.grad(total(alone if name == "z" else z), alone)
            criterion.requires_grad_(True)
            assert (grad - a).abs().max() <= 1e-11 * a.abs().max() + 1e-14, name


def test_tile_size_does_not_matter(monkeypatch) -> None:
    criterion, (z, y, mix) = make_criterion(2), batch_of([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    results = []
    for pairs in (1, 3, 13, 47, 10_000):
        with memory_plan(monkeypatch, MemoryPlan(pairs)):
            results.append(run(criterion, z, y, mix))
    for result in results[1:]:
        assert_same(result, results[0])


def test_dropout_is_keyed_by_the_seed() -> None:
    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES["2 x 2"])
    first, again, other = (run(criterion, z, y, mix, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    criterion.eval()
    assert torch.equal(run(criterion, z, y, mix, seed=1)[0], run(criterion, z, y, mix, seed=2)[0])


def test_drop_in_gives_every_parameter_its_own_phase() -> None:
    criterion, (z, y, _) = make_criterion(dropout=0.0), batch_of(BATCHES["sample-major 3 x 3"])
    criterion.train()
    generator = torch.Generator().manual_seed(11)
    mixes = [torch.rand(3, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    twin = copy.deepcopy(criterion)
    draws = iter(mixes)
    original = torch.rand
    try:
        torch.rand = lambda *a, **k: next(draws)  # the two draws of a call, one for each phase
        zc = z.clone().requires_grad_()
        loss = criterion(zc, y)
    finally:
        torch.rand = original
    loss.backward()
    zt = z.clone().requires_grad_()
    metric = twin.metric_terms(zt, y, mix=mixes[0])
    classifier = twin.classifier_loss(zt, y)
    terms = twin.generator_terms(zt, y, mix=mixes[1])
    total = metric.total + classifier + terms.total
    assert torch.allclose(loss, total, rtol=1e-14)
    graph = list(twin.graph.parameters())
    expected = torch.autograd.grad(metric.total + terms.total, [zt, *graph], retain_graph=True)
    heads = torch.autograd.grad(classifier, list(twin.classifier.parameters()))
    ours = [zc.grad, *(p.grad for p in criterion.graph.parameters())]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(ours, expected, strict=True))
    assert all(torch.equal(a.grad, b) for a, b in zip(criterion.classifier.parameters(), heads, strict=True))
    assert torch.equal(criterion.last_terms["n_pair"], metric.n_pair.detach())
    assert criterion.last_terms["generator_total"].requires_grad is False


def test_schedule_moving_average_and_epochs() -> None:
    schedule = gcng.losses.LossAverages()
    assert schedule.j_avg == 1e6 and schedule.j_gen == 1e6
    schedule.update(2.0, 4.0)
    schedule.update(torch.tensor(4.0), 0.0)
    assert schedule.j_avg == 1e6, "the first epoch keeps its start"
    schedule.end_epoch()
    assert schedule.j_avg == 3.0 and schedule.j_gen == pytest.approx((4.0 + 1e-6) / 2, rel=1e-15)
    schedule.observe(100.0, 100.0)
    assert schedule.j_avg == 3.0, "with epochs the averages move at their ends only"

    drop_in = gcng.losses.LossAverages()
    drop_in.observe(5.0, 50.0)
    assert drop_in.j_avg == 5.0 and drop_in.j_gen == 50.0, "the first call sets them"
    drop_in.observe(7.0, 50.0)
    assert drop_in.j_avg == pytest.approx(5.0 + 2.0 / 200, rel=1e-15)
    restored = gcng.losses.LossAverages()
    restored.load_state_dict(drop_in.state_dict())
    assert restored.j_avg == drop_in.j_avg
    with pytest.raises(ValueError, match=r"schedule.j_avg must be positive and finite, got -1.0"):
        restored.j_avg = -1.0


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_schedule_counts_no_step_that_is_not_finite(bad) -> None:
    good = [(5.0, 50.0), (7.0, 60.0)]
    expected, schedule = gcng.losses.LossAverages(), gcng.losses.LossAverages()
    for step in good:
        expected.observe(*step)
    for step in [bad, good[0], bad, good[1], bad]:
        schedule.observe(*step)
    schedule.update(*bad)
    for name, value in expected.state_dict().items():
        assert torch.equal(schedule.state_dict()[name], value), name
    schedule.end_epoch()
    assert (schedule.j_avg, schedule.j_gen) == (6.0, 55.0)


def test_one_bad_batch_does_not_poison_the_drop_in_criterion() -> None:
    criterion, labels = make_criterion(), torch.tensor([0, 1, 0, 1])
    x = torch.randn(4, D, dtype=torch.float64)
    before = {name: value.clone() for name, value in criterion.schedule.state_dict().items()}
    assert not criterion(x * math.nan, labels).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in criterion.schedule.state_dict().items())
    assert criterion(x, labels).isfinite() and criterion(x, labels).isfinite()


def test_schedule_keeps_its_precision() -> None:
    criterion = gcng.losses.GCAHNGLoss(D, C)
    criterion.schedule.j_avg = 1.0 + 1e-9
    assert criterion.half().schedule.j_avg == 1.0 + 1e-9
    assert criterion.schedule.average.dtype == torch.float64


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_losses_of_16_bit_embeddings_are_float32(dtype: torch.dtype) -> None:
    z, y, mix = batch_of(BATCHES["sample-major 3 x 3"])
    narrow = make_criterion(dropout=0.0, dtype=dtype)
    ours = run(narrow, z.to(dtype), y, mix.float())
    wide = copy.deepcopy(narrow).double()
    truth = run(wide, z.to(dtype).double(), y, mix)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    bound = 16 * torch.finfo(dtype).eps
    assert ((ours[0] - truth[0]).abs() <= bound * truth[0].abs().clamp(min=1)).all()


def test_autocast() -> None:
    z, y, mix = batch_of(BATCHES["sample-major 3 x 3"])
    criterion = make_criterion(dropout=0.0, dtype=torch.float32)
    truth = run(criterion, z.float(), y, mix.float())
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(criterion, z.bfloat16(), y, mix.float())
    assert ours[0].dtype == torch.float32
    assert ((ours[0] - truth[0]).abs() <= 0.1 * truth[0].abs().clamp(min=1)).all()
    assert all(g is None or g.isfinite().all() for g in ours[2].values())


def test_layout_of_the_sampler() -> None:
    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES["ragged, shuffled"])
    layout = gcng.BatchLayout(y)
    assert layout.num_classes == 4 and layout.samples_per_class == 4
    a = criterion.metric_terms(z, y, mix=mix, layout=layout, generator=torch.Generator().manual_seed(1))
    b = criterion.metric_terms(z, y, mix=mix, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a.total, b.total)
    with pytest.raises(ValueError, match="layout describes 4 samples but labels has 9"):
        criterion.metric_terms(z, y, mix=mix, layout=gcng.BatchLayout([0, 0, 1, 1]))
    earlier = gcng.BatchLayout([5, 1, 5, 2, 2, 5, 6, 6, 5])
    for terms in (criterion.metric_terms, criterion.generator_terms):
        with pytest.raises(ValueError, match="layout belongs to other labels: at 6 it has 6, and labels 1; make it"):
            terms(z, y, mix=mix, layout=earlier)
    assert torch.equal(criterion.metric_terms(z, y.int(), mix=mix, layout=layout).n_pair, a.n_pair)


def test_layout_of_an_evaluation_serves_a_training() -> None:
    # Classes of no other test: what is kept for them is made here, in inference mode.
    criterion, (z, y, mix) = make_criterion(), batch_of([6, 6, 6, 1, 6, 1, 6, 3, 3, 0, 3])
    with torch.inference_mode():
        layouts = [gcng.BatchLayout(y.clone()), gcng.BatchLayout(y.tolist())]
    layouts.append(gcng.BatchLayout(y))
    for layout in layouts:
        with torch.inference_mode():
            criterion.metric_terms(z, y, mix=mix, layout=layout)
        x = z.clone().requires_grad_()
        criterion.metric_terms(x, y, mix=mix, layout=layout).total.backward()
        criterion.generator_terms(x, y, mix=mix, layout=layout).total.backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    gate = torch.rand(len(y), len(y), D, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        synthesized = gcng.functional.synthesize_negatives(z, y, gate, kappa=0.5, mix=mix, layout=layouts[0])
    again = gcng.functional.synthesize_negatives(z, y, gate, kappa=0.5, mix=mix, layout=layouts[0])
    again.sum().backward()
    assert torch.equal(again, synthesized) and gate.grad.isfinite().all()


def test_parameter_groups() -> None:
    criterion = gcng.losses.GCAHNGLoss(D, C)
    graph, classifier = criterion.parameter_groups(graph_lr=0.1, classifier_lr=0.2)
    assert graph["lr"] == 0.1 and classifier["lr"] == 0.2
    listed = [*graph["params"], *classifier["params"]]
    assert {id(p) for p in listed} == {id(p) for p in criterion.parameters()}
    assert "lr" not in criterion.parameter_groups()[0]
    torch.optim.AdamW(criterion.parameter_groups(graph_lr=1e-3, classifier_lr=1e-2))


@pytest.mark.parametrize(
    ("i", "j", "error", "message"),
    [
        ([-1], [0], ValueError, r"gates: i\[0\] is -1; expected a batch position in \[0, N\) = \[0, 9\)"),
        ([0, 1], [8, 9], ValueError, r"gates: j\[1\] is 9; expected a batch position"),
        ([0, 1], [0], ValueError, r"gates: i has shape \(2,\) but j has shape \(1,\)"),
        ([0.0], [0], TypeError, "gates: i must be a 1-D int64 tensor"),
    ],
)
def test_gates_of_positions_that_do_not_exist(i, j, error, message) -> None:
    criterion, (z, y, _) = make_criterion(), batch_of(BATCHES["ragged, shuffled"])
    with pytest.raises(error, match=message):
        criterion.graph(z, y).gates(torch.tensor(i), torch.tensor(j))


def test_gates_on_demand_are_differentiable() -> None:
    criterion, (z, y, _) = make_criterion(2), batch_of(BATCHES["ragged, shuffled"])
    i, j = torch.tensor([0, 3, 8, 2]), torch.tensor([1, 3, 0, 7])
    results = []
    for dense in (False, True):
        generator = torch.Generator().manual_seed(4)
        if dense:
            with gcng.reference_mode():
                gates = criterion.graph(z, y, generator=generator).gates(i, j)
        else:
            gates = criterion.graph(z, y, generator=generator).gates(i, j)
        weights = torch.linspace(-1, 1, gates.numel(), dtype=torch.float64).view_as(gates)
        grads = torch.autograd.grad((gates * weights).sum(), list(criterion.graph.parameters()), allow_unused=True)
        results.append((gates, grads))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-11)


def test_a_failed_allocation_is_retried_with_half_the_tile(monkeypatch) -> None:
    from gcng.ops import pair_field as module

    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES["2 x 2"])
    truth = run(criterion, z, y, mix)
    asked: list[int] = []
    original = module.plan_tiles

    def plan_tiles(n: int, pairs: int, *rest):
        asked.append(pairs)
        if len(asked) == 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(n, pairs, *rest)

    monkeypatch.setattr(module, "plan_tiles", plan_tiles)
    assert_same(run(criterion, z, y, mix), truth)
    assert asked[1] == asked[0] // 2


BEYOND = torch.tensor([0, 2**63, 0, 2**63], dtype=torch.uint64)
BAD_BATCHES = {
    "1-D embeddings": (lambda z, y: (z[0], y), ValueError, r"metric_terms: embeddings must be \(N, D\), got shape"),
    "integer embeddings": (lambda z, y: (z.long(), y), TypeError, "embeddings has dtype torch.int64; use"),
    "sparse embeddings": (lambda z, y: (z.to_sparse(), y), TypeError, "dense strided tensor, got layout"),
    "wrong width": (lambda z, y: (z[:, :3], y), ValueError, r"shape \(4, 3\); expected \(N, D\) with D ="),
    "labels too short": (lambda z, y: (z, y[:2]), ValueError, r"labels has shape \(2,\); expected \(4,\)"),
    "2-D labels": (lambda z, y: (z, y[:, None]), ValueError, r"use labels.squeeze\(1\)"),
    "float labels": (lambda z, y: (z, y.float()), TypeError, "labels has dtype torch.float32; use an integer dtype"),
    "label beyond int64": (lambda z, y: (z, BEYOND), ValueError, r"labels\[1\] is 9223372036854775808; use labels"),
    "bool labels": (lambda z, y: (z, y.bool()), TypeError, "labels has dtype torch.bool"),
    "label too large": (lambda z, y: (z, y + C), ValueError, r"labels\[0\] is 7; expected a class index in \[0,"),
    "label beyond 32 bits": (lambda z, y: (z, y + 2**40), ValueError, r"labels\[0\] is 1099511627776"),
    "negative label": (lambda z, y: (z, y - 100), ValueError, r"labels\[0\] is -100"),
    "mixed dtypes": (lambda z, y: (z.float(), y), TypeError, "embeddings is torch.float32 but weight is torch.float64"),
    "not a tensor": (lambda z, y: (z.tolist(), y), TypeError, "embeddings must be a torch.Tensor, got list"),
    "quantized": (lambda z, y: (torch.quantize_per_tensor(z.float(), 0.1, 0, torch.qint8), y), TypeError, "dequantize"),
    "nested": (lambda z, y: (torch.nested.nested_tensor([z[0], z[1]]), y), TypeError, "embeddings is a nested tensor"),
    "8-bit floats": (lambda z, y: (z.to(torch.float8_e4m3fn), y), TypeError, "float8_e4m3fn; use float16, bfloat16"),
    "compressed rows": (lambda z, y: (z.to_sparse_csr(), y), TypeError, "dense strided tensor, got layout torch.sp"),
    "another device": (lambda z, y: (z.to("meta"), y), ValueError, r"meta but the parameters are on cpu; move the"),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|Sparse CSR tensor support is in beta|quantiz)")
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches(name: str) -> None:
    change, error, message = BAD_BATCHES[name]
    criterion, (z, y, _) = make_criterion(), batch_of(BATCHES["2 x 2"])
    for method in (criterion.metric_terms, criterion.generator_terms):
        with pytest.raises(error, match=message.replace("metric_terms", method.__name__)):
            method(*change(z, y))


BAD_OPTIONS = {
    "heads": (dict(num_heads=3), ValueError, "embedding_size 8 is not divisible by num_heads 3"),
    "layers": (dict(num_layers=0), ValueError, "num_layers must be a positive integer, got 0"),
    "alpha": (dict(alpha=math.nan), ValueError, "alpha must be finite and not negative, got nan"),
    "beta": (dict(beta="5"), TypeError, "beta must be a number, got '5'"),
    "dropout": (dict(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "singletons": (dict(singletons="drop"), ValueError, 'singletons must be "skip" or "error"'),
    "budget": (dict(memory_budget="2 parsecs"), ValueError, "memory_budget is '2 parsecs'; use a number of bytes"),
    "unknown": (dict(gamma=1.0), TypeError, "gamma"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str) -> None:
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        gcng.losses.GCAHNGLoss(D, C, **options)


def test_other_refusals() -> None:
    z, y, _ = batch_of(BATCHES["all distinct"])
    with pytest.raises(ValueError, match='class 3 has one sample in the batch and singletons="error"'):
        make_criterion(singletons="error").metric_terms(z, y)
    with pytest.raises(ValueError, match=r"mix has shape \(2, 2\); expected \(K, K - 1\) = \(1, 0\)"):
        make_criterion().metric_terms(z, y, mix=torch.rand(2, 2))
    z, y, mix = batch_of([0, 0, 1])
    with pytest.raises(ValueError, match="official_sim_mask=True needs the same number of samples of every class"):
        make_criterion(official_sim_mask=True).generator_terms(z, y, mix=mix)
    with pytest.raises(MemoryError, match="nodes .* tile workspace .* memory_budget is 1.00 KiB; raise memory_budget"):
        make_criterion(memory_budget="1KiB").metric_terms(z, y, mix=mix)
    criterion = make_criterion()
    for terms in (criterion.generator_terms(z, y, mix=mix), criterion.metric_terms(z, y, mix=mix)):
        parameters = list(criterion.graph.node_layers.parameters())
        with pytest.raises(NotImplementedError, match="double backward is not supported"):
            torch.autograd.grad(terms.total, parameters, create_graph=True)


def test_nan_reaches_what_depends_on_it() -> None:
    criterion, (z, y, mix) = make_criterion(), batch_of(BATCHES["2 x 2"])
    z[0, 0] = math.nan
    assert criterion.metric_terms(z, y, mix=mix).total.isnan(), "a bad batch must never look plausible"


@pytest.mark.parametrize("stash", (False, True))
def test_fused_losses_opcheck(stash: bool, monkeypatch) -> None:
    from gcng.ops import generator, n_pair

    criterion, (z, y, mix) = make_criterion(), batch_of([0, 0, 1, 1])
    calls: dict[str, tuple] = {}
    for module, name in ((n_pair, "n_pair_synthesis"), (generator, "generator_synthesis")):
        op = getattr(module, name)

        def record(*args, _name: str = name, _op=op):
            calls[_name] = (_op, args)
            return _op(*args)

        monkeypatch.setattr(f"gcng.nn.field.{name}", record)
    with memory_plan(monkeypatch, MemoryPlan(5, stash_small=stash)):
        criterion.metric_terms(z.clone().requires_grad_(), y, mix=mix)
        criterion.generator_terms(z, y, mix=mix)
    assert set(calls) == {"n_pair_synthesis", "generator_synthesis"}
    for op, args in calls.values():
        leaves = [
            [x.detach().requires_grad_(x.requires_grad) for x in a] if isinstance(a, list)
            else a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in args
        ]  # fmt: skip
        result = torch.library.opcheck(op, tuple(leaves))
        assert set(result.values()) == {"SUCCESS"}, result


def test_a_layout_is_worked_out_once_for_a_device() -> None:
    z, y = torch.randn(8, 16), torch.tensor([3, 1, 3, 1, 2, 2, 0, 0])
    criterion, layout = gcng.losses.GCAHNGLoss(16, 4, dropout=0.0), gcng.BatchLayout(y)
    mix = torch.rand(2, 1)
    first = criterion.metric_terms(z, y, mix=mix, layout=layout).total
    (known,) = [shared.tensors() for shared in layout.on_device.values()]
    again = criterion.metric_terms(z, y, mix=mix, layout=layout).total
    assert layout.on_device[z.device].tensors() is known
    assert torch.equal(first, again) and torch.equal(first, criterion.metric_terms(z, y, mix=mix).total)


def test_common_errors_of_all_pairs_do_not_add_up() -> None:
    # The mean of the batch norm enters the gradient of every pair. Rounded to float32 it cost the gradients of the
    # graph four times what the definition loses in float32.
    torch.manual_seed(0)
    n, width = 160, 128
    z, y = torch.randn(n // 2, width).repeat(2, 1) + 0.8 * torch.randn(n, width), torch.arange(n) % (n // 2)
    z *= 3 / width**0.5
    criterion = gcng.losses.GCAHNGLoss(width, n // 2, dropout=0.0)
    criterion.schedule.j_avg = 1.5
    mix = torch.rand(2, 1)
    for name, parameter in criterion.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.rand_like(parameter) - 0.1

    def gradients(module: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        # The bias of a key of an edge layer has a gradient that is mathematically 0.
        named = {k: p for k, p in module.graph.edge_layers.named_parameters() if not k.endswith("key.bias")}
        named |= dict(module.graph.node_layers.named_parameters(prefix="node"))
        grads = torch.autograd.grad(module.generator_terms(x, y, mix=mix).total, [*named.values()])
        return dict(zip(named, grads, strict=True))

    ours = gradients(criterion, z)
    with gcng.reference_mode():
        eager = gradients(criterion, z)
        truth = gradients(criterion.double(), z.double())
    for name, expected in truth.items():
        lost, allowed = (((x[name].double() - expected).norm() / expected.norm()).item() for x in (ours, eager))
        assert lost <= 2 * allowed + 1e-7, name
