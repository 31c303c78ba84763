"""The correlation graph (1)-(14) as a module: parameters, node layers, and the edges as a lazy field."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from gcng import reference
from gcng.memory import MemoryPlan, available_memory, default_budget, parse_bytes, plan_memory
from gcng.mode import in_reference_mode
from gcng.nn.field import DenseEdges, DropoutState, EdgeField, GateParameters
from gcng.nn.layers import EdgeLayer, NodeLayer
from gcng.ops.correlation import center_normalize
from gcng.ops.dispatch import operand_dtype
from gcng.ops.layout import ClassMajor, class_major_beside
from gcng.ops.transfers import capturing, sent
from gcng.ops.validation import (
    autocasts,
    check_beside_parameters,
    check_channels,
    check_float_matrix,
    check_labels,
    refuse_batched,
)


@dataclass(frozen=True)
class GraphOutput:
    """What :class:`CorrelationGraph` returns, in the order of the batch."""

    nodes: Tensor  # (N, D) f_L, before its batch norm
    graph: CorrelationGraph
    edges: EdgeField | DenseEdges
    layout: ClassMajor

    @property
    def node_logits(self) -> Tensor:
        """(N, C): the node classifier on batch-normalized nodes (14)."""
        return self.graph.node_classifier(self.graph.normalize_nodes(self.nodes))

    def gates(self, i: Tensor, j: Tensor) -> Tensor:
        """Channel gates (14) of pairs (anchor i, negative j), (len(i), D), in (0, 1).

        Args:
            i, j: (B,) int64 batch positions, from 0 to N - 1.

        Raises:
            TypeError: not 1-D int64 tensors. ValueError: different shapes, or (on the CPU, where looking costs no
                wait) a position outside the batch.

        Memory: O(B D) beside the batch statistics of the edges, which take one pass over all pairs.
        """
        for name, index in (("i", i), ("j", j)):
            if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64:
                raise TypeError(f"gates: {name} must be a 1-D int64 tensor of batch positions")
        if i.shape != j.shape:
            raise ValueError(f"gates: i has shape {tuple(i.shape)} but j has shape {tuple(j.shape)}")
        slot = self.layout.inverse
        for name, index in (("i", i), ("j", j)):
            _check_positions(name, index, slot.shape[0])
        return self.edges.gates(self.graph.gate_parameters(), slot[i], slot[j])


class CorrelationGraph(nn.Module):
    """Message passing over all pairs of a batch; nothing of size N * N * D is stored unless the budget allows half.

    Args:
        embedding_size: D, divisible by ``num_heads``. num_classes: C training classes of the node classifier.
        num_layers: L. num_heads: H. dropout: probability of (11) in training; counter-based, keyed by
            (seed, layer, unordered pair), so that it does not depend on tiles or on the order of the batch.
        memory_budget: bytes or a size such as "2GiB" for everything that a call keeps; None is 640 MiB on the CPU
            (less if less than four times that is free) and half of what is free on a GPU.

    Shapes: embeddings (N, D) floating, labels (N,) integers in any order -> :class:`GraphOutput`.

    Source: formulas (1)-(14) of docs/maths.md (Peng et al., IJCV 2025).
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        num_layers: int = 1,
        num_heads: int = 2,
        dropout: float = 0.1,
        *,
        memory_budget: int | float | str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(embedding_size, num_classes, num_layers, num_heads, dropout)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.num_layers, self.num_heads, self.dropout = num_layers, num_heads, dropout
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.input = nn.Linear(embedding_size, embedding_size)
        self.node_layers = nn.ModuleList(NodeLayer(embedding_size, num_heads) for _ in range(num_layers))
        self.edge_layers = nn.ModuleList(EdgeLayer(embedding_size) for _ in range(num_layers))
        # Batch norms with a gain only; their statistics are the batch's in training and evaluation alike (9b).
        self.edge_norm_weight = nn.Parameter(torch.ones(embedding_size))
        self.node_norm_weight = nn.Parameter(torch.ones(embedding_size))
        self.gate = nn.Linear(embedding_size, embedding_size)
        self.node_classifier = nn.Linear(embedding_size, num_classes)

    def extra_repr(self) -> str:
        return (
            f"{self.embedding_size}, num_classes={self.num_classes}, num_layers={self.num_layers}, "
            f"num_heads={self.num_heads}, dropout={self.dropout}"
        )

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
    ) -> GraphOutput:
        """Run the graph; ``generator`` draws the 64-bit dropout seed (training with dropout only)."""
        check_batch("CorrelationGraph", embeddings, labels, self.embedding_size)
        check_beside_parameters("CorrelationGraph", embeddings, self.input.weight)
        layout = class_major_beside("CorrelationGraph", labels, None, embeddings.device)
        return self.run(embeddings, layout, self.draw_dropout(generator))

    def draw_dropout(self, generator: torch.Generator | None) -> DropoutState:
        """One 64-bit seed for a phase, drawn on the CPU; nothing is drawn without dropout.

        While a CUDA graph is captured the GPU's default generator draws it, so that every replay has its own. It lies
        on the graph's device in both cases: what the warm-up compiles is then what the capture calls.
        """
        if not self.training or self.dropout == 0:
            return DropoutState(torch.zeros((), dtype=torch.int64), 0.0)
        device, bounds = self.input.weight.device, torch.iinfo(torch.int64)
        place = {"device": device} if capturing(device) else {"generator": generator}
        return DropoutState(sent(torch.randint(bounds.min, bounds.max, (), **place), device), self.dropout)

    def memory_plan(self, embeddings: Tensor) -> MemoryPlan:
        """What to keep for the backward of a batch like this one."""
        return memory_plan(embeddings, self.num_layers, self.memory_budget)

    def run(self, embeddings: Tensor, layout: ClassMajor, dropout: DropoutState) -> GraphOutput:
        """The graph on a batch whose class structure is known."""
        z = embeddings.index_select(0, layout.order)
        if in_reference_mode():
            nodes, edges = self._dense(z, layout, dropout)
        else:
            nodes, edges = self._tiled(z, layout, dropout)
        return GraphOutput(nodes.index_select(0, layout.inverse), self, edges, layout)

    def _tiled(self, z: Tensor, layout: ClassMajor, dropout: DropoutState) -> tuple[Tensor, EdgeField]:
        field = EdgeField(center_normalize(z), False, (), 0, layout, dropout, self.memory_plan(z))
        f = self.input(z)
        for node_layer, edge_layer in zip(self.node_layers, self.edge_layers, strict=True):
            # The last layer stays lazy: only what asks for it knows whether a gradient will come back.
            field = field.materialize()
            f = node_layer(f, field, layout.class_index)
            field = field.extend(edge_layer.chain(f))
        return f, field

    def _dense(self, z: Tensor, layout: ClassMajor, dropout: DropoutState) -> tuple[Tensor, DenseEdges]:
        scales = None
        if dropout.p:
            identity = layout.identity
            layers = [
                torch.stack(reference.dropout_scales(dropout.seed, layer, dropout.p, identity, identity), -1)
                for layer in range(self.num_layers)
            ]
            scales = torch.stack(layers).to(z.dtype)
        dense = reference.graph(
            z, layout.labels, self.reference_parameters(),
            num_layers=self.num_layers, num_heads=self.num_heads, scales=scales,
        )  # fmt: skip
        return dense.nodes[-1], DenseEdges(dense.gate, layout)

    def normalize_nodes(self, nodes: Tensor) -> Tensor:
        """Batch norm over the nodes, gain only, (N, D)."""
        return reference.batch_norm(nodes, self.node_norm_weight)[0]

    def gate_parameters(self) -> GateParameters:
        """The head (14) as the field's ops take it."""
        return GateParameters(self.edge_norm_weight, self.gate.weight, self.gate.bias)

    def reference_parameters(self) -> dict[str, Tensor]:
        """Parameters by the names of docs/maths.md and tests/golden, e.g. ``edge0.ff1.w``."""
        # Not get_parameter, which refuses the plain tensors that torch.func.functional_call puts in their place.
        return {name: attrgetter(path)(self) for name, path in parameter_names(self.num_layers).items()}


