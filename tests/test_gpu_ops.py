"""The public ops on a GPU: the cases of tests/cases.py, memory layouts, streams, CUDA graphs, far offsets."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gcng
from gcng import functional as F
from gcng import reference
from gcng.reference import correlation as correlation_definition
from gcng.reference.retrieval import knn as knn_definition
from tests import cases
from tests.mutants import OPERATIONS, Case, Operation
from tests.run_case import LAYOUTS, UPSTREAM_LAYOUTS, equal_bits, lay_out, run_case

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MATRICES = {case.name: case for case in cases.MATRICES}
BATCHES = {case.name: case for case in cases.BATCHES}


def synthesize(embeddings: Tensor, labels: Tensor, gate: Tensor, kappa: float, mix: Tensor) -> Tensor:
    """The public function with the arguments of the cases."""
    return F.synthesize_negatives(embeddings, labels, gate, kappa=kappa, mix=mix)


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def operation(name: str, function: Callable[..., Tensor]) -> Operation:
    """An operation of the gate with its cases on the GPU."""

    def moved(case: Case) -> Case:
        return replace(case, make=lambda seed: on_device(case.make(seed)))

    kept = OPERATIONS[name]
    return replace(kept, function=function, cases=tuple(moved(case) for case in kept.cases))


PUBLIC = {
    "linear_cross_entropy": F.linear_cross_entropy,
    "negative_attention": F.negative_attention,
    "synthesis": synthesize,
}
RUNS = [
    (operation(name, function), case, dtype)
    for name, function in PUBLIC.items()
    for case, dtype in operation(name, function).all_runs()
]


@pytest.mark.parametrize(
    ("op", "case", "dtype"), RUNS, ids=[f"{o.name}-{c.name}-{c.layout}-{c.upstream}-{d}" for o, c, d in RUNS]
)
def test_close_to_truth(op: Operation, case: Case, dtype: torch.dtype) -> None:
    """Values, gradients and the contract of an op, in every dtype, layout and data regime."""
    assert op.run(case, dtype)


# More than one block of every kernel in every dimension, with remainders; 16 bits are what a GPU is used for.
LARGE = {
    "linear_cross_entropy": lambda: cases.classification_inputs(
        cases.Classification("large", 333, 517, 3001, 7, ""), "diffuse"
    ),
    "negative_attention": lambda: cases.attention_inputs(
        cases.Batch("large", (3,) * 111, "shuffled", 516, 4, ""), "normal"
    ),
    "synthesis": lambda: cases.synthesis_inputs(
        cases.Batch("large", (2, 3, 5, 1) * 8, "shuffled", 321, 1, ""), "normal"
    ),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_close_to_truth_in_large_shapes(name: str, dtype: torch.dtype) -> None:
    op = operation(name, PUBLIC[name])
    options = {"baseline_dtype": torch.float32} if name == "synthesis" and dtype == torch.float16 else {}
    assert op.run(Case("large", lambda _: on_device(LARGE[name]()), options=options), dtype)


NORMALIZATIONS = [("tails", values) for values in ("normal", "constant_row", "zero_row", "duplicates", "one_hot")]
NORMALIZATIONS += [(shape, "normal") for shape in ("exact", "single_row", "long", "wide")]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("shape", "values"), NORMALIZATIONS)
def test_center_normalize(shape: str, values: str, dtype: torch.dtype) -> None:
    assert run_case(
        f"center_normalize on {shape}, {values}", F.center_normalize, correlation_definition.center_normalize,
        on_device({"x": cases.matrix(MATRICES[shape], values)}), dtype=dtype, differentiable=["x"],
    )  # fmt: skip


@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
def test_center_normalize_in_every_layout(layout: str) -> None:
    # One value for all elements is the direction of the mean, which has no gradient.
    floor = {"grad x": 1.0} if layout == "stride_zero" else {}
    assert run_case(
        f"center_normalize, {layout}", F.center_normalize, correlation_definition.center_normalize,
        on_device({"x": cases.matrix(MATRICES["exact"], "normal")}), dtype=torch.float32, differentiable=["x"],
        input_layout="contiguous" if layout == "stride_zero" else layout, upstream_layout=layout, scale_floors=floor,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("rows", "width", "k"), ((38, 9, 11), (1, 3, 2), (700, 129, 40)))
def test_neighbors_equal_the_definition(rows: int, width: int, k: int, dtype: torch.dtype) -> None:
    """In any layout: values to the rounding of the dtype, neighbors that have them, none twice."""
    x = cases.normal(rows, width, seed=rows, name="x").to(dtype).to(DEVICE)
    exact, _ = knn_definition(x.double(), x.double(), k, exclude_self=True)
    tolerance = 4e-15 if dtype == torch.float64 else 2.4e-7
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    for layout in LAYOUTS:
        if layout == "expanded":
            continue
        values, indices = F.knn(lay_out(x, layout), k=k)
        there = indices >= 0
        assert torch.equal(there, exact > -2)
        assert bool(((values.double() - exact)[there].abs() <= tolerance).all())
        found = (unit @ unit.T).gather(1, indices.clamp(min=0))
        assert bool(((found - exact)[there].abs() <= 2 * tolerance).all())
        assert not bool((indices == torch.arange(rows, device=DEVICE)[:, None]).any())
        assert all(len({i for i in row if i >= 0}) == sum(i >= 0 for i in row) for row in indices.tolist())


def test_ties_go_to_the_lower_index() -> None:
    x = (torch.randint(2, (300, 16)) * 2 - 1).to(DEVICE, torch.float32)
    values, indices = F.knn(x, k=50)
    cosine = (x.double() @ x.double().T / 16).fill_diagonal_(-2)
    expected = torch.argsort(cosine, dim=1, descending=True, stable=True)[:, :50]
    assert torch.equal(indices, expected) and torch.equal(values.double(), cosine.gather(1, expected))


def test_correlation_topk_finds_the_most_correlated_negatives() -> None:
    z = cases.normal(200, 65, seed=1, name="z").float().to(DEVICE)
    labels = torch.arange(200, device=DEVICE) % 40
    values, indices = F.correlation_topk(z, 9, labels=labels)
    exact = torch.corrcoef(z.double())
    exact[labels[:, None] == labels[None]] = -2
    truth = exact.topk(9, dim=1).values
    assert bool(((values.double() - truth).abs() <= 5e-7).all())
    assert bool(((exact.gather(1, indices) - truth).abs() <= 1e-6).all())


def calls_with_gradients() -> dict[str, tuple[Callable[..., Tensor], dict[str, Any]]]:
    """Each differentiable op, with inputs whose first floating ones are differentiated."""
    batch, matrix = BATCHES["mxk"], MATRICES["tails"]
    linear = cases.classification_inputs(cases.CLASSIFICATIONS[0], "diffuse") | {"reduction": "none"}
    made = {
        "linear_cross_entropy": (F.linear_cross_entropy, linear, ("x", "weight", "bias")),
        "negative_attention": (F.negative_attention, cases.attention_inputs(batch, "normal"), ("q", "k", "v")),
        "synthesis": (synthesize, cases.synthesis_inputs(batch, "normal"), ("embeddings", "gate")),
        "center_normalize": (F.center_normalize, {"x": cases.matrix(matrix, "normal")}, ("x",)),
    }
    out = {}
    for name, (function, inputs, wanted) in made.items():
        inputs = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
        out[name] = function, on_device(inputs), wanted
    return out


def both_passes(function: Callable[..., Tensor], inputs: dict[str, Any], wanted: tuple[str, ...]) -> list[Tensor]:
    leaves = {k: x.detach().requires_grad_() if k in wanted else x for k, x in inputs.items()}
    out = function(**leaves)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaves[k] for k in wanted], upstream)]


@pytest.mark.parametrize("name", ("linear_cross_entropy", "negative_attention", "synthesis", "center_normalize"))
def test_runs_on_the_current_stream(name: str) -> None:
    """The inputs of a side stream are written late: a kernel on any other stream would read NaN."""
    function, inputs, wanted = calls_with_gradients()[name]
    expected = both_passes(function, inputs, wanted)
    late = {
        k: torch.full_like(x, float("nan")) if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for k, x in late.items():
            if x is not inputs[k]:
                x.copy_(inputs[k])
        found = both_passes(function, late, wanted)
    stream.synchronize()
    assert all(equal_bits(a, b) for a, b in zip(found, expected, strict=True))


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize("name", ("linear_cross_entropy", "negative_attention", "center_normalize", "synthesis"))
def test_replay_of_a_cuda_graph_gives_the_bits_of_eager(name: str) -> None:
    function, inputs, wanted = calls_with_gradients()[name]
    if name == "synthesis":
        layout = gcng.BatchLayout(inputs["labels"].cpu())
        inputs["kappa"] = torch.tensor(inputs["kappa"], dtype=torch.float64, device=DEVICE)

        def function(embeddings, labels, gate, kappa, mix):
            return F.synthesize_negatives(embeddings, labels, gate, kappa=kappa, mix=mix, layout=layout)

    graph, outputs = captured(lambda: both_passes(function, inputs, wanted))
    for k in wanted:
        inputs[k].copy_(inputs[k].flip(0) if inputs[k].dim() > 1 else -inputs[k])
    graph.replay()
    torch.cuda.synchronize()
    expected = both_passes(function, inputs, wanted)
    assert all(equal_bits(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.fixture
def alone() -> Iterator[None]:
    """Tests that need much of a card wait for each other, in whatever process they run."""
    with open(Path(tempfile.gettempdir()) / "gcng-large-gpu-tests.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def needs_free(gibibytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory")


@pytest.mark.raw_memory
@pytest.mark.usefixtures("alone")
def test_more_than_32_bits_of_rows() -> None:
    needs_free(20)
    rows, width = 2**21 + 64, 1024
    x = torch.randn(rows, width, dtype=torch.float16, device=DEVICE).requires_grad_()
    unit = F.center_normalize(x)
    (grad,) = torch.autograd.grad(unit, x, unit.detach().flip(0))
    tail = x.detach()[-64:].clone().requires_grad_()
    again = F.center_normalize(tail)
    (expected,) = torch.autograd.grad(again, tail, unit.detach()[:64].flip(0))
    assert equal_bits(unit[-64:].detach(), again.detach()) and equal_bits(grad[-64:], expected)


@pytest.mark.raw_memory
@pytest.mark.usefixtures("alone")
def test_more_than_32_bits_of_classes() -> None:
    """All classes but the last 64 have zero weights: the loss and the last rows of the gradient are known."""
    needs_free(24)
    classes, width = 2**21 + 64, 1024
    weight = torch.zeros(classes, width, dtype=torch.bfloat16, device=DEVICE)
    weight[-64:] = torch.randn(64, width, device=DEVICE) / 16
    x = torch.randn(50, width, device=DEVICE).bfloat16()
    target = torch.arange(classes - 50, classes, device=DEVICE)
    leaves = x.requires_grad_(), weight.requires_grad_()
    loss = F.linear_cross_entropy(*leaves, target, reduction="sum")
    grad_x, grad_weight = torch.autograd.grad(loss, leaves)
    rows, last = x.detach().double(), weight.detach()[-64:].double()
    logits = torch.cat([rows.new_zeros(50, classes - 64), rows @ last.T], 1)
    lse = logits.logsumexp(1)
    expected = (lse - logits.gather(1, target[:, None])[:, 0]).sum()
    slope = (logits[:, -64:] - lse[:, None]).exp()
    slope[torch.arange(50), torch.arange(14, 64)] -= 1
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    for found, truth in ((grad_weight[-64:], slope.T @ rows), (grad_x, slope @ last)):
        assert (found.double() - truth).norm() <= 1e-2 * truth.norm()


@pytest.mark.raw_memory
@pytest.mark.usefixtures("alone")
def test_more_than_32_bits_of_gates() -> None:
    """What anchors get for a class depends on their own class and that one: a small batch gives the same."""
    needs_free(32)
    n, width = 1536, 1024
    labels, z = torch.arange(n) // 2, torch.randn(n, width, device=DEVICE).bfloat16()
    gate = torch.rand(n, n, width, dtype=torch.bfloat16, device=DEVICE)
    mix = torch.rand(2, 1, device=DEVICE)
    leaves = z.requires_grad_(), gate.requires_grad_()
    out = F.synthesize_negatives(leaves[0], labels, leaves[1], kappa=0.4, mix=mix)
    grad = torch.zeros_like(out)
    grad[-4:, -2:] = torch.randn(4, 2, width, device=DEVICE).bfloat16()
    grad_z, grad_gate = torch.autograd.grad(out, leaves, grad)
    small = z.detach()[-4:].double().requires_grad_(), gate.detach()[-4:, -4:].double().requires_grad_()
    truth = reference.synthesize_negatives(small[0], labels[-4:].to(DEVICE), small[1], kappa=0.4, mix=mix.double())
    expected = torch.autograd.grad(truth, small, grad[-4:, -2:].double())
    for found, wanted in ((out[-4:, -2:], truth), (grad_z[-4:], expected[0]), (grad_gate[-4:, -4:], expected[1])):
        assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()
    assert not bool(grad_z[:-4].any()) and not bool(grad_gate[:-4].any())
