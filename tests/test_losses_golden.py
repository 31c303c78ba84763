"""GCAHNGLoss against tests/golden, on the blocked path with every memory plan and in reference mode."""

from __future__ import annotations

import contextlib

import pytest
import torch

import gcng
from gcng.losses.official import official_names
from gcng.memory import MemoryPlan
from gcng.nn.graph import parameter_names
from tests.golden_data import Golden, load

# "drop" has masks of ordered pairs, which only the dense reference can take (docs/maths.md S6).
CASES = ("tiny", "odd", "wide", "first")
PLANS = {
    "recompute": MemoryPlan(7),
    "edges": MemoryPlan(11, stash_edges=True),
    "small": MemoryPlan(30, stash_edges=True, stash_small=True),
    "everything": MemoryPlan(1000, stash_edges=True, stash_hidden=True, stash_small=True),
}


def make_criterion(golden: Golden, **options) -> gcng.losses.GCAHNGLoss:
    """The criterion of a golden file: sizes, constants, averages and weights."""
    cfg = golden.cfg
    options = dict(official_sim_mask=True) | options
    criterion = gcng.losses.GCAHNGLoss(
        cfg("D"), cfg("C"), cfg("L"), cfg("H"), alpha=cfg("alpha"), beta=cfg("beta"), dropout=0.0,
        softmax_factor=cfg("soft_factor"), similarity_weight=cfg("w_sim"), diversity_weight=cfg("w_div"),
        **options,
    ).to(golden.dtype)  # fmt: skip
    criterion.load_state_dict(state_from(golden), strict=False)
    criterion.schedule.j_avg, criterion.schedule.j_gen = golden.scalar("in/j_avg"), golden.scalar("in/j_gen")
    return criterion


def paths(golden: Golden) -> dict[str, str]:
    """Golden parameter name -> path in the criterion."""
    names = {name: f"graph.{path}" for name, path in parameter_names(golden.cfg("L")).items()}
    return names | {"scls.w": "classifier.weight", "scls.b": "classifier.bias"}


def state_from(golden: Golden, prefix: str = "p") -> dict[str, torch.Tensor]:
    """The golden parameters as a state_dict of the criterion."""
    return {path: golden.tensor(f"{prefix}/{name}") for name, path in paths(golden).items()}


@contextlib.contextmanager
def memory_plan(monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan | None):
    """Force a memory plan; None runs the dense reference."""
    if plan is None:
        with gcng.reference_mode():
            yield
        return
    with monkeypatch.context() as patch:
        patch.setattr(gcng.nn.CorrelationGraph, "memory_plan", lambda self, embeddings: plan)
        yield


def parameter_gradients(golden: Golden, criterion: gcng.losses.GCAHNGLoss) -> dict[str, torch.Tensor]:
    """Gradients by golden name, and none where there is none."""
    parameters = dict(criterion.named_parameters())
    return {n: parameters[p].grad for n, p in paths(golden).items() if parameters[p].grad is not None}


def check_gradients(golden: Golden, phase: str, grads: dict[str, torch.Tensor], bound: float) -> None:
    """Compare all parameter gradients of a phase; those the golden lacks must be missing or 0."""
    expected = set(golden.gradients(phase))
    assert expected <= set(grads), expected - set(grads)
    for name, grad in grads.items():
        if name not in expected:
            assert grad.abs().max() == 0, (phase, name)
        elif name.startswith("edge") and name.endswith("k.b"):  # mathematically 0 (identity I7)
            assert grad.abs().max() <= bound * golden.arrays[f"{phase}/p/{name[:-3]}q.b"].__abs__().max()
        else:
            assert golden.error(f"{phase}/p/{name}", grad) <= bound, (phase, name)


