"""Op (9)-(13), one edge layer on all pairs: gcng, the definition, and the published formulation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks import published
from benchmarks.fields import class_major_labels, edge_field, upper_triangle
from benchmarks.operations import Form, Inputs, Operation, Work, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import dense, in_gcng
from benchmarks.settings import Setting
from gcng import reference
from gcng.nn.layers import EdgeLayer

# Name of each map in docs/maths.md -> its width in and out, in units of D.
MAPS = {"n2e": (1, 1), "q": (1, 1), "k": (1, 1), "v": (1, 1), "ff1": (1, 4), "ff2": (4, 1)}
NORMS = {"ffln": 4, "ln": 1}
MODULES = {"n2e": "node_to_edge", "q": "query", "k": "key", "v": "value", "ff1": "ff1", "ff2": "ff2"} | {
    "ffln": "ff_norm", "ln": "norm",
}  # fmt: skip


def make_inputs(setting: Setting) -> Inputs:
    """Unit nodes u (N, D), nodes f (N, D) and the parameters of a layer by their names in docs/maths.md."""
    N, D = setting.samples, setting.embedding_size
    tensors = {"u": torch.nn.functional.normalize(normal(N, D), dim=1), "f": normal(N, D, seed=1)}
    for seed, (name, (wide, out)) in enumerate(MAPS.items(), 10):
        tensors[f"{name}.w"] = normal(out * D, wide * D, seed=seed, scale=(wide * D) ** -0.5)
        tensors[f"{name}.b"] = normal(out * D, seed=seed + 20, scale=0.1)
    for seed, (name, width) in enumerate(NORMS.items(), 50):
        tensors[f"{name}.w"] = 1 + normal(width * D, seed=seed, scale=0.1)
        tensors[f"{name}.b"] = normal(width * D, seed=seed + 20, scale=0.1)
    return Inputs(setting, tensors, tuple(tensors))


def work(setting: Setting, item: int) -> dict[str, Work]:
    """The two maps of the MLP, 16 D² a pair forward and twice that backward; the packed edges once."""
    D, pairs = setting.embedding_size, setting.unordered_pairs
    flops, edges = 16.0 * D * D * pairs, float(pairs * D * item)
    return {"forward": Work(flops, edges), "backward": Work(2 * flops, edges)}


def _parameters(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.tensors.items() if "." in name}


def _by_gcng(inputs: Inputs) -> Form:
    setting = inputs.setting
    labels = class_major_labels(setting.samples, setting.samples_per_class)
    layer = EdgeLayer(setting.embedding_size).to(inputs["u"])
    ends = {"w": "weight", "b": "bias"}
    renamed = {f"chain.{MODULES[k[:-2]]}.{ends[k[-1]]}": x for k, x in _parameters(inputs).items()}
    chain = _Chain(layer)
    field = edge_field(inputs["u"], labels)
    return Form(lambda: (field.extend(functional_call(chain, renamed, (inputs["f"],))).materialize().base,))


class _Chain(torch.nn.Module):
    """`EdgeLayer.chain` as a forward, so that parameters can be passed to it."""

    def __init__(self, layer: EdgeLayer) -> None:
        super().__init__()
        self.chain = layer

    def forward(self, f: Tensor) -> list[Tensor]:
        return self.chain.chain(f)


def _packed_layout(n: int, device: torch.device) -> dict:
    """How a dense (N, N, D) result is compared with packed edges: its upper triangle, and a gradient of that alone."""
    rows, columns = upper_triangle(n, device)

    def spread(grad: Tensor) -> Tensor:
        out = grad.new_zeros((n, n, grad.shape[-1]))
        out[rows, columns] = grad
        return out

    return {"canonical": lambda e: e[rows, columns], "upstream": spread}


def _definition(inputs: Inputs) -> Tensor:
    u = inputs["u"]
    return reference.edges(u[:, None] * u[None], inputs["f"], _parameters(inputs))


def _dense(build):
    def laid_out(inputs: Inputs) -> Form:
        layout = _packed_layout(inputs.setting.samples, inputs["u"].device)
        return Form(build(inputs).forward, **layout)

    return laid_out


def _published(inputs: Inputs) -> Form:
    layer = published.EdgeLayer(inputs.setting.embedding_size, 0.0).to(inputs["u"])
    ends = {"w": "weight", "b": "bias"}
    parameters = {f"{k[:-1]}{ends[k[-1]]}": x for k, x in _parameters(inputs).items()}

    def forward() -> tuple[Tensor]:
        u = inputs["u"]
        return (functional_call(layer, parameters, (inputs["f"], u[:, None] * u[None])),)

    return Form(forward)


OPERATION = Operation(
    name="edges",
    make_inputs=make_inputs,
    providers={
        **{name: _dense(build) for name, build in dense(_definition).items()},
        "published": _dense(_published),
        **in_gcng(_by_gcng),
    },
    work=work,
    truth=("reference", "gcng"),
    dense_providers=frozenset({"reference", "reference-compiled", "published"}),
    # The key bias shifts both logits alike.
    arrays_skipped=frozenset({"grad k.b"}),
)


def test_edges(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
