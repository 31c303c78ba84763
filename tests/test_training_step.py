"""train_step: the order of (28), clipping, gradients that go to whom, and steps that must not count."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from gcng.training import Optimizers, train_step


class Metric(NamedTuple):
    n_pair: torch.Tensor
    total: torch.Tensor


class Generated(NamedTuple):
    similarity: torch.Tensor
    total: torch.Tensor


class Schedule:
    def __init__(self):
        self.updates = []

    def update(self, j_m, j_gen):
        self.updates.append((j_m.item(), j_gen.item()))


class SmallCriterion(nn.Module):
    """The criterion's contract on a graph of two maps, one of which each phase leaves without gradient."""

    def __init__(self, size=4, classes=3):
        super().__init__()
        self.graph = nn.ModuleDict({"both": nn.Linear(size, size), "generator_only": nn.Linear(size, size)})
        self.classifier = nn.Linear(size, classes)
        self.schedule = Schedule()
        self.calls = []
        self.poison = {}

    def _finish(self, phase, loss):
        self.calls.append((phase, self.graph["both"].weight.detach().clone(), self.classifier.weight.detach().clone()))
        return loss * self.poison.get(phase, 1.0)

    def metric_terms(self, z, labels, *, mix=None, generator=None):
        self.mix = [mix]
        n_pair = self._finish("metric", self.graph["both"](z).square().mean() + 3 * z.square().mean())
        return Metric(n_pair, 2 * n_pair)

    def classifier_loss(self, z, labels):
        assert not z.requires_grad
        return self._finish("classifier", nn.functional.cross_entropy(self.classifier(z), labels))

    def generator_terms(self, z, labels, *, mix=None, generator=None):
        assert not z.requires_grad
        self.mix.append(mix)
        hidden = self.graph["generator_only"](self.graph["both"](z))
        similarity = self._finish("generator", self.classifier(hidden).square().mean() * 5)
        return Generated(similarity, 0.5 * similarity)


def make():
    extractor = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    criterion = SmallCriterion()
    optimizers = Optimizers(
        torch.optim.AdamW(extractor.parameters(), lr=0.01),
        torch.optim.AdamW(criterion.graph.parameters(), lr=0.02),
        torch.optim.AdamW(criterion.classifier.parameters(), lr=0.03),
    )
    return extractor, criterion, optimizers, torch.randn(9, 6), torch.arange(9) % 3


def test_optimizers_that_share_a_parameter_are_refused():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    adam = torch.optim.AdamW
    with pytest.raises(ValueError, match=r"of extractor and classifier share a parameter of shape \(2,\)"):
        Optimizers(adam([first.weight, second.bias]), adam([second.weight]), adam([second.bias]))


def step(parts, **options):
    extractor, criterion, optimizers, inputs, labels = parts
    return train_step(extractor, criterion, inputs, labels, optimizers, **options)


def snapshot(extractor, criterion, optimizers):
    tensors = [*extractor.state_dict().values(), *criterion.state_dict().values()]
    for optimizer in (optimizers.extractor, optimizers.graph, optimizers.classifier):
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in tensors]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def run_by_hand(extractor, criterion, optimizers, inputs, labels, clip=None):
    """(28) in the plainest order: every optimizer steps at its own place."""

    def clamp(module):
        for parameter in module.parameters():
            if parameter.grad is not None and clip is not None:
                parameter.grad.clamp_(-clip, clip)

    def reset():
        for parameter in [*extractor.parameters(), *criterion.parameters()]:
            parameter.grad = None

    reset()
    z = extractor(inputs)
    metric = criterion.metric_terms(z, labels)
    metric.total.backward()
    clamp(extractor), clamp(criterion.graph)
    optimizers.extractor.step(), optimizers.graph.step()
    reset()
    z = z.detach()
    criterion.classifier_loss(z, labels).backward()
    optimizers.classifier.step()
    reset()
    generated = criterion.generator_terms(z, labels)
    generated.total.backward()
    clamp(criterion.graph)
    optimizers.graph.step()
    reset()
    criterion.schedule.update(metric.n_pair, generated.total)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_three_steps_equal_the_plain_order_bit_for_bit(clip):
    runs = []
    for one_step in (
        lambda parts: step(parts, clip_value=clip),
        lambda parts: run_by_hand(*parts, clip=clip),
    ):
        torch.manual_seed(5)
        parts = make()
        for _ in range(3):
            one_step(parts)
        runs.append((snapshot(*parts[:3]), parts[1].schedule.updates))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and len(runs[0][1]) == 3


def test_generator_phase_sees_stepped_graph_and_classifier_and_gradients_are_dropped():
    extractor, criterion, optimizers, inputs, labels = make()
    extractor[0].weight.grad = torch.ones_like(extractor[0].weight)  # must not leak into the step
    terms = train_step(extractor, criterion, inputs, labels, optimizers, mix=("a", None))
    (_, graph_1, class_1), (_, graph_2, class_2), (_, graph_3, class_3) = criterion.calls
    assert [call[0] for call in criterion.calls] == ["metric", "classifier", "generator"]
    assert torch.equal(graph_1, graph_2) and torch.equal(class_1, class_2)
    assert not torch.equal(graph_1, graph_3) and not torch.equal(class_1, class_3)
    assert torch.equal(class_3, criterion.classifier.weight)  # (27) has a gradient for it, which is thrown away
    assert criterion.mix == ["a", None]
    assert all(p.grad is None for p in [*extractor.parameters(), *criterion.parameters()])
    assert not any(value.requires_grad for value in terms.named().values())
    assert set(terms.named()) == {"n_pair", "metric", "classifier", "similarity", "generator"}
    assert criterion.schedule.updates == [(float(terms.metric.n_pair), float(terms.generator.total))]


