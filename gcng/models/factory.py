"""Extractors by name: the shipped network, torchvision and timm models, and any callable by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gcng.models.freezing import HEAD_NAMES
from gcng.models.small import LinearExtractor, SmallConvNet

HEADS = ("linear", "norm_linear")
POOLINGS = ("average", "average_max")
SPECS = '"small_conv", "linear", "torchvision:<name>", "timm:<name>" or "package.module:callable"'


def build_extractor(spec: str, embedding_size: int, **options: Any) -> nn.Module:
    """Build a feature extractor, inputs -> (N, embedding_size).

    ========================== ==============================================================================
    ``spec``                   what is built
    ========================== ==============================================================================
    ``"small_conv"``           `SmallConvNet`; options ``in_channels``, ``channels``
    ``"linear"``               `LinearExtractor`; options ``in_features``, ``bias``
    ``"torchvision:resnet50"`` ``torchvision.models.get_model``, its last layer replaced; options ``head``,
                               ``pooling`` and those of the model, such as ``weights="DEFAULT"`` (default:
                               no weights)
    ``"timm:name"``            ``timm.create_model``, its last layer replaced; options ``head`` and those of
                               ``create_model``, such as ``pretrained=True`` (default: no weights)
    ``"package.module:name"``  ``name(embedding_size, **options)``, which returns an ``nn.Module``
    ========================== ==============================================================================

    ``head`` is ``"linear"`` (default) or ``"norm_linear"``, batch norm before the linear layer as in the
    published models. ``pooling`` is ``"average"`` (the model's own) or ``"average_max"``, the sum of average
    and maximum (``MODEL.POOLING`` of the recipes), for models with an ``avgpool`` layer.

    Raises:
        ValueError: ``spec`` or an option is not understood; lists what is.
        ModuleNotFoundError: torchvision, timm or the module of an import path is absent; says what to do.
        TypeError: the callable does not take the options, or does not return an ``nn.Module``.

    Example:
        >>> build_extractor("small_conv", 64, in_channels=3)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """
    if not isinstance(spec, str):
        raise TypeError(
            f"build_extractor: spec must be text, {SPECS}, got {type(spec).__name__}; an nn.Module needs no "
            "building, use it as it is"
        )
    if isinstance(embedding_size, bool) or not isinstance(embedding_size, int) or embedding_size < 1:
        raise ValueError(
            f"build_extractor: embedding_size must be an integer of at least 1, got {embedding_size!r}"
        )
    if spec in _SHIPPED:
        return _call(spec, _SHIPPED[spec], embedding_size, options)
    library, separator, name = spec.partition(":")
    if not separator or not library or not name:
        raise ValueError(f"build_extractor: unknown spec {spec!r}; use {SPECS}")
    if library == "torchvision":
        return _build_torchvision(name, embedding_size, **options)
    if library == "timm":
        return _build_timm(name, embedding_size, **options)
    return _call(spec, _import_callable(spec, library, name), embedding_size, options)


_SHIPPED: dict[str, Callable[..., nn.Module]] = {"small_conv": SmallConvNet, "linear": LinearExtractor}


def _call(spec: str, build: Callable[..., Any], embedding_size: int, options: dict[str, Any]) -> nn.Module:
    try:
        inspect.signature(build).bind(embedding_size, **options)
    except TypeError as error:
        raise TypeError(
            f"build_extractor: {spec!r} is called as callable(embedding_size, **options); {error}. Its "
            f"signature is {inspect.signature(build)}"
        ) from None
    except ValueError:
        pass  # a builtin without a signature: the call itself tells
    extractor = build(embedding_size, **options)
    if not isinstance(extractor, nn.Module):
        raise TypeError(
            f"build_extractor: {spec!r} returned {type(extractor).__name__}; expected an nn.Module"
        )
    return extractor


def _import_callable(spec: str, module_name: str, name: str) -> Callable[..., Any]:
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module was found; something that it imports is missing
        raise ModuleNotFoundError(
            f"build_extractor: cannot import {error.name!r} for {spec!r}; install it, or put its folder on "
            "PYTHONPATH",
            name=error.name,
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"build_extractor: {spec!r}: {module_name} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"build_extractor: {spec!r} is {type(found).__name__}, which cannot be called")
    return found


def _library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"build_extractor: {purpose} needs {error.name or name}, which is not installed: pip install "
            f"{name.partition('.')[0]} (in a build that fits the installed torch), or give your own model as "
            '"package.module:callable"',
            name=error.name,
        ) from error


def _build_torchvision(
    name: str, embedding_size: int, *, head: str = "linear", pooling: str = "average", **options: Any
) -> nn.Module:
    _check_choice("head", head, HEADS)
    _check_choice("pooling", pooling, POOLINGS)
    models = _library("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models():
        raise ValueError(
            f"build_extractor: torchvision has no model {name!r}; torchvision.models.list_models() lists them"
        )
    # Their auxiliary classifiers would make the training output a tuple. Published weights hold them, and torchvision
    # refuses to leave them out while it loads those.
    has_auxiliary = "googlenet" in name or "inception" in name
    drops_auxiliary = has_auxiliary and not options.get("aux_logits")
    if drops_auxiliary:
        options.pop("aux_logits", None)
        if options.get("weights") is None:
            options = {"aux_logits": False, "init_weights": True, **options}
    model = models.get_model(name, **options)
    if drops_auxiliary:
        _drop_auxiliary_classifiers(model)
    if pooling == "average_max":
        if not isinstance(getattr(model, "avgpool", None), nn.Module):
            raise ValueError(
                f"build_extractor: torchvision:{name} has no avgpool layer; use pooling='average'"
            )
        model.avgpool = AverageMaxPool()
    replace_head(model, embedding_size, head=head)
    return model


def _drop_auxiliary_classifiers(model: nn.Module) -> None:
    model.aux_logits = False
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)


def _build_timm(name: str, embedding_size: int, *, head: str = "linear", **options: Any) -> nn.Module:
    _check_choice("head", head, HEADS)
    timm = _library("timm", f"timm:{name}")
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"build_extractor: timm has no model {name!r}; timm.list_models() lists them")
    backbone = timm.create_model(name, num_classes=0, **options)
    return PooledExtractor(backbone, make_head(backbone.num_features, embedding_size, head))


class AverageMaxPool(nn.Module):
    """(N, C, H, W) -> (N, C, 1, 1): average plus maximum over the places."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3), keepdim=True) + features.amax(dim=(2, 3), keepdim=True)


class PooledExtractor(nn.Module):
    """A backbone that gives (N, features), and a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))


def make_head(in_features: int, embedding_size: int, kind: str = "linear") -> nn.Module:
    """``"linear"``: Linear; ``"norm_linear"``: BatchNorm1d, then Linear."""
    _check_choice("head", kind, HEADS)
    linear = nn.Linear(in_features, embedding_size)
    return linear if kind == "linear" else nn.Sequential(nn.BatchNorm1d(in_features), linear)


def replace_head(model: nn.Module, embedding_size: int, *, head: str = "linear") -> nn.Module:
    """Replace the classifier of a classification model by an embedding layer, in place; returns it.

    Takes the last ``nn.Linear`` inside the first of the attributes ``head``, ``heads``, ``fc``,
    ``classifier`` that holds one, otherwise the last ``nn.Linear`` of the model.

    Raises:
        ValueError: there is no ``nn.Linear``.
    """
    places = [
        (prefix, child)
        for prefix in (*HEAD_NAMES, "heads")
        if isinstance(child := getattr(model, prefix, None), nn.Module)
    ]
    for prefix, root in [*places, ("", model)]:
        found = [path for path, module in root.named_modules() if isinstance(module, nn.Linear)]
        if found:
            path = ".".join(part for part in (prefix, found[-1]) if part)
            parent_path, _, attribute = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            layer = make_head(getattr(parent, attribute).in_features, embedding_size, head)
            setattr(parent, attribute, layer)
            return layer
    raise ValueError(
        f"replace_head: {type(model).__name__} has no nn.Linear to replace; wrap it in a module that ends in "
        "an nn.Linear named `head`"
    )


def check_extractor(extractor: nn.Module, inputs: Tensor, embedding_size: int) -> None:
    """Run one batch without gradients and check that it gives (N, embedding_size) finite floats.

    Raises:
        TypeError, ValueError: what came and what is wanted.
    """
    modes = [(module, module.training) for module in extractor.modules()]
    extractor.eval()
    try:
        with torch.no_grad():
            outputs = extractor(inputs)
    finally:
        for module, mode in modes:  # extractor.train() would thaw the parts that the caller keeps in eval()
            module.training = mode
    name = type(extractor).__name__
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        came = f"{outputs.dtype} tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"check_extractor: {name} returned {came}; expected one float tensor (N, D)")
    if outputs.shape != (len(inputs), embedding_size):
        raise ValueError(
            f"check_extractor: {name} turned {len(inputs)} inputs into {tuple(outputs.shape)}; expected "
            f"({len(inputs)}, {embedding_size})"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError(
            f"check_extractor: {name} returned values that are not finite; check its weights and inputs"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"build_extractor: {name} must be one of {', '.join(choices)}, got {value!r}")
