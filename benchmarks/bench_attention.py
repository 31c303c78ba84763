"""Op (4)-(6), attention over the samples of other classes: gcng, the definition, and torch's own attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations import Form, Inputs, Operation, Work, batch_labels, normal
from benchmarks.preparation import check_and_time
from benchmarks.providers import dense, in_gcng, need
from benchmarks.settings import Setting
from gcng import functional, reference


def make_inputs(setting: Setting) -> Inputs:
    """q, k, v (N, H, h) of unit scale and labels (N,)."""
    shape = (setting.samples, setting.num_heads, setting.embedding_size // setting.num_heads)
    tensors = {name: normal(*shape, seed=seed) for seed, name in enumerate("qkv")}
    return Inputs(setting, tensors | {"labels": batch_labels(setting)}, ("q", "k", "v"))


def work(setting: Setting, item: int) -> dict[str, Work]:
    """Two products over all ordered pairs forward, four backward; q, k, v and the result once each."""
    product = 2.0 * setting.samples**2 * setting.embedding_size
    vectors = float(setting.samples * setting.embedding_size * item)
    return {"forward": Work(2 * product, 4 * vectors), "backward": Work(4 * product, 7 * vectors)}


def _by_gcng(inputs: Inputs) -> Form:
    return Form(lambda: (functional.negative_attention(*(inputs[name] for name in ("q", "k", "v", "labels"))),))


def _with_zero_key(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(1, H, N, h) queries and (1, H, N + 1, h) keys and values: the extra zero logit is a key and a value of zeros."""
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in "qkv")
    return q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))


def _scaled_dot_product(inputs: Inputs) -> Form:
    labels = inputs["labels"]
    allowed = F.pad(labels[:, None] != labels[None, :], (0, 1), value=True)

    def forward() -> tuple[Tensor]:
        out = F.scaled_dot_product_attention(*_with_zero_key(inputs), attn_mask=allowed)
        return (out[0].transpose(0, 1),)

    return Form(forward)


def _flex(inputs: Inputs) -> Form:
    flex = need("torch.nn.attention.flex_attention", "torch with FlexAttention")
    labels, n = F.pad(inputs["labels"], (0, 1), value=-1), inputs["labels"].shape[0]
    on_gpu = labels.device.type == "cuda"
    torch.compiler.reset()
    mask = flex.create_block_mask(
        lambda b, h, i, j: labels[i] != labels[j], None, None, n, n + 1, device=str(labels.device)
    )
    call = torch.compile(flex.flex_attention, dynamic=False)

    if not on_gpu:  # there it has no backward and refuses inputs that ask for one
        inputs = Inputs(inputs.setting, {name: x.detach() for name, x in inputs.tensors.items()})

    def forward() -> tuple[Tensor]:
        return (call(*_with_zero_key(inputs), block_mask=mask)[0].transpose(0, 1),)

    return Form(forward, backward=on_gpu)


OPERATION = Operation(
    name="attention",
    make_inputs=make_inputs,
    providers={
        **dense(lambda inputs: reference.attention.negative_attention(*inputs.tensors.values())),
        **in_gcng(_by_gcng),
        "scaled_dot_product_attention": _scaled_dot_product,
        "flex_attention": _flex,
    },
    work=work,
    truth=("reference",),
)


def test_attention(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
