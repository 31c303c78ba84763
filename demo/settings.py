"""Every number that the demo's trainings depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

METHODS = ("n-pair", "gca-hng")
METHOD_NAMES = {"n-pair": "N-pair (19)", "gca-hng": "GCA-HNG"}


@dataclass(frozen=True)
class Settings:
    """One training. The defaults were chosen by `demo.tune` on a part of the training classes.

    Attributes:
        classes_per_batch, samples_per_class: M and K.
        embedding_size: D. num_layers, num_heads: L and H of the graph.
        iterations: batches that each method sees.
        epoch_length: batches between two updates of the averages of (29).
        extractor_lr: peak of a one-cycle schedule, for both methods.
        graph_lr: start of a cosine schedule. classifier_lr: constant.
        alpha, beta, similarity_weight, diversity_weight: of (16), (21) and (27).
        clip_value: gradients of extractor and graph are clamped to it, element by element.
        probes: how often hardness and diversity are looked at during a training, beside its start and end.
        max_classes: training and test classes that are used; None takes all of them.
    """

    classes_per_batch: int = 40
    samples_per_class: int = 2
    embedding_size: int = 64
    num_layers: int = 1
    num_heads: int = 2
    iterations: int = 200
    epoch_length: int = 50
    extractor_lr: float = 1e-3
    extractor_decay: float = 1e-4
    graph_lr: float = 3e-4
    classifier_lr: float = 1e-3
    alpha: float = 5.0
    beta: float = 20.0
    similarity_weight: float = 20.0
    diversity_weight: float = 60.0
    clip_value: float = 10.0
    probes: int = 6
    max_classes: int | None = None

    @property
    def samples_per_batch(self) -> int:
        """N = M K."""
        return self.classes_per_batch * self.samples_per_class

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a results file."""
        return asdict(self)


SEEDS = (0, 1, 2, 3)
QUICK_SEEDS = (0,)
# Seconds in all, for a look at the whole path; its numbers say nothing about the methods.
QUICK = Settings(classes_per_batch=10, embedding_size=16, iterations=12, epoch_length=4, probes=2, max_classes=40)
