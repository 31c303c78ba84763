"""One whole iteration (28): gcng, the definition, the published formulation; and plain losses of another library.

The losses of pytorch-metric-learning generate nothing, so they are no competitors: their rows show what a loss without
the graph costs at the same batch, with and without that library's cross-batch memory.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gate import iteration_arrays
from benchmarks.iteration import ITERATION_PROVIDERS, Batch, make_batch, make_provider, make_weights, run_iteration
from benchmarks.operations import Form, Inputs, Operation, Unavailable, Work
from benchmarks.preparation import check_and_time
from benchmarks.providers import extension, need
from benchmarks.settings import Setting

WEIGHTS = "weights/"
MEMORY_ROWS = 1024  # of the cross-batch memory
# A whole iteration may be off by this much (relative L2) whatever the baseline does. Caps of a single op do not fit:
# batch normalization takes away most of what the shift of a norm does, and the dense definition itself has 1e-1 in that
# gradient where operands are bfloat16. The rules relative to the baseline are those of the tests, but wider: an
# iteration has a hundred arrays, and each rule of each array can fail by luck.
CAPS = {"float32": 1e-3, "tf32": 0.3, "bfloat16": 0.3, "autocast": 0.3}
FACTORS = (4.0, 6.0)


def make_inputs(setting: Setting) -> Inputs:
    """Embeddings, labels, mixing numbers and every weight by its golden name, rounded to float32."""
    batch = make_batch(setting)
    tensors = {
        "z": batch.z,
        "labels": batch.labels,
        "metric mix": batch.metric_mix,
        "generator mix": batch.generator_mix,
    }
    tensors |= {WEIGHTS + name: w for name, w in make_weights(setting).items()}
    return Inputs(setting, {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()})


def work(setting: Setting, item: int) -> dict[str, Work]:
    """Products of an iteration; embeddings and weights read, their gradients written."""
    D, L = setting.embedding_size, setting.num_layers
    numbers = 2 * setting.samples * D + 2 * (D * D * (26 * L + 2) + 2 * setting.training_classes * D)
    return {"forward": Work(setting.useful_flops(), float(numbers * item))}


def _by(name: str, inputs: Inputs) -> Form:
    if name == "gcng-no-extension" and extension(inputs["z"].device) == "none":
        raise Unavailable("the same as gcng: no extension is loaded")
    if name == "gcng-recompute" and inputs["z"].device.type == "cpu":
        raise Unavailable("for GPUs: on a CPU the default budget decides")
    weights = {key.removeprefix(WEIGHTS): w for key, w in inputs.tensors.items() if key.startswith(WEIGHTS)}
    z = inputs["z"].requires_grad_()
    batch = Batch(z, inputs["labels"].cpu(), inputs["metric mix"], inputs["generator mix"])
    provider = make_provider(name, inputs.setting, z.dtype, z.device, weights)
    return Form(
        lambda: tuple(run_iteration(provider, batch).losses.values()),
        backward=False,
        arrays=lambda: iteration_arrays(run_iteration(provider, batch, keep_gradients=True)),
    )


def _plain_loss(remembers: bool, inputs: Inputs) -> Form:
    losses = need("pytorch_metric_learning.losses", "pytorch-metric-learning")
    z, labels = inputs["z"].requires_grad_(), inputs["labels"]
    loss = losses.NPairsLoss()
    if remembers:
        loss = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), z.shape[1], memory_size=MEMORY_ROWS)

    def forward() -> tuple[torch.Tensor]:
        z.grad = None
        value = loss(z, labels)
        value.backward()
        return (value.detach(),)

    return Form(forward, backward=False, compared=False)


OPERATION = Operation(
    name="iteration",
    make_inputs=make_inputs,
    providers={name: partial(_by, name) for name in ITERATION_PROVIDERS}
    | {"pml n-pairs": partial(_plain_loss, False), "pml multi-similarity, memory": partial(_plain_loss, True)},
    work=work,
    truth=("published", "gcng"),
    dense_providers=frozenset({"published", "published-compiled", "reference"}),
    small=Setting(1, 128, 80),
    caps=CAPS,
    factors=FACTORS,
)


def test_iteration(benchmark, preparation, case):
    """One timed call of a provider that has passed the gate."""
    check_and_time(benchmark, preparation, case)
