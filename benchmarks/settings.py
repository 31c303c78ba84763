"""Sizes of a measurement, the grids that are shipped, and the operations that a formulation needs for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

TRAINING_CLASSES = 100


@dataclass(frozen=True, order=True)
class Setting:
    """One size: N samples in classes of K, embedding width D, L layers, H heads, C training classes.

    `classes` 0 means max(100, M). An op uses what it has: for `class_cross_entropy` N are rows, for `retrieval` rows
    of the gallery, all of which are queries.
    """

    num_layers: int
    embedding_size: int
    samples: int
    samples_per_class: int = 2
    num_heads: int = 2
    dropout: float = 0.0
    classes: int = 0

    def __post_init__(self) -> None:
        if self.samples % self.samples_per_class:
            raise ValueError(
                f"Setting: samples is {self.samples}, not a multiple of samples_per_class "
                f"{self.samples_per_class}; choose N = M K"
            )

    @property
    def name(self) -> str:
        """The setting in words that fit a test id; K and C only where they are not the usual ones."""
        extra = f"-K{self.samples_per_class}" if self.samples_per_class != 2 else ""
        extra += f"-C{self.classes}" if self.classes else ""
        return f"N{self.samples}-D{self.embedding_size}-L{self.num_layers}{extra}"

    @property
    def batch_classes(self) -> int:
        """M, the classes of the batch."""
        return self.samples // self.samples_per_class

    @property
    def training_classes(self) -> int:
        """C, the classes of the training set: at least those of the batch."""
        return max(self.classes or TRAINING_CLASSES, self.batch_classes)

    @property
    def unordered_pairs(self) -> int:
        """Pairs r <= c, self pairs included."""
        return self.samples * (self.samples + 1) // 2

    def as_dict(self) -> dict:
        """The fields, for a results file."""
        return asdict(self)

    def pair_flops(self, formulation: str = "useful") -> float:
        """Floating-point operations of an iteration's maps over edges."""
        units = units_per_pair(formulation, self.num_layers)
        return units * float(self.embedding_size**2) * self.unordered_pairs

    def classifier_flops(self) -> float:
        """Operations of (24) on the N M synthetic rows: logits, and two gradients of the same size."""
        rows = self.samples * self.batch_classes
        return 6.0 * rows * self.training_classes * self.embedding_size

    def useful_flops(self) -> float:
        """Operations of an iteration that no formulation over unordered pairs leaves out; nothing recomputed."""
        return self.pair_flops() + self.classifier_flops()


def sweep(base: Setting, **values: Iterable[int]) -> Iterator[Setting]:
    """The base with one field at a time set to each of its values."""
    for name, choices in values.items():
        for choice in choices:
            yield replace(base, **{name: choice})


def unique(settings: Iterable[Setting]) -> list[Setting]:
    """Every setting once, in the order of its first appearance."""
    return list(dict.fromkeys(settings))


def units_per_pair(formulation: str, num_layers: int) -> int:
    """Floating-point operations of the maps over edges, per UNORDERED pair, in units of D^2, both phases.

    One multiply-add is two operations; an ordered formulation does each map twice for a pair. Counted with
    m = multiply-adds per edge and layer of the edge layer, 1 for the messages (7), 1 for the gate (14):

    ==============  ===============  =================================================================
    formulation     operations       m
    ==============  ===============  =================================================================
    ``published``   4 per unit       13 (query 1, key 2, value 2, MLP 8), ordered pairs
    ``reference``   4 per unit       9 (query folded into the edge 1, MLP 8), ordered pairs
    ``useful``      2 per unit       8 (MLP), unordered pairs, nothing recomputed
    ==============  ===============  =================================================================

    Forward, each phase: ``(m + 1) L + 1`` units. Backward of the metric phase: nothing reaches the gate or
    the last edge layer, so ``2 L + 2 m (L - 1)``. Backward of the generator phase: twice the forward, less
    the gradients for the first edges, which are constants there: 1 for the messages and 1 for the edge query
    where it is a map of the edge. That gives 240, 176 and 82 at L = 1. Not counted: maps of nodes, heads,
    norms, the synthesis.
    """
    operations, edge_layer, edge_query = {
        "published": (4, 13, 1),
        "reference": (4, 9, 1),
        "useful": (2, 8, 0),
    }[formulation]
    forward = (edge_layer + 1) * num_layers + 1
    metric_backward = 2 * num_layers + 2 * edge_layer * (num_layers - 1)
    generator_backward = 2 * forward - 1 - edge_query
    return operations * (2 * forward + metric_backward + generator_backward)


def executed_generator_units(num_layers: int, *, stash_edges: bool, stash_hidden: bool, stash_small: bool) -> int:
    """Operations of the pair products that gcng's generator phase EXECUTES, as `units_per_pair` counts them.

    What a memory plan does not keep is computed again: messages and gates (2 each), an edge layer (16). Backward: 2 for
    each gradient of a map of width D, 32 for those of an edge layer; the first edges are constants. Without any stash
    layer l is evaluated for the messages of every layer above it, for the statistics and for the gates; its backward
    runs for every layer of messages above it and twice, forward part only, for the head.
    """
    layers = range(num_layers)
    gradients = 4 + 2 * num_layers + 2 * (num_layers - 1)
    if not stash_edges:
        forward = 32 * num_layers + 2 + sum(16 * layer + 2 for layer in layers)
        again = 2 * (16 * num_layers + 2) + sum(16 * layer + 2 for layer in layers)
        return forward + again + gradients + 32 * num_layers + sum(32 * layer for layer in layers)
    again = (0 if stash_hidden else 16 * num_layers) + (0 if stash_small else 2 * num_layers + 2)
    return 18 * num_layers + 2 + again + gradients + 32 * num_layers