@pytest.mark.parametrize("plan", [None, *PLANS.values()], ids=["reference", *PLANS])
@pytest.mark.parametrize("name", CASES)
def test_golden_phases(name: str, plan: MemoryPlan | None, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load(name)
    criterion = make_criterion(golden)
    labels, z = golden.tensor("in/labels"), golden.tensor("in/z").clone().requires_grad_()
    with memory_plan(monkeypatch, plan):
        metric = criterion.metric_terms(z, labels, mix=golden.tensor("in/lam1"))
        metric.total.backward()
    for key, value in (("J_m", metric.n_pair), ("J_syn", metric.synthetic), ("J_gce", metric.node_ce)):
        assert golden.error(f"loss/{key}", value) <= 1e-12, key
    assert golden.error("loss/J_metric", metric.total) <= 1e-12
    assert golden.error("g1/z", z.grad) <= 1e-10
    check_gradients(golden, "g1", parameter_gradients(golden, criterion), 1e-10)

    criterion.zero_grad(set_to_none=True)
    classifier = criterion.classifier_loss(z, labels)
    classifier.backward()
    assert golden.error("loss/J_softce", classifier) <= 1e-12
    check_gradients(golden, "gc", parameter_gradients(golden, criterion), 1e-10)

    criterion.zero_grad(set_to_none=True)
    before = z.grad.clone()
    with memory_plan(monkeypatch, plan):
        terms = criterion.generator_terms(z, labels, mix=golden.tensor("in/lam2"))
        terms.total.backward()
    assert torch.equal(z.grad, before), "the embeddings are constants of the generator phase"
    assert golden.error("loss/J_soft", terms.class_ce) <= 1e-12
    assert golden.error("loss/J_sim", terms.similarity) <= 1e-12
    ours, truth = 1 - terms.diversity.item() / 0.01, 1 - golden.scalar("loss/J_div") / 0.01
    assert abs(ours - truth) <= 1e-12 * abs(truth)
    assert golden.error("loss/J_gen", terms.total) <= 1e-12
    check_gradients(golden, "g2", parameter_gradients(golden, criterion), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_golden_intended_mask(name: str) -> None:
    golden = load(name)
    criterion = make_criterion(golden, official_sim_mask=False)
    terms = criterion.generator_terms(golden.tensor("in/z"), golden.tensor("in/labels"), mix=golden.tensor("in/lam2"))
    assert golden.error("loss/J_sim_intended_mask", terms.similarity) <= 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
def test_golden_float32(name: str, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(name, torch.float32)
    criterion = make_criterion(golden)
    labels, z = golden.tensor("in/labels"), golden.tensor("in/z").clone().requires_grad_()

    def bound(key: str) -> float:
        yardstick = golden.arrays.get(f"f32err/{key}")
        return max(4 * float(yardstick), 1e-6) if yardstick is not None else 1e-6

    with memory_plan(monkeypatch, plan):
        metric = criterion.metric_terms(z, labels, mix=golden.tensor("in/lam1"))
        metric.total.backward()
        for key, value in (("J_m", metric.n_pair), ("J_syn", metric.synthetic), ("J_metric", metric.total)):
            assert golden.error(f"loss/{key}", value) <= bound(f"loss/{key}"), key
        assert golden.error("g1/z", z.grad) <= bound("g1/z")
        check_gradients(golden, "g1", parameter_gradients(golden, criterion), bound("g1/p"))
        criterion.zero_grad(set_to_none=True)
        terms = criterion.generator_terms(z, labels, mix=golden.tensor("in/lam2"))
        terms.total.backward()
    assert golden.error("loss/J_gen", terms.total) <= bound("loss/J_gen")
    check_gradients(golden, "g2", parameter_gradients(golden, criterion), bound("g2/p"))


@pytest.mark.parametrize("name", ("tiny", "odd"))
def test_golden_graph_outputs(name: str) -> None:
    golden = load(name)
    criterion = make_criterion(golden)
    labels, z = golden.tensor("in/labels"), golden.tensor("in/z")
    out = criterion.graph(z, labels)
    assert golden.error(f"out/f{golden.cfg('L')}", out.nodes) <= 1e-12
    assert golden.error("out/node_pred", out.node_logits) <= 1e-12
    n = z.shape[0]
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    assert golden.error("out/gate", out.gates(i, j)) <= 1e-12


def official_state(golden: Golden) -> dict[str, torch.Tensor]:
    """The golden parameters as an authors' checkpoint, with keys that they have and gcng does not use."""
    by_path = state_from(golden)
    state = {key: by_path[path] for key, path in official_names(golden.cfg("L")).items()}
    for which in (1, 2):
        state[f"gnn.bottleneck{which}.0.bias"] = torch.zeros(golden.cfg("D"))
        state[f"gnn.bottleneck{which}.0.running_mean"] = torch.ones(golden.cfg("D"))
    state["gnn.gnn.0.node_model.layers.0.update_node.0.weight"] = torch.ones(2, 2)
    state["feature_extractor.conv1.weight"] = torch.ones(2)
    return state


def test_official_checkpoint() -> None:
    golden = load("odd")
    criterion = make_criterion(golden)
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.fill_(0.5)
    state = official_state(golden)
    unused = criterion.load_official_state_dict(state)
    assert unused == sorted(set(state) - set(official_names(golden.cfg("L"))))
    assert "feature_extractor.conv1.weight" in unused
    ours = criterion.state_dict()
    assert all(torch.equal(ours[path], value) for path, value in state_from(golden).items())


def test_official_checkpoint_errors() -> None:
    golden = load("tiny")
    criterion = make_criterion(golden)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    state = official_state(golden)
    with pytest.raises(KeyError, match="gnn.dim_red.weight"):
        criterion.load_official_state_dict({k: v for k, v in state.items() if k != "gnn.dim_red.weight"})
    with pytest.raises(KeyError, match="gnn.surprise"):
        criterion.load_official_state_dict(state | {"gnn.surprise": torch.ones(1)})
    with pytest.raises(ValueError, match=r"gnn.bottleneck1.0.bias is not 0"):
        criterion.load_official_state_dict(state | {"gnn.bottleneck1.0.bias": torch.ones(golden.cfg("D"))})
    with pytest.raises(ValueError, match=r"gnn.dim_red.weight has shape \(3, 3\)"):
        criterion.load_official_state_dict(state | {"gnn.dim_red.weight": torch.ones(3, 3)})
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