def memory_plan(embeddings: Tensor, num_layers: int, budget: int | None) -> MemoryPlan:
    """What the ops on a batch like ``embeddings`` (N, D) keep within ``budget`` bytes; None is the device's default."""
    n, width = embeddings.shape
    if budget is None:
        budget = _default_budget(embeddings.device)
    dtype, device = embeddings.dtype, embeddings.device.type
    if autocasts(embeddings.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # Asked of the passes that will run: without Triton a GPU holds 16-bit operands in 32 bits.
    held = _held_dtype(dtype, embeddings.device)
    name, operand = (str(kind).removeprefix("torch.") for kind in (dtype, held))
    return plan_memory(max(n, 1), width, num_layers, dtype=name, device=device, operand=operand, budget=budget).plan


@torch.compiler.assume_constant_result
def _default_budget(device: torch.device) -> int:
    """What a device offers now; a compiled function keeps what it offered when it was compiled."""
    return _gpu_budget(device) if device.type == "cuda" else default_budget(available_memory())


@torch.compiler.assume_constant_result
def _held_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of a dtype are held in; loads the passes of a device, which no trace can follow."""
    return operand_dtype(torch.empty((), dtype=dtype, device=device))


# To ask the driver takes up to a millisecond, which small batches would see in every iteration.
_SECONDS_BETWEEN_QUESTIONS = 1.0
_last_gpu_budget: dict[torch.device, tuple[int, float]] = {}  # and when it was asked for


def _gpu_budget(device: torch.device) -> int:
    """Half of what is free on a GPU, with what torch has in its cache; asked for once a second at most.

    An answer within a tenth of the last one changes nothing, so that gradients which come and go do not change a plan
    between two phases. While a CUDA graph is captured: what the call before had, so that the warm-up and the capture
    follow one plan, whose kernels are compiled.
    """
    last = _last_gpu_budget.get(device)
    now = time.monotonic()
    if last is None or (now - last[1] >= _SECONDS_BETWEEN_QUESTIONS and not capturing(device)):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = (torch.cuda.mem_get_info(device)[0] + cached) // 2
        if last is not None and abs(budget - last[0]) <= last[0] // 10:
            budget = last[0]
        last = _last_gpu_budget[device] = budget, now
    return last[0]


_NODE_NAMES = {
    "q": "query", "k": "key", "v": "value", "o": "output", "e2n": "edge_to_node", "ff1": "ff1", "ff2": "ff2",
    "ln": "norm",
}  # fmt: skip
_EDGE_NAMES = {
    "q": "query", "k": "key", "v": "value", "n2e": "node_to_edge", "ff1": "ff1", "ffln": "ff_norm", "ff2": "ff2",
    "ln": "norm",
}  # fmt: skip


def parameter_names(num_layers: int) -> dict[str, str]:
    """Name of every parameter in docs/maths.md -> its path in :class:`CorrelationGraph`."""
    modules = {"inp": "input", "gate": "gate", "ncls": "node_classifier"}
    for layer in range(num_layers):
        modules |= {f"node{layer}.{short}": f"node_layers.{layer}.{name}" for short, name in _NODE_NAMES.items()}
        modules |= {f"edge{layer}.{short}": f"edge_layers.{layer}.{name}" for short, name in _EDGE_NAMES.items()}
    names = {f"{short}.{end[0]}": f"{path}.{end}" for short, path in modules.items() for end in ("weight", "bias")}
    return names | {"bn_edge.w": "edge_norm_weight", "bn_node.w": "node_norm_weight"}


def check_batch(op: str, embeddings: Tensor, labels: Tensor, width: int) -> None:
    """Checks that every entry point shares: shapes, dtypes and devices of a batch."""
    check_float_matrix(op, "embeddings", embeddings)
    refuse_batched(op, embeddings)
    check_channels(op, "embeddings", embeddings)
    if embeddings.shape[1] != width:
        raise ValueError(
            f"{op}: embeddings has shape {tuple(embeddings.shape)}; expected (N, D) with D = embedding_size = {width}"
        )
    check_labels(op, labels, embeddings.shape[0])
    if labels.device != embeddings.device and labels.device.type != "cpu":
        raise ValueError(
            f"{op}: labels is on {labels.device} but embeddings is on {embeddings.device}; move one with .to(...)"
        )


def _check_positions(name: str, index: Tensor, n: int) -> None:
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (index < 0) | (index >= n)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise ValueError(f"gates: {name}[{at}] is {int(index[at])}; expected a batch position in [0, N) = [0, {n})")


def _check_sizes(embedding_size: int, num_classes: int, num_layers: int, num_heads: int, dropout: float) -> None:
    sizes = dict(
        embedding_size=embedding_size, num_classes=num_classes, num_layers=num_layers, num_heads=num_heads
    )
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"CorrelationGraph: {name} must be a positive integer, got {value!r}")
    if num_classes > 2**31 - 1:
        raise ValueError(f"CorrelationGraph: num_classes must be at most 2**31 - 1, got {num_classes}")
    if embedding_size % num_heads:
        raise ValueError(
            f"CorrelationGraph: embedding_size {embedding_size} is not divisible by num_heads {num_heads}"
        )
    if not (isinstance(dropout, (int, float)) and math.isfinite(dropout) and 0 <= dropout < 1):
        raise ValueError(f"CorrelationGraph: dropout must be in [0, 1), got {dropout!r}")
