"""Op (7), what the edges of a node tell it: gcng and the definition, which is also the published formulation."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.fields import class_major_labels, edge_field
from benchmarks.operations import Form, Inputs, Operation, Work, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import dense, in_gcng
from benchmarks.settings import Setting
from gcng import reference


def make_inputs(setting: Setting) -> Inputs:
    """Unit nodes u (N, D), whose products are the first edges, and the map (D, D), (D,)."""
    N, D = setting.samples, setting.embedding_size
    u = torch.nn.functional.normalize(normal(N, D), dim=1)
    tensors = {"u": u, "weight": normal(D, D, seed=1, scale=D**-0.5), "bias": normal(D, seed=2, scale=0.1)}
    return Inputs(setting, tensors, ("u", "weight", "bias"))


def work(setting: Setting, item: int) -> dict[str, Work]:
    """One map of every unordered pair forward, two products backward; nodes and weights once."""
    D = setting.embedding_size
    product = 2.0 * D * D * setting.unordered_pairs
    vectors = float((2 * setting.samples * D + D * D) * item)
    return {"forward": Work(product, vectors), "backward": Work(2 * product, 2 * vectors)}


def _by_gcng(inputs: Inputs) -> Form:
    setting = inputs.setting
    labels = class_major_labels(setting.samples, setting.samples_per_class)
    field = edge_field(inputs["u"], labels)
    linear = SimpleNamespace(weight=inputs["weight"], bias=inputs["bias"])
    return Form(lambda: (field.messages(linear),))


def _definition(inputs: Inputs) -> Tensor:
    u = inputs["u"]
    return reference.messages(u[:, None] * u[None], inputs["weight"], inputs["bias"])


OPERATION = Operation(
    name="messages",
    make_inputs=make_inputs,
    providers={**dense(_definition), **in_gcng(_by_gcng)},
    work=work,
    truth=("reference", "gcng"),
    dense_providers=frozenset({"reference", "reference-compiled"}),
)


def test_messages(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