def test_parameter_without_gradient_is_not_touched_by_a_phase():
    extractor, criterion, optimizers, inputs, labels = make()
    for _ in range(2):
        train_step(extractor, criterion, inputs, labels, optimizers)
    steps = {name: optimizers.graph.state[p]["step"].item() for name, p in criterion.graph.named_parameters()}
    assert steps == {"both.weight": 4, "both.bias": 4, "generator_only.weight": 2, "generator_only.bias": 2}


def test_norm_clipping_bounds_each_part_and_spares_the_classifier():
    extractor, criterion, optimizers, inputs, labels = make()
    seen = {}
    for name in ("extractor", "graph", "classifier"):
        optimizer = getattr(optimizers, name)

        def record(opt, args, kwargs, name=name):
            gradients = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
            seen.setdefault(name, []).append(float(torch.nn.utils.get_total_norm(gradients)))

        optimizer.register_step_pre_hook(record)
    train_step(extractor, criterion, 100 * inputs, labels, optimizers, clip_norm=1e-3)
    assert max(seen["extractor"] + seen["graph"]) < 1.001e-3 and min(seen["extractor"] + seen["graph"]) > 0.9e-3
    assert seen["classifier"][0] > 0.01 and [len(seen[n]) for n in ("extractor", "graph", "classifier")] == [
        1,
        2,
        1,
    ]


@pytest.mark.parametrize("phase", ["metric", "classifier", "generator"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("warm", [0, 2])
def test_step_that_is_not_finite_changes_nothing(phase, value, warm):
    extractor, criterion, optimizers, inputs, labels = make()
    for _ in range(warm):
        train_step(extractor, criterion, inputs, labels, optimizers)
    before, updates = snapshot(extractor, criterion, optimizers), list(criterion.schedule.updates)
    criterion.poison = {phase: value}
    assert train_step(extractor, criterion, inputs, labels, optimizers, clip_value=1.0).skipped == "loss"
    assert same(before, snapshot(extractor, criterion, optimizers))
    assert criterion.schedule.updates == updates
    criterion.poison = {}
    assert train_step(extractor, criterion, inputs, labels, optimizers).skipped == ""
    assert not same(before, snapshot(extractor, criterion, optimizers))


def test_nan_batch_does_not_poison_batch_norm():
    extractor, criterion, optimizers, inputs, labels = make()
    before = snapshot(extractor, criterion, optimizers)
    assert train_step(extractor, criterion, inputs * float("nan"), labels, optimizers).skipped == "loss"
    assert same(before, snapshot(extractor, criterion, optimizers))


def test_gradient_that_is_not_finite_is_not_applied():
    extractor, criterion, optimizers, inputs, labels = make()
    criterion.graph["both"].weight.register_hook(lambda grad: grad * float("inf"))
    before = snapshot(extractor, criterion, optimizers)
    assert train_step(extractor, criterion, inputs, labels, optimizers, clip_value=1.0).skipped == "gradient"
    assert same(before, snapshot(extractor, criterion, optimizers))


def test_exception_in_the_generator_phase_undoes_the_step():
    extractor, criterion, optimizers, inputs, labels = make()
    train_step(extractor, criterion, inputs, labels, optimizers)
    before = snapshot(extractor, criterion, optimizers)
    original, criterion.generator_terms = criterion.generator_terms, None
    with pytest.raises(TypeError):
        train_step(extractor, criterion, inputs, labels, optimizers)
    assert same(before, snapshot(extractor, criterion, optimizers))
    assert all(p.grad is None for p in [*extractor.parameters(), *criterion.parameters()])
    criterion.generator_terms = original
    assert train_step(extractor, criterion, inputs, labels, optimizers).skipped == ""


def test_scaler_gives_the_unscaled_step_and_recovers_from_an_overflow():
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)):
        torch.manual_seed(5)
        parts = make()
        for _ in range(3):
            assert step(parts, clip_value=0.05, scaler=scaler).skipped == ""
        results.append(snapshot(*parts[:3]))
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled)
    before = snapshot(*parts[:3])
    huge = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    assert step(parts, scaler=huge).skipped == "scale"
    assert same(before, snapshot(*parts[:3])) and huge.get_scale() == 2.0**27
    assert step(parts, scaler=huge).skipped == ""


def test_autocast_runs_the_forward_passes_in_16_bit():
    extractor, criterion, optimizers, inputs, labels = make()
    kinds = []
    extractor[2].register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    criterion.graph["both"].register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    assert train_step(extractor, criterion, inputs, labels, optimizers, autocast=torch.bfloat16).skipped == ""
    assert kinds == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_value": 1.0, "clip_norm": 1.0}, "clip_value and clip_norm are both given"),
        ({"clip_value": 0.0}, "clip_value must be positive and finite, got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be positive and finite, got nan"),
        ({"mix": torch.zeros(2, 1)}, "mix must be a pair"),
        ({"mix": (None,)}, "mix must be a pair"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, message):
    extractor, criterion, optimizers, inputs, labels = make()
    with pytest.raises(ValueError, match=message):
        train_step(extractor, criterion, inputs, labels, optimizers, **arguments)
    assert criterion.calls == []
