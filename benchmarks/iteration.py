"""One whole iteration, shared by every measurement: providers by name, inputs, and the run itself.

An iteration is the order of formula (28) without its optimizer steps, for every provider alike: metric phase
forward and backward, classifier loss backward, the graph rebuilt, generator phase forward and backward.
Gradients are reset to None between the three, as a training step does, and both phases see the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import PublishedLoss
from benchmarks.settings import Setting

SEED = 20250101
J_AVG, J_GEN = 1.5, 30.0  # averages of a previous epoch; both losses then weigh in
EMBEDDING_SCALE, CLASS_SPREAD = 3.0, 0.8

ITERATION_PROVIDERS = (
    "published", "published-compiled", "reference", "gcng", "gcng-no-extension", "gcng-recompute",
)  # fmt: skip
# What the tiles of "gcng-recompute" are planned for; it keeps nothing of the pairs, whatever would fit.
RECOMPUTE_BUDGETS = {2048: "1GiB", 8192: "4GiB", 16_384: "20GiB"}  # up to N -> bytes

_OFFICIAL_LAYER_NAMES = {
    "node{l}.q": "gnn.gnn.{l}.node_model.layers.0.att.q_linear",
    "node{l}.k": "gnn.gnn.{l}.node_model.layers.0.att.k_linear",
    "node{l}.v": "gnn.gnn.{l}.node_model.layers.0.att.v_linear",
    "node{l}.o": "gnn.gnn.{l}.node_model.layers.0.att.out",
    "node{l}.e2n": "gnn.gnn.{l}.node_model.layers.0.edge_to_node",
    "node{l}.ff1": "gnn.gnn.{l}.node_model.layers.0.linear1",
    "node{l}.ff2": "gnn.gnn.{l}.node_model.layers.0.linear2",
    "node{l}.ln": "gnn.gnn.{l}.node_model.layers.0.norm.1",
    "edge{l}.q": "gnn.gnn.{l}.edge_model.att.q_linear",
    "edge{l}.k": "gnn.gnn.{l}.edge_model.att.k_linear",
    "edge{l}.v": "gnn.gnn.{l}.edge_model.att.v_linear",
    "edge{l}.n2e": "gnn.gnn.{l}.edge_model.node_to_edge",
    "edge{l}.ff1": "gnn.gnn.{l}.edge_model.linear.0",
    "edge{l}.ffln": "gnn.gnn.{l}.edge_model.linear.2",
    "edge{l}.ff2": "gnn.gnn.{l}.edge_model.linear.3",
    "edge{l}.ln": "gnn.gnn.{l}.edge_model.norm.1",
}
_OFFICIAL_HEAD_NAMES = {
    "inp": "gnn.dim_red",
    "gate": "gnn.fc.0",
    "ncls": "gnn.cls.0",
    "scls": "softmax_classifier",
    "bn_edge": "gnn.bottleneck1.0",
    "bn_node": "gnn.bottleneck2.0",
}


@dataclass(frozen=True)
class Batch:
    """Inputs of one iteration: z (N, D) a leaf, labels (N,) in slot order, mixes (K, K-1) per phase."""

    z: Tensor
    labels: Tensor  # on the CPU: no op of gcng has to wait for a GPU
    metric_mix: Tensor
    generator_mix: Tensor


@dataclass
class Provider:
    """One formulation, ready to run: a criterion, its parameters by golden names, and the mode it runs in."""

    name: str
    criterion: nn.Module
    parameters: dict[str, nn.Parameter]
    mode: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Outcome:
    """Losses of one iteration, and gradients by "phase/name" if they were asked for."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def make_batch(setting: Setting, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Batch:
    """Classes around random centers, rounded to float32 in every dtype of 32 bits or more."""
    generator = torch.Generator().manual_seed(SEED)
    M, K, D = setting.batch_classes, setting.samples_per_class, setting.embedding_size
    centers = torch.randn(M, D, generator=generator).repeat(K, 1)
    noise = torch.randn(M * K, D, generator=generator)
    z = (EMBEDDING_SCALE * (centers + CLASS_SPREAD * noise) / D**0.5).to(device, dtype).requires_grad_()
    mixes = (torch.rand(K, K - 1, generator=generator).to(device, dtype) for _ in range(2))
    return Batch(z, torch.arange(M).repeat(K), *mixes)


def make_weights(setting: Setting) -> dict[str, Tensor]:
    """Weights by golden names, the same for every provider: torch's initialization, with gains off one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = PublishedLoss(*_sizes(setting))
        weights = {name: p.detach().clone() for name, p in model.named_golden_parameters().items()}
        for name in weights:
            if name.endswith("ln.w") or name.startswith("bn_"):
                weights[name].uniform_(0.8, 1.2)
            elif name.endswith("ln.b"):
                weights[name].uniform_(-0.1, 0.1)
    return weights


def official_name(golden_name: str) -> str:
    """The name of a golden parameter in a checkpoint of the paper's code."""
    part, _, kind = golden_name.rpartition(".")
    suffix = {"w": "weight", "b": "bias"}[kind]
    if part in _OFFICIAL_HEAD_NAMES:
        return f"{_OFFICIAL_HEAD_NAMES[part]}.{suffix}"
    block, _, inner = part.partition(".")
    template = _OFFICIAL_LAYER_NAMES[f"{block[:4]}{{l}}.{inner}"]
    return f"{template.format(l=block[4:])}.{suffix}"


