"""How gcng tells PyTorch about an op: schema, implementation, fake, autograd, autocast.

Schemas live here in Python, so that a missing extension can never remove an op. Every op has one implementation
registered for all devices (blocked torch); kernels for a device are added to it by dispatch key.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gcng.ops.validation import refuse_forward_mode, refuse_transforms


class _Library(torch.library.Library):
    """A library whose autograd kernels refuse forward-mode derivatives and torch.func.grad.

    Of any argument, so of the parameters of a module too, which no public function sees.
    """

    def impl(self, name: str, fn: Callable[..., Any], key: str = "", **options: Any) -> Any:
        if key == "Autograd":
            fn = _reverse_mode_only(name, fn)
        return super().impl(name, fn, key, **options)


def _reverse_mode_only(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(keyset: Any, *arguments: Any) -> Any:
        refuse_transforms(f"gcng::{name}")
        refuse_forward_mode(f"gcng::{name}", *arguments)
        return kernel(keyset, *arguments)

    return checked


LIBRARY = _Library("gcng", "FRAGMENT")


def define_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one op.

    Args:
        schema: signature without the namespace, e.g. ``"center_normalize(Tensor x) -> (Tensor, Tensor)"``.
        implementation: the blocked torch path; runs on every device, never returns an alias of an input.
        fake: same signature; allocates what the implementation allocates, from symbolic sizes only.

    Returns:
        The ``torch.ops.gcng.<name>.default`` overload, to be called by the autograd formula and the public function.
    """
    name = schema.split("(", 1)[0]

    @functools.wraps(implementation)
    def outside_autocast(*arguments: Any, **options: Any) -> Any:
        # A backward called inside an autocast region must not round the products of a kernel.
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return implementation(*arguments, **options)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.impl(name, outside_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gcng::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.gcng, name).default


def define_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Attach a hand-written backward to an op; it refuses to be differentiated a second time, or in forward mode."""

    def first_order_only(ctx: Any, *grads: Any) -> Any:
        # The engine runs a backward with grad mode on exactly when create_graph=True was asked for.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"gcng::{name}: double backward is not supported; use gcng.reference_mode() for higher derivatives"
            )
        return backward(ctx, *grads)

    torch.library.register_autograd(f"gcng::{name}", first_order_only, setup_context=setup_context, lib=LIBRARY)


def any_needed(needs: Any) -> bool:
    """Whether any tensor of a list argument needs a gradient (a bool or a list of bools, by torch version)."""
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def define_autocast(name: str) -> None:
    """Under autocast, cast the floating inputs of an op to float32, so that mixed node dtypes meet in one."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"gcng::{name}", device, torch.float32, lib=LIBRARY)


def define_product_autocast(op: Any) -> None:
    """Under autocast, an op whose time is in products of its inputs: cast them as autocast casts those of ``linear``.

    On a GPU that is the dtype autocast was asked for, and what is summed up stays float32 as for any 16-bit input.
    On the CPU it is float32.
    """

    def cast(arguments: Sequence[Any], device: str, operand: torch.dtype) -> list[Any]:
        return [cast_floating(x, device, operand) for x in arguments]

    _register_autocast(op, cast)


def define_field_autocast(op: Any, base: str = "base") -> None:
    """Under autocast, an op over an edge field: its ``base`` carries the dtype of the operands, the rest is float32.

    Operands of products over pairs are 16 bit on a GPU, where that is what autocast is for; on the CPU they are
    float32. Statistics, node tensors and weights arrive in float32 on both.
    """
    position = [argument.name for argument in op._schema.arguments].index(base)

    def cast(arguments: Sequence[Any], device: str, operand: torch.dtype) -> list[Any]:
        wide = [cast_floating(x, device, torch.float32) for x in arguments]
        wide[position] = cast_floating(arguments[position], device, operand)
        return wide

    _register_autocast(op, cast)


def _register_autocast(op: Any, cast: Callable[[Sequence[Any], str, torch.dtype], list[Any]]) -> None:
    """Call an op below autocast, with what ``cast`` makes of its arguments, the device, and the dtype of operands."""
    name = op._schema.name.split("::")[1]
    for device in ("cpu", "cuda"):
        place = f"Autocast{device.upper()}"
        key = getattr(torch._C.DispatchKey, place)

        def below(*arguments: Any, key: Any = key, device: str = device) -> Any:
            operand = torch.get_autocast_dtype(device) if device == "cuda" else torch.float32
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*cast(arguments, device, operand))

        op.py_impl(key)(below)
        LIBRARY.impl(name, lambda _keys, *arguments, below=below: below(*arguments), place, with_keyset=True)


def cast_floating(value: Any, device: str, dtype: torch.dtype) -> Any:
    """A floating tensor of a device, or a list with such tensors, in ``dtype``; float64 and the rest as they are."""
    if isinstance(value, (list, tuple)):
        return [cast_floating(x, device, dtype) for x in value]
    if not isinstance(value, torch.Tensor) or value.device.type != device:
        return value
    return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tiles are computed in: 16-bit inputs are read as such and accumulated in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
