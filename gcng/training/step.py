"""One training iteration: the update order of formula (28) in one function.

Owns the order of the phases, gradient clipping and the rule for steps that are not finite. Knows nothing
about epochs, files or data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Optimizers:
    """The three optimizers of an iteration. They must not share parameters.

    Attributes:
        extractor: For the embedding extractor; stepped once an iteration.
        graph: For ``criterion.graph``; stepped twice, with one and the same optimizer state.
        classifier: For ``criterion.classifier``; stepped once.

    Raises:
        ValueError: Two of them hold the same parameter, which an iteration would then step with two gradients.
    """

    extractor: Optimizer
    graph: Optimizer
    classifier: Optimizer

    def __post_init__(self) -> None:
        owners: dict[int, str] = {}
        for name in ("extractor", "graph", "classifier"):
            for group in getattr(self, name).param_groups:
                for parameter in group["params"]:
                    owner = owners.setdefault(id(parameter), name)
                    if owner != name:
                        raise ValueError(
                            f"Optimizers: the optimizers of {owner} and {name} share a parameter of shape "
                            f"{tuple(parameter.shape)}; give each the parameters of its own part only"
                        )


class StepTerms(NamedTuple):
    """What one iteration computed, detached.

    Attributes:
        metric: Terms of the metric phase: ``n_pair``, ``synthetic``, ``node_ce``, ``total``.
        classifier: The classifier's loss (23), a scalar.
        generator: Terms of the generator phase: ``class_ce``, ``similarity``, ``diversity``, ``total``; None
            where the iteration was given up before it.
        skipped: Empty, or why nothing was updated: ``"loss"``, ``"gradient"``, or ``"scale"`` (an overflow
            under a GradScaler, which is part of normal float16 training).
    """

    metric: Any
    classifier: Tensor
    generator: Any
    skipped: str = ""

    def named(self) -> dict[str, Tensor]:
        """All terms in one flat dictionary; the totals of the phases are ``metric`` and ``generator``."""
        phases = [("metric", self.metric), ("generator", self.generator)]
        flat = {
            name if name != "total" else phase: value
            for phase, terms in phases
            if terms is not None
            for name, value in terms._asdict().items()
        }
        return {**flat, "classifier": self.classifier}


def train_step(
    extractor: nn.Module,
    criterion: nn.Module,
    inputs: Any,
    labels: Tensor,
    optimizers: Optimizers,
    *,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    mix: tuple[Tensor | None, Tensor | None] | None = None,
    generator: torch.Generator | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
) -> StepTerms:
    """Run one iteration: metric phase, classifier, generator phase, in the order of (28).

    1. Embed, build the graph, differentiate the metric total (22). Clip the gradients of extractor and graph
       network, step both.
    2. Step the classifier on (23), never clipped; the embeddings are constant.
    3. Rebuild the graph on the same, now constant, embeddings with the stepped graph network and classifier,
       differentiate the generator total (27), clip, step the graph network again. The gradient that (27) has
       for the classifier is thrown away.
    4. Feed the averages of (29): ``criterion.schedule.update(J_m, J_gen)``. ``end_epoch`` is the caller's.

    Gradients are reset to None before each phase and at the end, so a parameter without a gradient in a phase
    is not moved by it, not even by momentum or decay. Gradients that the caller left in ``.grad`` are
    dropped.

    Where a loss or gradient is not finite in any phase, or an exception ends the call, the whole iteration is
    undone: parameters, optimizer states, the extractor's buffers (batch norm statistics) and the averages are
    bit-equal to before. ``skipped`` says why. To that end the step of the extractor waits until the generator
    phase is known to be good, which no phase can see, and the other two are copied for the time of the call.

    Args:
        extractor: Maps ``inputs`` to embeddings (N, D).
        criterion: :class:`gcng.losses.GCAHNGLoss` or a module with its methods.
        inputs: One batch, whatever ``extractor`` takes.
        labels: (N,) integers.
        optimizers: See :class:`Optimizers`.
        clip_value: Clamp each gradient element of extractor and graph network to ± this.
        clip_norm: Scale the gradients of each of the two to at most this norm.
        mix: Numbers of (18), each (K, K-1), for the metric and the generator phase; drawn where None.
        generator: CPU generator of the mixing numbers and dropout seeds.
        scaler: For float16 autocast. Updated after the metric and after the generator phase.
        autocast: Run the forward passes under autocast with this dtype.

    Returns:
        The detached terms.

    Raises:
        ValueError: Both kinds of clipping are asked for, a bound is not positive, or ``mix`` is not a pair.

    Memory:
        The metric phase's graph is freed before the generator phase is built. One copy of the parameters of
        graph network and classifier and of their optimizer states (with AdamW: three times their size).

    Source:
        Formulas (22), (23), (27), (28), (29).

    Example:
        >>> terms = train_step(extractor, criterion, images, labels, optimizers, clip_value=10.0)
        >>> float(terms.metric.total), float(terms.generator.total)
    """
    _check_arguments(clip_value, clip_norm, mix)
    mixes = (None, None) if mix is None else mix
    scaler = scaler if scaler is not None and scaler.is_enabled() else None
    forward = _forward_context(extractor, autocast)
    with _Transaction(extractor, criterion, optimizers) as transaction:
        # Metric phase: differentiate (22), and (23) beside it, so that one check covers both.
        with forward():
            embeddings = extractor(inputs)
            metric = criterion.metric_terms(embeddings, labels, mix=mixes[0], generator=generator)
        _backward(metric.total, scaler)
        criterion.classifier.zero_grad()  # it learns from (23) alone
        embeddings = embeddings.detach()
        with forward():
            classifier_loss = criterion.classifier_loss(embeddings, labels)
        _backward(classifier_loss, scaler)
        metric, classifier_loss = _detached(metric), classifier_loss.detach()
        trained = (extractor, criterion.graph, criterion.classifier)
        used = (optimizers.extractor, optimizers.graph, optimizers.classifier)
        skipped = _not_finite((metric.total, classifier_loss), trained, used, scaler)
        if skipped:
            transaction.undo()
            return StepTerms(metric, classifier_loss, None, skipped)
        _clip(extractor, clip_value, clip_norm)  # its step waits, its gradients stay
        _clip(criterion.graph, clip_value, clip_norm)
        optimizers.graph.step()
        optimizers.classifier.step()

        # Generator phase: the same embeddings, the stepped graph network and classifier.
        criterion.zero_grad()
        with forward():
            generated = criterion.generator_terms(embeddings, labels, mix=mixes[1], generator=generator)
        _backward(generated.total, scaler)
        generated = _detached(generated)
        skipped = _not_finite((generated.total,), (criterion.graph,), (optimizers.graph,), scaler)
        if skipped:
            transaction.undo()
            return StepTerms(metric, classifier_loss, generated, skipped)
        _clip(criterion.graph, clip_value, clip_norm)
        criterion.classifier.zero_grad()
        optimizers.graph.step()
        optimizers.extractor.step()
        criterion.schedule.update(metric.n_pair, generated.total)
    return StepTerms(metric, classifier_loss, generated)


def _check_arguments(clip_value: float | None, clip_norm: float | None, mix: Any) -> None:
    if clip_value is not None and clip_norm is not None:
        raise ValueError("train_step: clip_value and clip_norm are both given; give one of them")
    for name, bound in (("clip_value", clip_value), ("clip_norm", clip_norm)):
        if bound is not None and not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"train_step: {name} must be positive and finite, got {bound}; None is off")
    if mix is not None and (isinstance(mix, Tensor) or len(mix) != 2):
        raise ValueError("train_step: mix must be a pair (metric phase, generator phase) of (K, K-1) tensors or None")


def _forward_context(extractor: nn.Module, dtype: torch.dtype | None):
    if dtype is None:
        return contextlib.nullcontext
    parameter = next(extractor.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    return lambda: torch.autocast(device, dtype=dtype)


def _backward(loss: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    if loss.requires_grad:  # everything that the loss depends on may be frozen
        (loss if scaler is None else scaler.scale(loss)).backward()


def _detached(terms: Any) -> Any:
    return type(terms)(*(value.detach() for value in terms))


def _gradients(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


def _not_finite(
    losses: tuple[Tensor, ...],
    modules: tuple[nn.Module, ...],
    optimizers: tuple[Optimizer, ...],
    scaler: torch.amp.GradScaler | None,
) -> str:
    """Why the phase must not be applied, or an empty string. Unscales gradients. One host read."""
    gradients = _gradients(modules)
    if scaler is not None:
        for optimizer in optimizers:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                scaler.unscale_(optimizer)
        if gradients:
            scaler.update()
    largest = torch.nn.utils.get_total_norm(gradients, float("inf"))
    total = sum(loss.float() for loss in losses)
    loss_is_finite, gradient_is_finite = torch.stack([total.isfinite(), largest.isfinite().to(total.device)]).tolist()
    if not loss_is_finite:
        return "loss"
    if not gradient_is_finite:
        return "gradient" if scaler is None else "scale"
    return ""


def _clip(module: nn.Module, clip_value: float | None, clip_norm: float | None) -> None:
    if clip_value is not None:
        nn.utils.clip_grad_value_(module.parameters(), clip_value)
    elif clip_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), clip_norm)


class _Transaction:
    """Copies what an iteration changes before it is known to be good, and puts it back on demand.

    The extractor's parameters are not copied: their optimizer is stepped last. On leaving, all gradients are
    dropped; on an exception everything is put back first.
    """

    def __init__(self, extractor: nn.Module, criterion: nn.Module, optimizers: Optimizers) -> None:
        self._modules = (extractor, criterion)
        self._optimizers = (optimizers.graph, optimizers.classifier)
        copied = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        self._tensors = [*copied, *extractor.buffers()]
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._states = [
            {parameter: _copied(state) for parameter, state in optimizer.state.items()}
            for optimizer in self._optimizers
        ]

    def undo(self) -> None:
        """Put parameters, buffers and optimizer states back, bit for bit."""
        with torch.no_grad():
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(copy)
        for optimizer, states in zip(self._optimizers, self._states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(states)

    def __enter__(self) -> _Transaction:
        self._drop_gradients()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.undo()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for module in self._modules:
            module.zero_grad()  # to None


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
