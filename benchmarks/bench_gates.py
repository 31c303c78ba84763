"""Op (14), batch statistics over all edges and the gates of some pairs: gcng, the definition, the published form.

Asked for as a user asks, ``output.gates(i, j)``, on edges that are kept: the statistics read every edge, the gate map
runs for the pairs alone. The dense forms gate all N² pairs, as (14) is written, and then pick.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fields import class_major_labels, edge_field, upper_triangle
from benchmarks.operations import SEED, Build, Form, Inputs, Operation, Work, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import dense, in_gcng
from benchmarks.settings import Setting
from gcng import reference
from gcng.nn.field import GateParameters

PAIRS = 1024


def make_inputs(setting: Setting) -> Inputs:
    """Packed edges e (P, D), the head's three tensors, and pairs i <= j (B,)."""
    N, D = setting.samples, setting.embedding_size
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(N, (2, PAIRS), generator=generator).sort(0).values
    tensors = {
        "e": normal(setting.unordered_pairs, D) + 0.3 * normal(D, seed=1),
        "norm": 1 + normal(D, seed=2, scale=0.1),
        "weight": normal(D, D, seed=3, scale=D**-0.5),
        "bias": normal(D, seed=4, scale=0.1),
        "i": chosen[0],
        "j": chosen[1],
    }
    return Inputs(setting, tensors, ("e", "norm", "weight", "bias"))


def work(setting: Setting, item: int) -> dict[str, Work]:
    """The map of B pairs forward, two products backward; edges read, and in the backward read and written."""
    D = setting.embedding_size
    edges, product = float(setting.unordered_pairs * D * item), 2.0 * PAIRS * D * D
    return {"forward": Work(product, edges), "backward": Work(2 * product, 2 * edges)}


def _by_gcng(inputs: Inputs) -> Form:
    setting = inputs.setting
    labels = class_major_labels(setting.samples, setting.samples_per_class)
    field = edge_field(inputs["e"], labels, packed=True)
    head = GateParameters(inputs["norm"], inputs["weight"], inputs["bias"])
    return Form(lambda: (field.gates(head, inputs["i"], inputs["j"]),))


def _dense_edges(inputs: Inputs) -> Tensor:
    """(N, N, D), both orders of a pair alike; a leaf of its own."""
    n, e = inputs.setting.samples, inputs["e"].detach()
    rows, columns = upper_triangle(n, e.device)
    out = e.new_empty((n, n, e.shape[-1]))
    out[rows, columns], out[columns, rows] = e, e
    return out.requires_grad_()


def _fold(grad: Tensor) -> Tensor:
    """Gradient of dense edges -> of packed ones: both orders of a pair, the self pair once."""
    n = grad.shape[0]
    rows, columns = upper_triangle(n, grad.device)
    once = (rows == columns)[:, None]
    return grad[rows, columns] + torch.where(once, torch.zeros_like(grad[rows, columns]), grad[columns, rows])


def _on_dense(gates: Callable[[Tensor, Inputs], Tensor], name: str) -> Build:
    """A build from a function that gates all pairs of dense edges; name: eager or compiled, as in `dense`."""

    def build(inputs: Inputs) -> Form:
        edges = _dense_edges(inputs)
        picked = dense(lambda given: gates(edges, given)[given["i"], given["j"]])
        return Form(picked[name](inputs).forward, leaves={"e": edges}, fold={"e": _fold})

    return build


def _definition(e: Tensor, inputs: Inputs) -> Tensor:
    return reference.gates(e, inputs["norm"], inputs["weight"], inputs["bias"])


def _by_batch_norm(e: Tensor, inputs: Inputs) -> Tensor:
    """As published: batch normalization of N² rows, then the map."""
    rows = F.batch_norm(e.flatten(0, 1), None, None, inputs["norm"], None, training=True)
    return torch.sigmoid(F.linear(rows, inputs["weight"], inputs["bias"])).view_as(e)


OPERATION = Operation(
    name="gates",
    make_inputs=make_inputs,
    providers={
        "reference": _on_dense(_definition, "reference"),
        "reference-compiled": _on_dense(_definition, "reference-compiled"),
        "published": _on_dense(_by_batch_norm, "reference"),
        **in_gcng(_by_gcng),
    },
    work=work,
    truth=("reference", "gcng"),
    dense_providers=frozenset({"reference", "reference-compiled", "published"}),
)


def test_gates(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