def make_provider(
    name: str,
    setting: Setting,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: Mapping[str, Tensor] | None = None,
) -> Provider:
    """A provider by name, one of ITERATION_PROVIDERS (another name is a ValueError), with given or usual weights."""
    weights = {key: w.detach().to("cpu", dtype) for key, w in (weights or make_weights(setting)).items()}
    if name in ("published", "published-compiled"):
        return _published(name, setting, weights, dtype, device)
    if name in ITERATION_PROVIDERS:
        return _gcng(name, setting, weights, dtype, device)
    raise ValueError(f"make_provider: name is {name!r}; it must be one of {', '.join(ITERATION_PROVIDERS)}")


def run_iteration(provider: Provider, batch: Batch, *, keep_gradients: bool = False, layout: Any = None) -> Outcome:
    """One iteration.

    Args:
        keep_gradients: copy the gradients of each phase (not for measurements of memory).
        layout: the batch's classes as a `gcng.BatchLayout`, for labels that are on a GPU.
    """
    outcome, criterion = Outcome(), provider.criterion
    known = {} if layout is None else {"layout": layout}
    batch.z.grad = None
    with provider.mode():
        criterion.zero_grad(set_to_none=True)
        metric = criterion.metric_terms(batch.z, batch.labels, mix=batch.metric_mix, **known)
        metric.total.backward()
        for term in ("n_pair", "synthetic", "node_ce"):
            outcome.losses[term] = getattr(metric, term).detach()
        _finish_phase("metric", provider, batch, outcome, keep_gradients)
        classifier = criterion.classifier_loss(batch.z, batch.labels)
        classifier.backward()
        outcome.losses["classifier"] = classifier.detach()
        _finish_phase("classifier", provider, batch, outcome, keep_gradients)
        generator = criterion.generator_terms(batch.z, batch.labels, mix=batch.generator_mix, **known)
        generator.total.backward()
        for term in ("class_ce", "similarity", "diversity"):
            outcome.losses[term] = getattr(generator, term).detach()
        _finish_phase("generator", provider, batch, outcome, keep_gradients)
    return outcome


def _finish_phase(phase: str, provider: Provider, batch: Batch, outcome: Outcome, keep_gradients: bool) -> None:
    """Keeps copies of the gradients if wanted, and resets those of the parameters."""
    if keep_gradients:
        outcome.gradients |= {f"{phase}/{name}": grad.clone() for name, grad in _used(phase, provider, batch)}
    provider.criterion.zero_grad(set_to_none=True)


def _used(phase: str, provider: Provider, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Gradients that a training step uses: the classifier learns from its own loss only."""
    if phase == "metric":
        yield "z", batch.z.grad
    for name, parameter in provider.parameters.items():
        if parameter.grad is not None and name.startswith("scls") == (phase == "classifier"):
            yield name, parameter.grad


def _sizes(setting: Setting) -> tuple[int, int, int, int]:
    return setting.embedding_size, setting.training_classes, setting.num_layers, setting.num_heads


def _published(
    name: str, setting: Setting, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> Provider:
    model = PublishedLoss(*_sizes(setting), dropout=setting.dropout).to(dtype)
    model.load_golden(weights)
    model.to(device)
    model.j_avg, model.j_gen = J_AVG, J_GEN
    parameters = model.named_golden_parameters()
    if name == "published-compiled":
        torch.compiler.reset()
        # What every pair goes through; the rest reads the labels on the host.
        for layer in range(setting.num_layers):
            for part in (f"node{layer}", f"edge{layer}"):
                getattr(model, part).compile(dynamic=False)
        model.synthesize = torch.compile(model.synthesize, dynamic=False)
    return Provider(name, model, parameters)


def _gcng(
    name: str, setting: Setting, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> Provider:
    import gcng  # here, so that the published formulation is measured in a process without it
    from benchmarks.providers import without_extension
    from gcng.losses import GCAHNGLoss

    budget = None
    if name == "gcng-recompute":
        budget = next((size for n, size in RECOMPUTE_BUDGETS.items() if setting.samples <= n), None)
    criterion = GCAHNGLoss(*_sizes(setting), dropout=setting.dropout, memory_budget=budget).to(dtype)
    if name == "gcng-recompute":
        _keep_nothing(criterion.graph)
    criterion.load_official_state_dict({official_name(key): value for key, value in weights.items()})
    criterion.schedule.j_avg, criterion.schedule.j_gen = J_AVG, J_GEN
    modes = {"reference": gcng.reference_mode, "gcng-no-extension": without_extension}
    parameters = _by_golden_name(criterion, weights)
    return Provider(name, criterion.to(device), parameters, modes.get(name, nullcontext))


def _keep_nothing(graph: nn.Module) -> None:
    from gcng.memory import MemoryPlan

    planned = graph.memory_plan
    graph.memory_plan = lambda embeddings: MemoryPlan(planned(embeddings).pairs_per_tile)


def _by_golden_name(criterion: nn.Module, weights: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Parameters found again by their loaded values, so that no internal name of the criterion matters."""
    found = {}
    for name, parameter in criterion.named_parameters():
        value = parameter.detach()
        matches = [key for key, w in weights.items() if w.shape == value.shape and torch.equal(w, value)]
        if len(matches) != 1:
            raise RuntimeError(
                f"{type(criterion).__name__}.{name} equals the loaded weights {matches}; expected exactly "
                "one. load_official_state_dict must copy every weight unchanged"
            )
        found[matches[0]] = parameter
    return found
