"""The criterion: both phases of GCA-HNG as named losses, without an optimizer inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcng.batch_layout import BatchLayout
from gcng.losses.n_pair import n_pair
from gcng.losses.official import load_official_state_dict
from gcng.losses.schedule import LossAverages
from gcng.nn.graph import CorrelationGraph, check_batch
from gcng.ops.class_cross_entropy import linear_cross_entropy
from gcng.ops.layout import ClassMajor, class_major_beside
from gcng.ops.transfers import capturing, sent
from gcng.ops.validation import check_beside_parameters

CLASSIFIER_FACTOR = 10.0  # (23)


class MetricTerms(NamedTuple):
    """Losses of the metric phase, 0-dim."""

    n_pair: Tensor  # (19)
    synthetic: Tensor  # (21), weighted by 1 - gamma
    node_ce: Tensor  # cross-entropy of the graph's node predictions, (22)
    total: Tensor  # (22)


class GeneratorTerms(NamedTuple):
    """Losses of the generator phase, 0-dim."""

    class_ce: Tensor  # (24), soft_factor included
    similarity: Tensor  # (25), not weighted
    diversity: Tensor  # (26), not weighted
    total: Tensor  # (27)


class GCAHNGLoss(nn.Module):
    """Globally Correlation-Aware Hard Negative Generation as a loss.

    ``criterion(embeddings, labels)`` is the drop-in form: one backward, one optimizer over the extractor's and the
    criterion's parameters. The two-phase form of the paper uses :meth:`metric_terms`, :meth:`classifier_loss` and
    :meth:`generator_terms` with separate optimizers: see :func:`gcng.training.train_step`.

    Args:
        embedding_size: D. num_classes: C training classes; labels are class indices in [0, C).
        num_layers: L propagation layers. num_heads: H attention heads; divides D.
        alpha: hardness (16). beta: share of the synthetic loss (21). softmax_factor: of (24).
        similarity_weight, diversity_weight: of (27). l2_reg: of (19) and (20).
        dropout: probability of (11) in training.
        singletons: "skip": a class with one sample in the batch is a node and a negative, never an anchor;
            "error": ValueError naming the label.
        official_sim_mask: drop the entry that the authors' code drops in (25) instead of the own class (S1).
        memory_budget: see :class:`gcng.nn.CorrelationGraph`.

    Shapes: embeddings (N, D) floating, labels (N,) integers in any order, on the same device or on the CPU.
    Losses are 0-dim float32 (float64 for float64 embeddings), whatever the dtype of the embeddings.

    Memory: within ``memory_budget`` beside embeddings and parameters; see ``gcng.estimate_memory``.

    A CUDA graph can hold the losses with their backward: run them once before, with labels (and mix, if given) on the
    GPU, and keep the :class:`gcng.BatchLayout` that goes with them for as long as the graph is replayed.

    Source: docs/maths.md (Peng, Huang, Chen, Ke, Dai, Huang, IJCV 133(5), 2025, arXiv 2411.13145).

    Example:
        >>> criterion = gcng.losses.GCAHNGLoss(embedding_size=128, num_classes=100)
        >>> optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-4)
        >>> loss = criterion(model(images), labels)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        num_layers: int = 1,
        num_heads: int = 2,
        *,
        alpha: float = 5.0,
        beta: float = 20.0,
        softmax_factor: float = 20.0,
        similarity_weight: float = 20.0,
        diversity_weight: float = 60.0,
        l2_reg: float = 3e-3,
        dropout: float = 0.1,
        singletons: str = "skip",
        official_sim_mask: bool = False,
        memory_budget: int | float | str | None = None,
    ) -> None:
        super().__init__()
        options = dict(alpha=alpha, beta=beta, softmax_factor=softmax_factor, similarity_weight=similarity_weight)
        options |= dict(diversity_weight=diversity_weight, l2_reg=l2_reg)
        for name, value in options.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"GCAHNGLoss: {name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"GCAHNGLoss: {name} must be finite and not negative, got {value!r}")
            setattr(self, name, float(value))
        if singletons not in ("skip", "error"):
            raise ValueError(f'GCAHNGLoss: singletons must be "skip" or "error", got {singletons!r}')
        self.singletons, self.official_sim_mask = singletons, bool(official_sim_mask)
        self.graph = CorrelationGraph(
            embedding_size, num_classes, num_layers, num_heads, dropout, memory_budget=memory_budget
        )
        self.classifier = nn.Linear(embedding_size, num_classes)
        self.schedule = LossAverages()
        self.last_terms: dict[str, Tensor] = {}

    def metric_terms(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        mix: Tensor | None = None,
        generator: torch.Generator | None = None,
        layout: BatchLayout | None = None,
    ) -> MetricTerms:
        """(19)-(22). Embeddings are differentiated, also through the graph; gate, kappa, gamma are constants.

        Args:
            mix: (K, K - 1) numbers of (18), K the largest number of samples of a class; None draws
                ``torch.rand(K, K - 1, generator=generator)`` on the CPU, in float32 for every dtype.
            generator: of torch, on the CPU; draws mix and the dropout seed. While a CUDA graph is captured both come
                from the GPU's default generator instead, so that every replay draws new ones.
            layout: the batch's classes, known on the host: spares waiting for labels on a GPU.
        """
        batch = self._classes("metric_terms", embeddings, labels, layout)
        mix = self._mix("metric_terms", batch, mix, generator, embeddings)
        output = self.graph.run(embeddings, batch, self.graph.draw_dropout(generator))
        z = embeddings.index_select(0, batch.order)
        plain = n_pair(z, batch, l2_reg=self.l2_reg)
        kappa = self.schedule.hardness(self.alpha).to(embeddings.device)
        unweighted = output.edges.n_pair(z, self.graph.gate_parameters(), kappa, mix, self.l2_reg)
        # 1 - gamma in float64: in the first epoch gamma is 1 but for the fifth digit.
        share = (1 - self.schedule.generator_share(self.beta)).to(unweighted)
        synthetic = share * unweighted
        normalized = self.graph.normalize_nodes(output.nodes)
        head = self.graph.node_classifier
        node_ce = linear_cross_entropy(normalized, head.weight, labels, bias=head.bias)
        return MetricTerms(plain, synthetic, node_ce, plain + synthetic + node_ce)

    def classifier_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(23), its factor 10 included; the embeddings are detached."""
        self._check("classifier_loss", embeddings, labels)
        head = self.classifier
        return CLASSIFIER_FACTOR * linear_cross_entropy(embeddings.detach(), head.weight, labels, bias=head.bias)

    def generator_terms(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        mix: Tensor | None = None,
        generator: torch.Generator | None = None,
        layout: BatchLayout | None = None,
    ) -> GeneratorTerms:
        """(24)-(27); the embeddings are detached. Arguments as for :meth:`metric_terms`.

        The classifier gets a gradient here too, which the published training throws away: only
        :meth:`classifier_loss` trains it in ``criterion(...)`` and in ``train_step``.
        """
        return self._generator_terms(embeddings, labels, mix, generator, layout, train_classifier=True)

    def _generator_terms(
        self,
        embeddings: Tensor,
        labels: Tensor,
        mix: Tensor | None,
        generator: torch.Generator | None,
        layout: BatchLayout | None,
        *,
        train_classifier: bool,
    ) -> GeneratorTerms:
        batch = self._classes("generator_terms", embeddings, labels, layout)
        mix = self._mix("generator_terms", batch, mix, generator, embeddings)
        constants = embeddings.detach()
        output = self.graph.run(constants, batch, self.graph.draw_dropout(generator))
        z = constants.index_select(0, batch.order)
        weight, bias = self.classifier.weight, self.classifier.bias
        if not train_classifier:
            weight, bias = weight.detach(), bias.detach()
        kappa = self.schedule.hardness(self.alpha).to(embeddings.device)
        class_ce, similarity, diversity = output.edges.generator(
            z, self.graph.gate_parameters(), kappa, mix, self._dropped_class(batch), weight, bias
        )
        class_ce = self.softmax_factor * class_ce
        total = 0.5 * (class_ce + self.similarity_weight * similarity + self.diversity_weight * diversity)
        return GeneratorTerms(class_ce, similarity, diversity, total)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Metric total + classifier loss + generator total; every parameter gets the gradient of its own phase.

        In training mode it also feeds ``criterion.schedule``. ``criterion.last_terms`` holds the detached terms.
        """
        metric = self.metric_terms(embeddings, labels)
        classifier = self.classifier_loss(embeddings, labels)
        generator = self._generator_terms(embeddings, labels, None, None, None, train_classifier=False)
        if self.training:
            self.schedule.observe(metric.n_pair, generator.total)
        terms: dict[str, Tensor] = {f"metric_{k}" if k == "total" else k: v for k, v in metric._asdict().items()}
        terms |= {"classifier": classifier}
        terms |= {f"generator_{k}" if k == "total" else k: v for k, v in generator._asdict().items()}
        self.last_terms = {name: value.detach() for name, value in terms.items()}
        return metric.total + classifier + generator.total

    def parameter_groups(
        self, *, graph_lr: float | None = None, classifier_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the graph and of the classifier; a learning rate left out is the optimizer's."""
        groups: list[dict[str, Any]] = []
        for name, module, lr in (("graph", self.graph, graph_lr), ("classifier", self.classifier, classifier_lr)):
            group = {"params": list(module.parameters()), "name": name}
            groups.append(group if lr is None else group | {"lr": lr})
        return groups

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load an authors' checkpoint; returns the sorted list of unused keys (extractor, running statistics).

        Raises:
            KeyError: a key is missing or unknown. ValueError: a shape differs, or a batch-norm shift is not 0.
        """
        return load_official_state_dict(self, self.graph.num_layers, state_dict)

    def _check(self, op: str, embeddings: Tensor, labels: Tensor) -> None:
        check_batch(op, embeddings, labels, self.graph.embedding_size)
        check_beside_parameters(op, embeddings, self.classifier.weight)
        if labels.device.type == "cpu" and labels.numel():
            signed = labels.long()
            wrong = (signed < 0) | (signed >= self.graph.num_classes)
            if bool(wrong.any()):
                index = int(wrong.nonzero()[0, 0])
                raise ValueError(
                    f"{op}: labels[{index}] is {int(labels[index])}; expected a class index in [0, num_classes) = "
                    f"[0, {self.graph.num_classes})"
                )

    def _classes(self, op: str, embeddings: Tensor, labels: Tensor, layout: BatchLayout | None) -> ClassMajor:
        self._check(op, embeddings, labels)
        batch = class_major_beside(op, labels, layout, embeddings.device)
        # class_start stays where the labels are: no wait for a GPU if they are on the CPU.
        if self.singletons == "error" and bool((alone := batch.class_start.diff() == 1).any()):
            label = int(batch.labels[int(batch.class_start[:-1][alone][0])])
            raise ValueError(
                f'{op}: class {label} has one sample in the batch and singletons="error"; give every class at least '
                f'two samples (gcng.data.ClassBalancedBatchSampler does), or use singletons="skip"'
            )
        return batch

    def _mix(
        self,
        op: str,
        batch: ClassMajor,
        mix: Tensor | None,
        generator: torch.Generator | None,
        embeddings: Tensor,
    ) -> Tensor:
        most = max(int(batch.class_start.diff().max()), 1) if batch.rank.numel() else 1
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        if mix is None:
            if capturing(embeddings.device):
                return torch.rand(most, most - 1, dtype=dtype, device=embeddings.device)
            # float32 for every dtype: one seed means the same numbers, and the same dropout seed drawn after them.
            mix = torch.rand(most, most - 1, generator=generator, dtype=torch.float32)
            return sent(mix, embeddings.device, dtype)
        mix = torch.as_tensor(mix)
        if tuple(mix.shape) != (most, most - 1):
            raise ValueError(
                f"{op}: mix has shape {tuple(mix.shape)}; expected (K, K - 1) = ({most}, {most - 1}), K the largest "
                f"number of samples of a class in the batch"
            )
        return sent(mix, embeddings.device, dtype)

    def _dropped_class(self, batch: ClassMajor) -> Tensor:
        """Class whose entry (25) counts as 0, for every class-major slot."""
        if not self.official_sim_mask:
            return batch.class_index
        counts = batch.class_start.diff()
        counts = counts[counts > 0]
        if counts.numel() and bool((counts != counts[0]).any()):
            raise ValueError(
                "generator_terms: official_sim_mask=True needs the same number of samples of every class, got "
                f"{int(counts.min())} to {int(counts.max())}; use official_sim_mask=False for ragged batches"
            )
        num_classes = counts.numel()
        return (batch.rank * num_classes + batch.class_index) // int(counts[0]) if num_classes else batch.class_index
