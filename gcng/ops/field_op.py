"""What the ops over an edge field share: its arguments as one record, what their backward keeps, how gradients return.

A schema spells a field as the seven arguments of ``FIELD``; implementations, fakes and formulas take them as one
:class:`FieldArguments`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcng.ops.pair_field import Dropout, FieldGradients, PairField
from gcng.ops.registration import any_needed

# How the schema of an op spells a field.
FIELD = "Tensor base, bool packed, Tensor[] chain, Tensor identity, Tensor seed, float p, int first_layer"


class FieldArguments(NamedTuple):
    """The arguments of ``FIELD``; see :class:`gcng.ops.pair_field.PairField`."""

    base: Tensor
    packed: bool
    chain: Sequence[Tensor]
    identity: Tensor
    seed: Tensor
    p: float
    first_layer: int

    @property
    def n(self) -> int:
        """Number of nodes."""
        return self.identity.shape[0]

    def open(self) -> PairField:
        """The field itself."""
        dropout = Dropout(self.identity, self.seed, self.p, self.first_layer)
        return PairField(self.base, self.packed, self.n, self.chain, dropout)

    def gradients(self, field: FieldGradients) -> list[Tensor]:
        """What an op returns of its field's gradients: of base and chain as far as needed, in the dtypes that came."""
        out = [field.base.to(self.base.dtype)] if field.need_base else []
        chain = zip(field.chain(), self.chain, strict=True) if field.need_chain else ()
        return out + [grad.to(x.dtype) for grad, x in chain]

    def like_gradients(self, need_base: bool, need_chain: bool) -> list[Tensor]:
        """The same for a fake."""
        return empty_like_all(([self.base] if need_base else []) + (list(self.chain) if need_chain else []))

    def spread(self, needs: tuple[bool, bool] = (False, False), grads: Iterable[Tensor] = ()) -> tuple:
        """Gradients of the seven arguments, as autograd wants them, from those of base and chain as far as needed."""
        rest = list(grads)
        base = rest.pop(0) if needs[0] else None
        return base, None, rest if needs[1] else [None] * len(self.chain), None, None, None, None


def grouped(*records: type[NamedTuple], after: int = 0) -> Callable[[Callable], Callable]:
    """Decorator of a function that a schema calls: the arguments behind the first ``after`` come in records."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(*split_arguments(arguments, *records, after=after))

        return call

    return decorate


def split_arguments(arguments: Sequence[Any], *records: type[NamedTuple], after: int = 0) -> list[Any]:
    """Replace the arguments of a schema, from the one at ``after`` on, by records; what is left stays as it is."""
    out, start = list(arguments[:after]), after
    for record in records:
        stop = start + len(record._fields)
        out.append(record(*arguments[start:stop]))
        start = stop
    return out + list(arguments[start:])


def keep_field(ctx: Any, edges: FieldArguments, stashes: Sequence[Tensor], *tensors: Tensor) -> None:
    """Keep a field, the op's outputs that are there for its backward only, and other tensors."""
    ctx.num_kept = len(stashes) + len(tensors)
    ctx.field = edges.packed, edges.p, edges.first_layer
    ctx.save_for_backward(*stashes, *tensors, edges.base, edges.identity, edges.seed, *edges.chain)
    ctx.mark_non_differentiable(*stashes)
    # Or autograd would fill the gradients of stashed outputs with zeros, each as large as its stash.
    ctx.set_materialize_grads(False)


def kept_field(ctx: Any) -> tuple[FieldArguments, list[Tensor]]:
    """What :func:`keep_field` kept: the field, and the stashes and other tensors."""
    saved = list(ctx.saved_tensors)
    kept, (base, identity, seed, *chain) = saved[: ctx.num_kept], saved[ctx.num_kept :]
    packed, p, first_layer = ctx.field
    return FieldArguments(base, packed, chain, identity, seed, p, first_layer), kept


def field_needs(ctx: Any, at: int = 0) -> tuple[bool, bool]:
    """Whether the gradients of base and chain are wanted, of a field whose arguments start at ``at``."""
    return ctx.needs_input_grad[at], any_needed(ctx.needs_input_grad[at + 2])


def empty_like_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors like these, undefined."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
