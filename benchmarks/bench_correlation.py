"""Op (1)-(2), the hardest negatives of every row by correlation: gcng and the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.operations import Form, Inputs, Operation, Work, batch_labels, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import in_gcng
from benchmarks.ranking import compared, unit_rows
from benchmarks.settings import Setting
from gcng import functional, reference

HARDEST = 5


def make_inputs(setting: Setting) -> Inputs:
    """x (N, D) and labels (N,)."""
    x = normal(setting.samples, setting.embedding_size)
    return Inputs(setting, {"x": x, "labels": batch_labels(setting)})


def work(setting: Setting, item: int) -> dict[str, Work]:
    """One product over ordered pairs; rows read, values and indices written."""
    N, D = setting.samples, setting.embedding_size
    return {"forward": Work(2.0 * N * N * D, float(N * D * item + N * HARDEST * (item + 8)))}


def _form(inputs: Inputs, search) -> Form:
    x, labels = inputs["x"], inputs["labels"]
    unit = unit_rows(x, centered=True)
    return Form(lambda: search(x, labels), backward=False, arrays=lambda: compared(*search(x, labels), unit))


def _definition(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return reference.correlation.correlation_topk(x, HARDEST, labels=labels)


OPERATION = Operation(
    name="correlation",
    make_inputs=make_inputs,
    providers={
        "reference": lambda inputs: _form(inputs, _definition),
        "reference-compiled": lambda inputs: _form(inputs, torch.compile(_definition, dynamic=False)),
        **in_gcng(
            lambda inputs: _form(inputs, lambda x, labels: functional.correlation_topk(x, HARDEST, labels=labels))
        ),
    },
    work=work,
    truth=("reference",),
)


def test_correlation(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
