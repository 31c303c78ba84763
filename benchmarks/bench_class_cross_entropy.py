"""Op (24), linear map and cross-entropy in one: gcng, the definition, and the fused kernels of other libraries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.operations import SEED, Form, Inputs, Operation, Unavailable, Work, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import dense, in_gcng, need
from benchmarks.settings import Setting
from gcng import functional, reference

CHUNK_LOGITS = 2**22  # of the chunked form: 16 MiB of float32


def make_inputs(setting: Setting) -> Inputs:
    """x (N, D), weight (C, D), target (N,). Without a bias, which not every peer has."""
    N, D, C = setting.samples, setting.embedding_size, setting.training_classes
    generator = torch.Generator().manual_seed(SEED)
    tensors = {"x": normal(N, D), "weight": normal(C, D, seed=1, scale=D**-0.5)}
    return Inputs(setting, tensors | {"target": torch.randint(C, (N,), generator=generator)}, ("x", "weight"))


def work(setting: Setting, item: int) -> dict[str, Work]:
    """One product forward, two backward; x and weight read, their gradients written."""
    product = 2.0 * setting.samples * setting.embedding_size * setting.training_classes
    operands = float((setting.samples + setting.training_classes) * setting.embedding_size * item)
    return {"forward": Work(product, operands), "backward": Work(2 * product, 2 * operands)}


def _operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["x"], inputs["weight"], inputs["target"]


def _by_gcng(inputs: Inputs) -> Form:
    return Form(lambda: (functional.linear_cross_entropy(*_operands(inputs)),))


def _chunked(inputs: Inputs) -> Form:
    """Plain torch, a chunk of rows at a time, logits computed again in the backward."""
    x, weight, target = _operands(inputs)
    rows = max(1, CHUNK_LOGITS // weight.shape[0])

    def part(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")

    def forward() -> tuple[Tensor]:
        chunks = zip(x.split(rows), target.split(rows), strict=True)
        return (sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks) / x.shape[0],)

    return Form(forward)


def _cut_cross_entropy(inputs: Inputs) -> Form:
    cut = need("cut_cross_entropy", "cut-cross-entropy")
    on_gpu = inputs["x"].device.type == "cuda"
    if on_gpu and inputs["x"].dtype == torch.float32:
        raise Unavailable("its kernel takes 16-bit operands only")
    # Its Triton kernel needs a GPU; filter_eps=None leaves no gradient out, as the others do.
    implementation = {"impl": "cce", "filter_eps": None} if on_gpu else {"impl": "torch_compile"}
    return Form(lambda: (cut.linear_cross_entropy(*_operands(inputs), **implementation),))


def _liger(inputs: Inputs) -> Form:
    functions = need("liger_kernel.transformers.functional", "liger-kernel")
    x, weight, target = _operands(inputs)
    if x.device.type != "cuda":
        raise Unavailable("its kernel is written in Triton and needs a GPU")
    return Form(lambda: (functions.liger_fused_linear_cross_entropy(x, weight, target),))


OPERATION = Operation(
    name="class_cross_entropy",
    make_inputs=make_inputs,
    providers={
        **dense(lambda inputs: reference.class_cross_entropy.linear_cross_entropy(*_operands(inputs))),
        **in_gcng(_by_gcng),
        "chunked torch": _chunked,
        "cut-cross-entropy": _cut_cross_entropy,
        "liger": _liger,
    },
    work=work,
    truth=("reference", "gcng"),
    growth=lambda setting: setting.samples * setting.training_classes,
    dense_providers=frozenset({"reference", "reference-compiled"}),
)


def test_class_cross_entropy(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
