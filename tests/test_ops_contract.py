"""What every op that works on class structure or pairs owes PyTorch, checked for all of them alike.

Compiled with sizes that change, differentiated one input at a time, repeated, numerically differentiated, and under
autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gcng import functional as F
from gcng import reference
from gcng.ops.edges import edges
from gcng.ops.gates import edge_moments
from gcng.ops.generator import generator_synthesis
from gcng.ops.layout import class_major
from gcng.ops.messages import messages
from gcng.ops.n_pair import n_pair_synthesis
from tests.edge_chains import fold, make_layer
from tests.op_checks import check_compiled
from tests.run_case import check_contract, check_subsets, random_upstream

CLASSES = 7
SHARED = ("labels", "class_start", "identity", "seed", "mix", "kappa")
CHAIN = ("key", "key_bias", "value", "ff1_w", "ff1_b", "ffln_w", "ffln_b", "ff2_w", "ff2_b", "ln_w", "ln_b")
FIELD = ("base", *CHAIN)
HEAD = ("norm_weight", "gate_weight", "gate_bias")


@dataclass(frozen=True)
class Op:
    """One op by name: how it is called with named tensors, and which of them it differentiates."""

    call: Callable[..., tuple[Tensor, ...]]
    differentiable: tuple[str, ...]
    constants: tuple[str, ...] = ()


def field(t: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """The arguments of an edge field with one layer and dropout."""
    return t["base"], False, [t[name] for name in CHAIN], t["identity"], t["seed"], 0.3, 0


def head(t: Mapping[str, Tensor]) -> list[Tensor]:
    return [t[name] for name in HEAD]


def synthesis_batch(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return t["z"], t["kappa"], t["mix"], t["class_start"]


def call_messages(pairs: int, stash: bool, **t: Tensor) -> tuple[Tensor, ...]:
    return messages(*field(t), t["weight"], t["bias"], pairs, stash)[:1]


def call_edges(pairs: int, stash: bool, **t: Tensor) -> tuple[Tensor, ...]:
    return edges(*field(t), pairs, stash)[:1]


def call_edge_moments(pairs: int, stash: bool, **t: Tensor) -> tuple[Tensor, ...]:
    return tuple(edge_moments(*field(t), pairs))


def call_n_pair(pairs: int, stash: bool, **t: Tensor) -> tuple[Tensor, ...]:
    return n_pair_synthesis(*synthesis_batch(t), *field(t), *head(t), 3e-3, pairs, stash)[:1]


def call_generator(pairs: int, stash: bool, **t: Tensor) -> tuple[Tensor, ...]:
    # The entry of (25) that is dropped: any of the batch's classes, here that of the sample before.
    dropped = t["labels"].roll(1) % 2
    return generator_synthesis(
        *synthesis_batch(t), *field(t), *head(t), t["labels"], dropped, t["weight"], t["bias"], pairs, stash
    )[:3]


def call_synthesis(pairs: int, stash: bool, **t: Tensor) -> tuple[Tensor, ...]:
    return (F.synthesize_negatives(t["z"], t["labels"], t["gate"], kappa=t["kappa"], mix=t["mix"]),)


OPS = {
    "messages": Op(call_messages, (*FIELD, "weight", "bias")),
    "edges": Op(call_edges, FIELD),
    "edge_moments": Op(call_edge_moments, FIELD),
    "n_pair_synthesis": Op(call_n_pair, ("z",), (*FIELD, *HEAD)),
    "generator_synthesis": Op(call_generator, (*FIELD, *HEAD, "weight", "bias"), ("z",)),
    "synthesize_negatives": Op(call_synthesis, ("z", "gate")),
}


def tensors(counts: list[int], width: int, seed: int = 0) -> dict[str, Tensor]:
    """Everything that any of the ops takes, for a class-major batch with these numbers of samples, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    n, most, layout = len(labels), max(counts), class_major(labels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = make_layer(width, torch.float64, generator)
    t = dict(zip(CHAIN, (x.detach() for x in fold(normal(n, width), layer)), strict=True))
    t |= {"labels": labels, "class_start": layout.class_start, "identity": layout.identity}
    t |= {"seed": torch.tensor(-7_777_777_777_777), "kappa": torch.tensor(0.4, dtype=torch.float64)}
    t["mix"] = torch.rand(most, most - 1, generator=generator, dtype=torch.float64)
    t |= {"z": normal(n, width), "base": reference.center_normalize(normal(n, width))}
    t |= {"gate": torch.sigmoid(normal(n, n, width)), "norm_weight": 1 + 0.3 * normal(width)}
    t |= {"gate_weight": normal(width, width), "gate_bias": normal(width)}
    return t | {"weight": normal(CLASSES, width), "bias": normal(CLASSES)}


def inputs_of(name: str, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What one op takes of ``t``; ``messages`` needs a square map, the other ops a classifier."""
    op = OPS[name]
    taken = {key: t[key] for key in (*op.differentiable, *op.constants, *SHARED)}
    if name == "messages":
        width = t["base"].shape[1]
        taken |= {"weight": t["gate_weight"].T.contiguous(), "bias": t["gate_bias"].flip(0)}
        assert taken["weight"].shape == (width, width)
    return taken


def test_compiled_with_changing_sizes_equals_eager() -> None:
    """All ops in one graph: fullgraph, dynamic, N and M and K differ from call to call, labels are an argument.

    Each op has leaves of its own, so that no sum of gradients, whose order compilation may change, hides a bit.
    """
    # What gets no gradient comes as integers, because check_compiled differentiates every floating argument.
    exact = ("labels", "class_start", "identity", "seed")

    def everything(mix: Tensor, z: Tensor, **t: Tensor) -> Tensor:
        shared = {key: t[key] for key in exact} | {"mix": mix.double() / 1024, "kappa": kappa}
        outputs = []
        for name, op in OPS.items():
            own = {key: t[f"{name}/{key}"] for key in op.differentiable}
            own |= {key: t["edges/" + key].detach() for key in op.constants if key in FIELD}
            own |= {key: t["generator_synthesis/" + key].detach() for key in op.constants if key in HEAD}
            own |= {key: z.double() / 1024 for key in op.constants if key == "z"}
            outputs += [x.flatten() for x in op.call(5, True, **shared, **own)]
        return torch.cat(outputs)

    kappa, batches = torch.tensor(0.4, dtype=torch.float64), []
    for seed, counts in enumerate(([3, 2, 3], [2, 4, 2, 3], [5, 2, 2, 3, 2])):
        t = tensors(counts, 4, seed)
        leaves = {
            f"{name}/{key}": x.clone()
            for name, op in OPS.items()
            for key, x in inputs_of(name, t).items()
            if key in op.differentiable
        }
        scaled = {key: (1024 * t[key]).long() for key in ("mix", "z")}
        batches.append(leaves | scaled | {key: t[key] for key in exact})
    check_compiled(everything, batches)


@pytest.mark.parametrize("stash", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_repeats_and_gradients_one_at_a_time(name: str, stash: bool) -> None:
    """Backward twice, the call twice, and each input alone: the same, although workspaces are reused."""
    op, t = OPS[name], inputs_of(name, tensors([3, 1, 2, 2], 6))

    def function(**t: Tensor) -> tuple[Tensor, ...]:
        return op.call(7, stash, **t)

    shapes = [x.detach() for x in function(**t)]
    contract = {"differentiable": op.differentiable, "upstream": random_upstream(shapes, torch.float64, 3)}
    full = check_contract(name, function, t, **contract)
    assert all(g is not None and g.isfinite().all() for g in full.gradients.values())
    # The weight of messages needs no state of the edges, which are then computed in one expression: other roundings.
    own_way = ("weight", "bias") if name == "messages" else ()
    alike = [key for key in op.differentiable if key not in own_way]
    check_subsets(name, function, t, full=full, **contract | {"differentiable": alike})
    for key in own_way:
        leaf = t[key].clone().requires_grad_()
        (alone,) = torch.autograd.grad(function(**t | {key: leaf}), leaf, contract["upstream"])
        torch.testing.assert_close(alone, full.gradients[key], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", sorted(set(OPS) - {"messages", "synthesize_negatives"}))
def test_gradcheck(name: str) -> None:
    op, t = OPS[name], inputs_of(name, tensors([2, 1], 3))
    leaves = [t[key].clone().requires_grad_() for key in op.differentiable]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return op.call(2, False, **t | dict(zip(op.differentiable, leaves, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


def test_autocast_gives_float32() -> None:
    t = {key: x.float() if x.is_floating_point() else x for key, x in tensors([3, 2, 2], 6).items()}
    z, gate = t["z"].bfloat16().requires_grad_(), t["gate"].half().requires_grad_()
    options = dict(kappa=0.4, mix=t["mix"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        synthetic = F.synthesize_negatives(z, t["labels"], gate, **options)
        unit = F.center_normalize(z)
    wide = [x.detach().float().requires_grad_() for x in (z, gate)]
    expected = F.synthesize_negatives(wide[0], t["labels"], wide[1], **options)
    assert synthetic.dtype == unit.dtype == torch.float32
    assert torch.equal(synthetic, expected) and torch.equal(unit, F.center_normalize(wide[0]))
    upstream = torch.randn(expected.shape)
    truth = torch.autograd.grad(expected, wide, upstream)
    for ours, wanted, x in zip(torch.autograd.grad(synthetic, (z, gate), upstream), truth, (z, gate), strict=True):
        assert ours.dtype == x.dtype and torch.equal(ours, wanted.to(x.dtype))
