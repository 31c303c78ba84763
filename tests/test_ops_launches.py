"""How much a tile asks of the host on a GPU: torch's kernels are counted on meta tensors, Triton's are recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels.class_cross_entropy import streamed_logit_gradient
from gcng.kernels.launch import recorded_launches
from gcng.ops import dispatch, generator, n_pair
from gcng.ops.pair_field import PairField
from gcng.ops.tiles import pair_count
from gcng.ops.triton_path import triton_everywhere

NO_KERNEL = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip
N, WIDTH, CLASSES, SAMPLES = 64, 32, 100, 2


class Kernels(TorchDispatchMode):
    """Counts the calls that are a kernel on a GPU, by name; a fill through ``scalar_tensor`` is one too."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Asked:
    """What one call asked for."""

    torch: Counter
    triton: int


def asked(call: Callable[[], object]) -> Asked:
    """Count what a call launches."""
    kernels = Kernels()
    forced = dispatch.forced_kernels(*dispatch.TRITON)
    with recorded_launches(90) as recording, triton_everywhere(), forced, kernels:
        call()
    return Asked(kernels.counts, len(recording.launches))


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Arguments:
    """Of the two ops over synthetic negatives, forward and backward, in bfloat16 with packed edges and kept gates."""

    def __init__(self):
        operand, wide = torch.bfloat16, torch.float64
        starts = (torch.arange(N + 1) * SAMPLES).clamp(max=N)
        batch = on_gpu(N, WIDTH), on_gpu(), on_gpu(SAMPLES, SAMPLES - 1), starts
        self.edges = on_gpu(pair_count(N), WIDTH, dtype=operand)
        integers = on_gpu(N, dtype=torch.int64)
        field = self.edges, True, [], integers, on_gpu(dtype=torch.int64), 0.1, 1
        head = on_gpu(WIDTH), on_gpu(WIDTH, WIDTH), on_gpu(WIDTH)
        classes = integers, integers, on_gpu(CLASSES, WIDTH), on_gpu(CLASSES)
        self.n_pair = *batch, *field, *head, 3e-3
        self.generator = *batch, *field, *head, *classes
        self.statistics = on_gpu(WIDTH, dtype=wide), on_gpu(WIDTH, dtype=wide)
        self.of_rows = on_gpu(N, N // SAMPLES, dtype=wide), on_gpu(N, WIDTH), on_gpu(dtype=wide)

    def calls(self, pairs: int) -> dict[str, Callable[[], object]]:
        """The bodies of the ops, by name, on tiles of ``pairs``."""
        kept, losses = on_gpu(pair_count(N), WIDTH, dtype=torch.bfloat16), [on_gpu() for _ in range(3)]
        backward_of = generator._generator_synthesis_backward
        return {
            "n_pair": lambda: n_pair._n_pair_synthesis(*self.n_pair, pairs, True),
            "n_pair backward": lambda: n_pair._n_pair_synthesis_backward(
                on_gpu(), *self.statistics, on_gpu(N), kept, *self.n_pair, pairs
            ),
            "generator": lambda: generator._generator_synthesis(*self.generator, pairs, True),
            "generator backward": lambda: backward_of(
                losses, *self.statistics, *self.of_rows, kept, *self.generator, pairs, True, True, True
            ),
        }

    def tiles(self, pairs: int) -> int:
        """How many there are."""
        with dispatch.forced_kernels(*dispatch.TRITON):
            return len(PairField(self.edges, True, N, []).tiles(pairs, [*range(0, N + 1, SAMPLES)]))


# Of torch alone and with two sides a tile; for a loop over more tiles, so that what an op asks once does not count.
MOST = {"n_pair": 36, "n_pair backward": 11, "generator": 36, "generator backward": 73}


@pytest.mark.parametrize("op", MOST)
def test_a_tile_asks_for_no_more_kernels_than_it_did(op):
    arguments = Arguments()
    few, many = ((arguments.tiles(pairs), asked(arguments.calls(pairs)[op])) for pairs in (800, 200))
    more = many[0] - few[0]
    assert more > 5
    each = {name: count / more for name, count in (many[1].torch - few[1].torch).items()}
    assert sum(each.values()) <= MOST[op], each
    # A number in `torch.where` would be filled into a tensor first; masks of anchors and classes are made once.
    assert not each.keys() & {"scalar_tensor", "ne", "bitwise_and"}, each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_one_panel_is_its_products(dtype):
    """No zeros to add them to, and nothing to copy."""
    rows, weight, bias = on_gpu(40, WIDTH, dtype=dtype), on_gpu(CLASSES, WIDTH, dtype=dtype), on_gpu(CLASSES)
    target, lse = on_gpu(40, dtype=torch.int64), on_gpu(40, dtype=torch.float64)
    counted = asked(
        lambda: streamed_logit_gradient(
            rows, weight, bias, target, lse, on_gpu(40), need_weight=True, weight_dtype=torch.float32
        )
    )
    assert counted.triton == 1 and counted.torch["mm"] == 2
    assert not counted.torch.keys() & {"new_zeros", "zeros", "zeros_like", "copy_", "add_", "add", "scalar_tensor"}
    if dtype == torch.bfloat16:
        assert not counted.torch["_to_copy"]
