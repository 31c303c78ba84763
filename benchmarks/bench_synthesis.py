"""Op (15)-(18), synthetic negatives from given gates: gcng's dense form, the definition, the published formulation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.operations import SEED, Form, Inputs, Operation, Work, batch_labels, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import dense, in_gcng
from benchmarks.settings import Setting
from gcng import functional, reference

J_AVG = 1.5


def make_inputs(setting: Setting) -> Inputs:
    """embeddings z (N, D), gate (N, N, D), mix (K, K - 1), labels (N,) in slot order."""
    N, D, K = setting.samples, setting.embedding_size, setting.samples_per_class
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        "z": normal(N, D, scale=3 * D**-0.5),
        "gate": torch.sigmoid(normal(N, N, D, seed=1)),
        "mix": torch.rand(K, K - 1, generator=generator, dtype=torch.float64),
        "labels": batch_labels(setting),
    }
    return Inputs(setting, tensors, ("z", "gate"))


def work(setting: Setting, item: int) -> dict[str, Work]:
    """Three multiply-adds per anchor, negative and channel; gates and negatives moved once, and their gradients."""
    elements = float(setting.samples**2 * setting.embedding_size)
    negatives = elements / setting.samples_per_class
    return {
        "forward": Work(6 * elements, (elements + negatives) * item),
        "backward": Work(12 * elements, (2 * elements + negatives) * item),
    }


def _kappa() -> float:
    return math.exp(-published.LossConstants().alpha / J_AVG)


def _by_gcng(inputs: Inputs) -> Form:
    return Form(
        lambda: (
            functional.synthesize_negatives(
                inputs["z"], inputs["labels"], inputs["gate"], kappa=_kappa(), mix=inputs["mix"]
            ),
        )
    )


def _definition(inputs: Inputs) -> Tensor:
    return reference.synthesize_negatives(
        inputs["z"], inputs["labels"], inputs["gate"], kappa=_kappa(), mix=inputs["mix"]
    )


def _published(inputs: Inputs) -> Form:
    loss, M = SimpleNamespace(constants=published.LossConstants(), j_avg=J_AVG), inputs.setting.batch_classes

    def forward() -> tuple[Tensor]:
        synthetic = published.PublishedLoss.synthesize(loss, inputs["z"], inputs["gate"], inputs["mix"], M)
        return (synthetic.flatten(0, 1),)

    return Form(forward)


OPERATION = Operation(
    name="synthesis",
    make_inputs=make_inputs,
    providers={**dense(_definition), "published": _published, **in_gcng(_by_gcng)},
    work=work,
    truth=("reference", "gcng"),
    dense_providers=frozenset({"reference", "reference-compiled", "published"}),
)


def test_synthesis(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
