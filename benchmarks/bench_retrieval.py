"""The evaluation's op, exact nearest neighbors by cosine: gcng, the definition, and faiss."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.operations import Form, Inputs, Operation, Unavailable, Work, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import in_gcng, need
from benchmarks.ranking import compared, unit_rows
from benchmarks.settings import Setting
from gcng import functional, reference

NEIGHBORS = 10


def make_inputs(setting: Setting) -> Inputs:
    """x (N, D): every row searches all others."""
    return Inputs(setting, {"x": normal(setting.samples, setting.embedding_size)})


def work(setting: Setting, item: int) -> dict[str, Work]:
    """One product over ordered pairs; rows read, values and indices written."""
    N, D = setting.samples, setting.embedding_size
    return {"forward": Work(2.0 * N * N * D, float(N * D * item + N * NEIGHBORS * (item + 8)))}


def ranked(inputs: Inputs, search, compile_it: bool = False) -> Form:
    """A form from a function of x that returns values and indices (N, k)."""
    x = inputs["x"]
    call = torch.compile(search, dynamic=False) if compile_it else search
    unit = unit_rows(x, centered=False)
    return Form(lambda: call(x), backward=False, arrays=lambda: compared(*call(x)[:2], unit))


def _definition(x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.retrieval.knn(x, x, NEIGHBORS, exclude_self=True)


def _faiss(inputs: Inputs) -> Form:
    """Exact inner products of normalized rows; the row itself is searched for too and taken out."""
    faiss = need("faiss", "faiss-cpu")
    if inputs["x"].device.type != "cpu" or inputs["x"].dtype != torch.float32:
        raise Unavailable("faiss-cpu takes float32 on the CPU")
    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.nn.functional.normalize(x, dim=1).numpy()
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        values, indices = (torch.from_numpy(found) for found in index.search(rows, NEIGHBORS + 1))
        other = indices != torch.arange(x.shape[0])[:, None]
        other[:, -1] &= other[:, :-1].all(1).logical_not()  # a row that was not found: drop the last instead
        return values[other].view(x.shape[0], -1), indices[other].view(x.shape[0], -1)

    return ranked(inputs, search)


OPERATION = Operation(
    name="retrieval",
    make_inputs=make_inputs,
    providers={
        "reference": lambda inputs: ranked(inputs, _definition),
        "reference-compiled": lambda inputs: ranked(inputs, _definition, compile_it=True),
        **in_gcng(lambda inputs: ranked(inputs, lambda x: functional.knn(x, k=NEIGHBORS))),
        "faiss": _faiss,
    },
    work=work,
    truth=("reference", "gcng"),
    tiny=Setting(1, 16, 24),
    growth=lambda setting: setting.samples**2,
    dense_providers=frozenset({"reference", "reference-compiled"}),
)


def test_retrieval(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
