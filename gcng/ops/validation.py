"""Argument checks shared by all ops: cheap, always on, the same words on every backend.

A message names the op, the argument, what came, what is wanted, and the remedy. Checks never synchronise a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from gcng.mode import in_reference_mode

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch converts them, and computes little with them


def check_float_matrix(op: str, name: str, x: Tensor, *, dims: int = 2, shape: str = "(N, D)") -> None:
    """Refuse anything but a dense floating tensor of ``dims`` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    refuse_forward_mode(op, x)
    if x.is_nested:
        raise TypeError(f"{op}: {name} is a nested tensor; use {name}.to_padded_tensor(0.0)")
    if x.is_quantized:
        raise TypeError(f"{op}: {name} is quantized; use {name}.dequantize()")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense strided tensor, got layout {x.layout}; use {name}.to_dense()")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype}; use float16, bfloat16, float32 or float64 (e.g. {name}.float())"
        )
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must be {shape}, got shape {tuple(x.shape)}")


def refuse_transforms(op: str) -> None:
    """Refuse to run inside torch.func.grad, which has no way to a hand-written backward."""
    transform = peek_interpreter_stack()
    if transform is not None and transform.key() == TransformType.Grad and not in_reference_mode():
        raise NotImplementedError(
            f"{op}: torch.func.grad and vjp are not supported; use torch.autograd.grad, or gcng.reference_mode()"
        )


def refuse_batched(op: str, x: Tensor) -> None:
    """Refuse a tensor inside vmap, for ops that read more of a batch than its shape."""
    if is_batchedtensor(x) and not in_reference_mode():
        raise NotImplementedError(f"{op}: vmap is not supported; loop over the batches, or use gcng.reference_mode()")


def refuse_forward_mode(op: str, *arguments: Any) -> None:
    """Refuse tensors, also inside lists, that carry a tangent: no op has a forward-mode formula, and would drop it."""
    if forward_ad._current_level < 0 or in_reference_mode():
        return
    for x in arguments:
        if isinstance(x, (list, tuple)):
            refuse_forward_mode(op, *x)
        elif isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode derivatives (jvp) are not supported; use gcng.reference_mode()"
            )


def check_channels(op: str, name: str, x: Tensor) -> None:
    """Refuse a tensor without channels: every formula divides by D."""
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has no channels, got shape {tuple(x.shape)}; D must be at least 1")


def check_labels(op: str, labels: Tensor, length: int, *, name: str = "labels", of: str = "embeddings") -> None:
    """Refuse labels that are not an integer vector of the batch's length, or (on the CPU) that int64 does not hold.

    What passes is for the op to convert by ``labels.long()``.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(labels).__name__}; use torch.as_tensor(...)")
    if labels.dtype not in (*INTEGER, *WIDE_UNSIGNED):
        raise TypeError(f"{op}: {name} has dtype {labels.dtype}; use an integer dtype, e.g. int64 by {name}.long()")
    if labels.dim() != 1 or labels.shape[0] != length:
        raise ValueError(
            f"{op}: {name} has shape {tuple(labels.shape)}; expected ({length},), one label for each row of {of}"
            + (f"; use {name}.squeeze(1)" if labels.dim() == 2 and labels.shape[-1] == 1 else "")
        )
    if labels.dtype == torch.uint64 and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        beyond = labels.long() < 0
        if bool(beyond.any()):
            index = int(beyond.nonzero()[0, 0])
            raise ValueError(
                f"{op}: {name}[{index}] is {labels.tolist()[index]}; use labels below 2**63, which int64 holds"
            )


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Refuse mixed floating dtypes outside autocast, naming the first two that differ."""
    first_name, first = None, None
    for name, x in tensors.items():
        if x is None:
            continue
        if first is None:
            first_name, first = name, x
        elif x.dtype != first.dtype and not autocasts(x.device):
            raise TypeError(
                f"{op}: {first_name} is {first.dtype} but {name} is {x.dtype}; cast one of them, or run under "
                f"torch.autocast"
            )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch refuses to be asked about meta tensors."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_beside_parameters(op: str, embeddings: Tensor, weight: Tensor) -> None:
    """Refuse embeddings on another device than a module's parameters, or in another dtype outside autocast."""
    if embeddings.device != weight.device:
        raise ValueError(
            f"{op}: embeddings is on {embeddings.device} but the parameters are on {weight.device}; move the module "
            f"with .to({str(embeddings.device)!r})"
        )
    check_same_dtype(op, embeddings=embeddings, weight=weight)


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors on different devices, naming the first two that differ."""
    first_name, first = None, None
    for name, x in tensors.items():
        if x is None:
            continue
        if first is None:
            first_name, first = name, x
        elif x.device != first.device:
            raise ValueError(
                f"{op}: {first_name} is on {first.device} but {name} is on {x.device}; move one of them with .to(...)"
            )


def check_kappa(op: str, kappa: float | Tensor) -> None:
    """Refuse a hardness (16) that is not one number in [0, 1]; of a tensor on a device, only its shape is looked at."""
    if isinstance(kappa, bool) or not isinstance(kappa, (int, float, Tensor)):
        raise TypeError(f"{op}: kappa must be a number or a tensor of one number, got {type(kappa).__name__}")
    if isinstance(kappa, Tensor):
        if kappa.numel() != 1 or kappa.is_complex():
            raise ValueError(f"{op}: kappa has shape {tuple(kappa.shape)} and dtype {kappa.dtype}; expected one number")
        if kappa.device.type != "cpu" or torch.compiler.is_compiling():
            return
    value = float(kappa.detach()) if isinstance(kappa, Tensor) else kappa
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: kappa is {value}; expected a hardness in [0, 1], as exp(-alpha / j_avg) of (16) is")


def check_mix_tensor(op: str, mix: Tensor) -> None:
    """Refuse mixing numbers that are not a floating tensor."""
    if not isinstance(mix, Tensor):
        raise TypeError(
            f"{op}: mix must be a (K, K - 1) torch.Tensor, got {type(mix).__name__}; draw it with torch.rand(K, K - 1)"
        )
    if mix.dtype not in FLOATING:
        raise TypeError(f"{op}: mix has dtype {mix.dtype}; use a floating dtype, e.g. mix.float()")


def check_mix(op: str, mix: Tensor, most: int) -> None:
    """Refuse mixing numbers of (18) that do not fit the largest class of the batch."""
    if mix.dim() != 2 or mix.shape[0] < most or mix.shape[1] < most - 1:
        raise ValueError(
            f"{op}: mix has shape {tuple(mix.shape)}; expected (K, K - 1) = ({most}, {most - 1}) for K = {most}, the "
            f"largest number of samples of a class in this batch; draw it with torch.rand({most}, {most - 1})"
        )
