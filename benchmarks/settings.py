"""What is measured: the sizes, and the floating-point operations that each provider needs for them."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

SAMPLES = (80, 160, 320)
EMBEDDING_SIZES = (128, 512)
LAYERS = (1, 2)
LARGE_SAMPLES, LARGE_EMBEDDING_SIZE = 1024, 128  # one size that no dense form reaches
TRAINING_CLASSES = 100
PROVIDERS = ("published", "reference", "blocked")
# The published formulation without the graph that its first phase leaves alive; measured for memory only.
MEMORY_PROVIDERS = ("published", "published-freed", "reference", "blocked")
GEMM_ROWS = (
    1024  # rows of the yardstick product (GEMM_ROWS, D) @ (D, 4 D): a panel of pairs times the edge MLP
)


@dataclass(frozen=True, order=True)
class Setting:
    """One size of the benchmark: N samples in classes of K, embedding width D, L layers."""

    num_layers: int
    embedding_size: int
    samples: int
    samples_per_class: int = 2
    num_heads: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.samples % self.samples_per_class:
            raise ValueError(
                f"Setting: samples is {self.samples}, not a multiple of samples_per_class "
                f"{self.samples_per_class}; choose N = M K"
            )

    @property
    def name(self) -> str:
        """The setting in words that fit a test id."""
        return f"N{self.samples}-D{self.embedding_size}-L{self.num_layers}"

    @property
    def batch_classes(self) -> int:
        """M, the classes of the batch."""
        return self.samples // self.samples_per_class

    @property
    def training_classes(self) -> int:
        """C, the classes of the training set: at least those of the batch."""
        return max(TRAINING_CLASSES, self.batch_classes)

    @property
    def unordered_pairs(self) -> int:
        """Pairs r <= c, self pairs included."""
        return self.samples * (self.samples + 1) // 2

    def as_dict(self) -> dict:
        """The fields, for a results file."""
        return asdict(self)

    def useful_flops(self) -> float:
        """Floating-point operations of an iteration that no formulation over unordered pairs leaves out."""
        per_pair = units_per_pair("useful", self.num_layers) * float(self.embedding_size**2)
        return per_pair * self.unordered_pairs


def shipped_settings(dropout: float = 0.0) -> list[Setting]:
    """The settings of the shipped results: the full grid, and one large N."""
    return [*all_settings(dropout=dropout), Setting(1, LARGE_EMBEDDING_SIZE, LARGE_SAMPLES, dropout=dropout)]


def all_settings(
    samples=SAMPLES, embedding_sizes=EMBEDDING_SIZES, layers=LAYERS, dropout=0.0
) -> list[Setting]:
    """The full grid, smallest N first within each (D, L), so that peaks of larger ones can be predicted."""
    grid = itertools.product(sorted(embedding_sizes), sorted(layers), sorted(samples))
    return [Setting(L, D, N, dropout=dropout) for D, L, N in grid]


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
