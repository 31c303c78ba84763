"""Op: the class structure of a batch (docs/maths.md 9b) as tensors of static shape.

Sorts the samples by class once at the border. Shapes depend on N alone, so that the number of classes, which is data,
stays inside the ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcng.batch_layout import BatchLayout
from gcng.ops import native
from gcng.ops.registration import define_op
from gcng.ops.transfers import Shared, fetched, sent
from gcng.reference.dropout import node_identity


class ClassMajor(NamedTuple):
    """A batch in class-major order; all int64 (N,) unless noted."""

    order: Tensor  # batch position of each class-major slot
    inverse: Tensor  # class-major slot of each batch position
    labels: Tensor  # label of each slot
    class_index: Tensor  # class of each slot, classes numbered by first appearance: ascending
    rank: Tensor  # rank in the class, by order of appearance
    class_start: Tensor  # (N + 1,) first slot of each class, padded with N
    positive: Tensor  # slot of the positive; a singleton points at itself
    is_anchor: Tensor  # bool: classes of at least two samples
    identity: Tensor  # node identity for the counter-based dropout


native.define(
    "class_layout(Tensor labels, Tensor(a!) order, Tensor(b!) class_index, Tensor(c!) rank, "
    "Tensor(d!) class_start) -> ()"
)


def _class_layout(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if labels.device.type == "cpu" and (kernels := native.cpu()) is not None:
        outputs = _class_layout_fake(labels)
        kernels.class_layout(labels.long().contiguous(), *outputs)
        return outputs
    n = labels.shape[0]
    position = torch.arange(n, device=labels.device)
    distinct, inverse = torch.unique(labels.long(), return_inverse=True)
    first = torch.full_like(distinct, n).scatter_reduce_(0, inverse, position, "amin")
    class_of = torch.argsort(torch.argsort(first))[inverse]
    order = torch.argsort(class_of, stable=True)
    class_index = class_of[order]
    class_start = torch.searchsorted(class_index, torch.arange(n + 1, device=labels.device))
    rank = position - class_start[class_index]
    return order, class_index, rank, class_start


def _class_layout_fake(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = labels.shape[0]
    return tuple(labels.new_empty(size, dtype=torch.int64) for size in (n, n, n, n + 1))


_op = define_op("class_layout(Tensor labels) -> (Tensor, Tensor, Tensor, Tensor)", _class_layout, _class_layout_fake)


def class_major(labels: Tensor) -> ClassMajor:
    """Work out the class structure of (N,) integer labels in any order, on the labels' device."""
    order, class_index, rank, class_start = _op(labels)
    start = class_start[class_index]
    count = class_start[class_index + 1] - start if labels.shape[0] else start
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    sorted_labels = labels.long()[order]
    return ClassMajor(
        order,
        inverse,
        sorted_labels,
        class_index,
        rank,
        class_start,
        start + (rank + 1) % count.clamp(min=1),
        count > 1,
        node_identity(sorted_labels, rank),
    )


def class_major_beside(op: str, labels: Tensor, layout: BatchLayout | None, device: torch.device) -> ClassMajor:
    """The class structure with its index tensors on ``device``; ``class_start`` stays on the host.

    So no op has to wait for a GPU, but for labels that lie there, once. What a ``layout`` has been asked for on a
    device it keeps, so that a CUDA graph captures no copy from the host; the layout has to be kept for as long as the
    graph is replayed. Another stream waits for the one that asked first.
    """
    known = None if layout is None else layout.on_device.get(device)
    host = host_labels(op, labels, layout)
    if known is not None:
        return known.tensors()
    if layout is None:
        return _moved(class_major(host), device)
    with torch.inference_mode(False):  # an evaluation may be the first to ask, and a training would save these
        moved = _moved(class_major(host), device)
    layout.on_device[device] = Shared(moved, device)
    return moved


def _moved(made: ClassMajor, device: torch.device) -> ClassMajor:
    """All index tensors but ``class_start`` on a device, by one copy."""
    if made.order.device == device:
        return made
    names = [name for name in ClassMajor._fields if name != "class_start"]
    together = sent(torch.stack([getattr(made, name).long() for name in names]), device)
    columns = dict(zip(names, together.unbind(), strict=True))
    return made._replace(**columns | {"is_anchor": columns["is_anchor"].bool()})


def class_boundaries(class_start: Tensor) -> list[int]:
    """Class starts as host integers, ending with N: ``[0, K_0, K_0 + K_1, ..., N]``."""
    starts = class_start.tolist()
    n = len(starts) - 1
    return [start for start in starts if start < n] + [n]


def host_labels(op: str, labels: Tensor, layout: BatchLayout | None) -> Tensor:
    """The labels on the host, to work out classes from: those of ``layout`` where one is given, without a wait.

    The one wait for labels on a GPU is here: what follows from N numbers is worked out beside the CPU's own work, and
    every look at it on the device would wait for all that is queued there. A trace keeps the device.
    """
    if layout is None:
        return fetched(labels)
    if not isinstance(layout, BatchLayout):
        raise TypeError(f"{op}: layout must be a gcng.BatchLayout, got {type(layout).__name__}")
    if layout.num_samples != labels.shape[0]:
        raise ValueError(f"{op}: layout describes {layout.num_samples} samples but labels has {labels.shape[0]}")
    # Of labels on a device the layout is trusted: to look at them is the wait that it is there to spare.
    known = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and not torch.equal(labels.long(), layout.labels):
        index = int((labels.long() != layout.labels).nonzero()[0, 0])
        raise ValueError(
            f"{op}: layout belongs to other labels: at {index} it has {int(layout.labels[index])}, and labels "
            f"{int(labels[index])}; make it from this batch with gcng.BatchLayout(labels)"
        )
    return layout.labels
