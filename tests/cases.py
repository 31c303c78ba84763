"""Shapes, label patterns and values that break kernels, with the reason for each; shared by tests and
benchmarks.

Everything is a pure function of a seed: the same case has the same numbers on every machine and in every
order of tests. Values are float64; a test rounds them to its dtype (``tests/run_case.py`` does).

Owns :data:`BATCHES` (class structure of a batch), :data:`CLASSIFICATIONS` (rows against classes),
:data:`MATRICES` (rows and channels) and the value patterns of each. Sizes are chosen against blocks of 16
rows, 32 classes or columns and 16 channels: every looped extent takes more than three blocks plus a remainder
somewhere, because a size that fits one block hides what happens between blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 10.0  # a confident row leads by at least this much: 1 - p is then below what 16 bits keep of p


def seeded(seed: int, *salt: str) -> torch.Generator:
    """A CPU generator for ``seed`` and the names in ``salt``, so that two tensors of a case never share
    numbers.
    """
    mixed = seed
    for character in "/".join(salt):
        mixed = (mixed * 1_000_003 + ord(character)) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def normal(*shape: int, seed: int, name: str, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times ``scale``, float64, named after the tensor they fill."""
    return scale * torch.randn(shape, generator=seeded(seed, name), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------
# Batches: which sample belongs to which class


ORDERS = ("sample_major", "class_major", "shuffled")


@dataclass(frozen=True)
class Batch:
    """One batch for the ops that see class structure."""

    name: str
    counts: tuple[int, ...]  # samples per class
    order: str  # of ORDERS
    width: int  # D
    heads: int  # H
    reason: str

    @property
    def size(self) -> int:
        """N, the number of samples."""
        return sum(self.counts)

    @property
    def largest_class(self) -> int:
        """K, the largest class count."""
        return max(self.counts)

    def labels(self, seed: int = 0) -> Tensor:
        """(N,) int64 labels: not consecutive, not from 0, in the order of the case."""
        return class_labels(self.counts, self.order, seed=seed)


def class_labels(counts: Iterable[int], order: str = "sample_major", *, seed: int = 0) -> Tensor:
    """(N,) int64 labels for ``counts`` samples per class.

    ``sample_major`` takes one sample of every class in turn, ``class_major`` whole classes, ``shuffled`` a
    random interleaving. Labels step by 7 from 3, so that a label is never its class index.
    """
    if order not in ORDERS:
        raise ValueError(f"class_labels: order {order!r} is unknown; choose one of {ORDERS}")
    counts = tuple(counts)
    pairs = [(rank, i) for i, count in enumerate(counts) for rank in range(count)]
    if order == "sample_major":
        pairs.sort()
    labels = torch.tensor([3 + 7 * i for _, i in pairs], dtype=torch.int64)
    if order == "shuffled":
        labels = labels[torch.randperm(len(pairs), generator=seeded(seed, "labels"))]
    return labels


# fmt: off
BATCHES = (
    Batch("mxk", (2,) * 20, "sample_major", 32, 2, "the published layout, M x K; N = 40 is no multiple of 16"),
    Batch("mxk_triple", (3,) * 17, "class_major", 48, 4, "K = 3 tells rank k+1 from k-1; more than 3 blocks"),
    Batch("ragged", (1, 4, 2, 7, 3, 1, 5, 2), "shuffled", 17, 1, "unequal classes, singletons, odd width"),
    Batch("skewed", (33, 2, 1), "shuffled", 16, 2, "a class longer than a block: tiles without negatives"),
    Batch("one_class", (9,), "sample_major", 16, 2, "no negative: attention and its gradients are exactly 0"),
    Batch("all_distinct", (1,) * 19, "shuffled", 16, 2, "all others are negatives, nothing has a positive"),
    Batch("two_samples", (1, 1), "sample_major", 3, 1, "the smallest batch with a negative"),
    Batch("single", (1,), "sample_major", 1, 1, "one sample, one channel"),
)
# fmt: on

BATCH_VALUES = {
    "normal": "diffuse: every pair matters about alike",
    "confident": "one negative leads every row by 10 or more: softmax weights next to 0 and 1",
    "small": "x 1e-4: eps of the norms dominates",
    "large": "x 60: logits beyond what exp holds without a shift",
    "duplicates": "every sample has an equal twin in another class: ties, distance 0, equal logits",
    "constant_row": "a row without direction: centering leaves 0 and must not divide by it",
    "zero_row": "a row of zeros, as a dead extractor gives",
    "all_equal": "all rows equal: nothing to tell apart",
    "one_hot": "exact zeros in most places",
}


def embeddings(batch: Batch, values: str = "normal", *, seed: int = 0, name: str = "embeddings") -> Tensor:
    """(N, D) float64 with the value pattern ``values`` of :data:`BATCH_VALUES`."""
    n, width = batch.size, batch.width
    x = normal(n, width, seed=seed, name=name)
    if values in ("normal", "confident"):
        return x
    if values in ("small", "large"):
        return x * (1e-4 if values == "small" else 60.0)
    if values == "duplicates":
        return x[torch.arange(n) // 2]
    if values == "constant_row":
        x[n // 2] = 0.7
        return x
    if values == "zero_row":
        x[n // 2] = 0.0
        return x
    if values == "all_equal":
        return x[:1].repeat(n, 1)
    if values == "one_hot":
        return torch.eye(width, dtype=torch.float64)[torch.arange(n) % width]
    raise ValueError(f"embeddings: values {values!r} is unknown; choose one of {tuple(BATCH_VALUES)}")


def attention_inputs(batch: Batch, values: str = "normal", *, seed: int = 0) -> dict[str, Tensor]:
    """``q, k, v`` (N, H, h) and ``labels`` (N,).

    ``confident``: every receiver points at one sender of another class and leads the rest by ``MARGIN``.
    ``large``: only q is large. The other patterns come from :func:`embeddings`.
    """
    shape = (batch.size, batch.heads, batch.width // batch.heads)
    batch = Batch(batch.name, batch.counts, batch.order, shape[1] * shape[2], batch.heads, batch.reason)
    pattern = {name: values if name == "q" or values != "large" else "normal" for name in "qkv"}
    q, k, v = (embeddings(batch, pattern[name], seed=seed, name=name).reshape(shape) for name in "qkv")
    labels = batch.labels(seed)
    if values == "confident":
        negative = labels[None, :] != labels[:, None]
        drawn = torch.rand(negative.shape, generator=seeded(seed, "pick"))
        leader = torch.where(negative, drawn, torch.zeros_like(drawn)).argmax(1)
        k = k / k.norm(dim=-1, keepdim=True)
        q = k[leader]
        rivals = torch.einsum("bhd,ahd->hba", q, k)
        rivals[:, ~negative] = -1.0
        rivals[:, torch.arange(batch.size), leader] = -1.0
        gap = (1 - rivals.amax(-1)).clamp(min=0.02).T[..., None]
        q = q * (MARGIN / gap) * shape[2] ** 0.5
    return {"q": q, "k": k, "v": v, "labels": labels}


def synthesis_inputs(batch: Batch, values: str = "normal", *, seed: int = 0) -> dict[str, Tensor | float]:
    """Arguments of the synthesis (15)-(18): embeddings, labels, gate in (0, 1), kappa and mix."""
    n, width, k = batch.size, batch.width, batch.largest_class
    gate = torch.sigmoid(normal(n, n, width, seed=seed, name="gate"))
    mix = torch.rand(k, max(k - 1, 0), generator=seeded(seed, "mix"), dtype=torch.float64)
    z = embeddings(batch, values, seed=seed)
    return {"embeddings": z, "labels": batch.labels(seed), "gate": gate, "kappa": 0.375, "mix": mix}


# ----------------------------------------------------------------------------------------------------
# Classification: rows against classes


@dataclass(frozen=True)
class Classification:
    """One case of linear + cross-entropy."""

    name: str
    rows: int
    width: int  # D
    classes: int  # C
    ignored: int  # rows whose target is -100, spread over the batch
    reason: str


# fmt: off
CLASSIFICATIONS = (
    Classification("tails", 53, 50, 101, 5, "three blocks and a remainder in rows, channels and classes"),
    Classification("power_plus_one", 33, 16, 129, 0, "C = 2^k + 1: the last block holds a single class"),
    Classification("exact", 32, 32, 64, 3, "multiples of every block: no tail may be invented"),
    Classification("single_class", 7, 8, 1, 2, "C = 1: loss 0 and no gradient"),
    Classification("single_row", 1, 5, 40, 0, "one row, fewer rows and channels than a block"),
    Classification("many_labels", 20, 16, 700, 0, "targets above 255, which a narrow label type cannot hold"),
    Classification("many_chunks", 1040, 16, 40, 16, "130 chunks of 8 rows: sums in 16 bits lose here"),
    Classification("all_ignored", 19, 16, 33, 19, "no valid row: loss 0 and zero gradients, not 0 / 0"),
)
# fmt: on

CLASSIFICATION_VALUES = {
    "diffuse": "near uniform predictions: every class carries gradient",
    "confident": "the true class leads by 10 or more: p - 1 cancels, errors hide in the others",
    "wrong": "a false class leads by 10 or more: large losses, two classes carry the gradient",
    "saturated_negative": "all logits near -200: padding at 0 takes all the mass, exp underflows unshifted",
    "saturated_positive": "all logits near +200: exp overflows unshifted",
    "ties": "classes come in equal pairs: the largest logit is never alone",
}


def classification_inputs(
    case: Classification, values: str = "diffuse", *, seed: int = 0
) -> dict[str, Tensor]:
    """``x`` (rows, D), ``weight`` (C, D), ``bias`` (C,) and ``target`` (rows,) int64 with -100 for ignored
    rows.
    """
    if values not in CLASSIFICATION_VALUES:
        raise ValueError(
            f"classification_inputs: {values!r} is unknown; choose of {tuple(CLASSIFICATION_VALUES)}"
        )
    x = normal(case.rows, case.width, seed=seed, name="x")
    weight = normal(case.classes, case.width, seed=seed, name="weight", scale=case.width**-0.5)
    bias = normal(case.classes, seed=seed, name="bias", scale=0.5)
    target = torch.randint(case.classes, (case.rows,), generator=seeded(seed, "target"))
    target[0], target[-1] = 0, case.classes - 1
    if values in ("confident", "wrong") and case.classes > 1:
        unit = weight / weight.norm(dim=1, keepdim=True)
        leader = target if values == "confident" else (target + 1) % case.classes
        logits = unit @ unit.T
        logits.fill_diagonal_(-1.0)
        gap = (1 - logits[leader].amax(1, keepdim=True)).clamp(min=0.02)
        weight, bias = unit, 0.1 * bias
        x = unit[leader] * ((MARGIN + 1) / gap) + 0.01 * x
    if values == "saturated_negative":
        bias = bias - 200.0
    if values == "saturated_positive":
        bias = bias + 200.0
    if values == "ties":
        pair = torch.arange(case.classes) // 2
        weight, bias = weight[pair], bias[pair]
    if case.ignored:
        skipped = (torch.arange(case.ignored) * case.rows // case.ignored + seed) % case.rows
        target[skipped] = -100
    return {"x": x, "weight": weight, "bias": bias, "target": target}


# ----------------------------------------------------------------------------------------------------
# Matrices: rows and channels, for ops without class structure


@dataclass(frozen=True)
class Matrix:
    """One case of rows times channels."""

    name: str
    rows: int
    width: int
    reason: str


MATRICES = (
    Matrix("tails", 53, 50, "three blocks and a remainder in rows and channels"),
    Matrix("exact", 32, 32, "multiples of every block"),
    Matrix("single_row", 1, 33, "one row: sums over rows have one term"),
    Matrix("single_channel", 17, 1, "one channel: no variance at all"),
    Matrix("long", 1029, 24, "more than 128 blocks of 8 rows: sums in 16 bits lose here"),
    Matrix("wide", 5, 513, "a width of 2^k + 1 channels"),
)

MATRIX_VALUES = {
    "normal": "diffuse",
    "small": "x 1e-4: variance far below eps",
    "large": "x 60: what float16 still holds after a product",
    "constant_row": "a row without variance",
    "zero_row": "a row of zeros",
    "duplicates": "equal pairs of rows: ties",
    "one_hot": "exact zeros in most places",
    "offset": "a common offset of 1e4: a variance from squares cancels (float32 and float64 only)",
    "subnormal": "below the smallest normal number of float32",
}


def matrix(case: Matrix, values: str = "normal", *, seed: int = 0, name: str = "x") -> Tensor:
    """(rows, width) float64 with the value pattern ``values`` of :data:`MATRIX_VALUES`."""
    x = normal(case.rows, case.width, seed=seed, name=name)
    scales = {"normal": 1.0, "small": 1e-4, "large": 60.0, "subnormal": 1e-39}
    if values in scales:
        return scales[values] * x
    if values == "offset":
        return x + 1e4
    if values in ("constant_row", "zero_row"):
        x[case.rows // 2] = 0.7 if values == "constant_row" else 0.0
        return x
    if values == "duplicates":
        return x[torch.arange(case.rows) // 2]
    if values == "one_hot":
        return torch.eye(case.width, dtype=torch.float64)[torch.arange(case.rows) % case.width]
    raise ValueError(f"matrix: values {values!r} is unknown; choose one of {tuple(MATRIX_VALUES)}")
