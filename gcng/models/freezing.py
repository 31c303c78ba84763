"""Which parameters train: the head and the rest, warm-up freezing, and frozen batch norm."""

from __future__ import annotations

from types import TracebackType

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
HEAD_NAMES = ("head", "fc", "classifier")


def find_head(extractor: nn.Module) -> nn.Module:
    """The embedding layer of an extractor.

    The attribute ``head``, ``fc`` or ``classifier``, the first of these that is a module with parameters;
    otherwise the last ``nn.Linear`` in the order of registration.

    Raises:
        ValueError: the extractor has none of them.
    """
    for name in HEAD_NAMES:
        module = getattr(extractor, name, None)
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            return module
    linear = [module for module in extractor.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"find_head: {type(extractor).__name__} has no attribute {', '.join(HEAD_NAMES)} and no "
            "nn.Linear; name its embedding layer `head`, or pass head=..."
        )
    return linear[-1]


def split_parameters(
    extractor: nn.Module, head: nn.Module | None = None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the backbone and of the head, for learning rates per part.

    Args:
        extractor: the whole model.
        head: its embedding layer; None asks `find_head`.

    Returns:
        ``(backbone, head)``: disjoint, together all parameters, each in the order of
        ``extractor.parameters()``.

    Raises:
        ValueError: a parameter of ``head`` is not one of ``extractor``.

    Example:
        >>> backbone, head = split_parameters(extractor)
        >>> optimizer = torch.optim.AdamW([{"params": backbone, "lr": 1e-4}, {"params": head, "lr": 1e-3}])
    """
    head = find_head(extractor) if head is None else head
    head_ids = {id(parameter) for parameter in head.parameters()}
    everything = list(extractor.parameters())
    if not head_ids <= {id(parameter) for parameter in everything}:
        raise ValueError(
            f"split_parameters: head ({type(head).__name__}) is not part of the extractor "
            f"({type(extractor).__name__})"
        )
    return (
        [parameter for parameter in everything if id(parameter) not in head_ids],
        [parameter for parameter in everything if id(parameter) in head_ids],
    )


class FrozenParameters:
    """Parameters that do not train until ``release()``, or until the end of the ``with`` block."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # Only what trained before is frozen, so that release() does not thaw what the caller had frozen.
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None  # a gradient left over from before would still be applied by an optimizer

    def release(self) -> None:
        """Let them train again. Calling it twice does nothing more."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.parameters = []

    def __enter__(self) -> FrozenParameters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def freeze_backbone(extractor: nn.Module, head: nn.Module | None = None) -> FrozenParameters:
    """Freeze all parameters but the head's: the warm-up of the published recipes (``SOLVER.WARM_UP_EPOCH``).

    Batch norm keeps its mode and its running statistics; see `freeze_batch_norm`.

    Args:
        extractor: the whole model.
        head: its embedding layer; None asks `find_head`.

    Returns:
        A handle; ``release()`` ends the warm-up. It can be used as a context manager.
    """
    return FrozenParameters(split_parameters(extractor, head)[0])


def freeze_batch_norm(module: nn.Module, *, affine: bool = True) -> int:
    """Put every batch norm inside ``module`` into eval mode: running statistics are used and kept.

    ``module.train()`` puts them back into training mode, so call this after it, in every epoch.

    Args:
        module: the model or a part of it, e.g. the backbone.
        affine: also stop the training of the norms' weights and biases (``SOLVER.BN_FREEZE`` of the recipes).

    Returns:
        The number of batch norms.
    """
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS)]
    for norm in norms:
        norm.eval()
        if affine:
            for parameter in norm.parameters():
                parameter.requires_grad_(False)
    return len(norms)


def freeze_named(module: nn.Module, name: str) -> FrozenParameters:
    """Freeze the parameters with ``name`` among the dotted parts of their own name.

    ``freeze_named(extractor, "patch_embed")`` is ``SOLVER.PATCH_FREEZE`` of the vision-transformer recipes.

    Raises:
        ValueError: no parameter has that name; lists the top-level parts of the module.
    """
    chosen = [parameter for full, parameter in module.named_parameters() if name in full.split(".")]
    if not chosen:
        parts = ", ".join(child for child, _ in module.named_children()) or "(none)"
        raise ValueError(
            f"freeze_named: {type(module).__name__} has no parameter with {name!r} in its name; its parts "
            f"are {parts}"
        )
    return FrozenParameters(chosen)
