"""Optimizers, learning rate schedules and frozen parts, as the published recipes have them.

Owns how a configuration becomes three AdamW and their schedules, and which parameters take part in which
epoch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR

from gcng.models.freezing import BATCH_NORMS, find_head, freeze_named, split_parameters
from gcng.training.config import Config, ScheduleConfig
from gcng.training.errors import ConfigError
from gcng.training.step import Optimizers


def build_optimizers(config: Config, extractor: nn.Module, criterion: nn.Module) -> Optimizers:
    """Three AdamW: extractor (head at ``embedding_ratio`` times the rate), graph network, classifier."""
    settings = config.optimizer
    rate = settings.extractor_lr
    if settings.embedding_ratio == 1.0:  # no head needs to be found
        backbone, head = list(extractor.parameters()), []
    else:
        backbone, head = _split(extractor, "optimizer.embedding_ratio")
    groups = [{"params": backbone, "lr": rate}, {"params": head, "lr": rate * settings.embedding_ratio}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("model.backbone: the extractor has no parameters to train")
    return Optimizers(
        extractor=AdamW(groups, lr=rate, weight_decay=settings.weight_decay),
        graph=AdamW(
            [p for p in criterion.graph.parameters() if p.requires_grad],
            lr=settings.graph_lr,
            weight_decay=settings.weight_decay,
        ),
        classifier=AdamW(
            criterion.classifier.parameters(),
            lr=settings.classifier_lr,
            weight_decay=settings.classifier_weight_decay,
        ),
    )


def build_schedulers(config: Config, optimizers: Optimizers) -> dict[str, LRScheduler]:
    """Schedules stepped once an epoch: the extractor's step decay and the graph's cosine down to 0."""
    schedule: ScheduleConfig = config.schedule
    extractor: LRScheduler = LambdaLR(optimizers.extractor, _one)
    if schedule.extractor_policy == "step":
        extractor = StepLR(optimizers.extractor, schedule.metric_decay_steps, schedule.metric_gamma)
    graph: LRScheduler = LambdaLR(optimizers.graph, _one)
    if schedule.graph_policy == "cosine":
        graph = CosineAnnealingLR(optimizers.graph, schedule.epochs)
    return {"extractor": extractor, "graph": graph}


def _split(extractor: nn.Module, key: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    try:
        return split_parameters(extractor)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _one(_: int) -> float:
    return 1.0


class FrozenParts:
    """Which parts of the extractor do not learn, epoch by epoch.

    * Warm-up: in the first ``warm_up_epochs`` epochs only the embedding head has gradients.
    * ``freeze_batch_norm``: the batch norms outside the head stay in evaluation mode, so their statistics
    never
      change; gain and shift are still trained (as in the authors' runs after the warm-up).
    * ``freeze_patch_embedding``: a vision transformer's ``patch_embed`` is never trained. (The authors'
    switch of
      this name only calls ``eval()`` on it, which changes nothing.)

    Raises:
        ConfigError: What is to be frozen does not exist in the extractor.
    """

    def __init__(self, config: Config, extractor: nn.Module) -> None:
        self._extractor = extractor
        self._warm_up_epochs = config.schedule.warm_up_epochs
        self._warm = _split(extractor, "schedule.warm_up_epochs")[0] if self._warm_up_epochs else []
        if config.model.freeze_patch_embedding:
            try:
                freeze_named(extractor, "patch_embed")
            except ValueError as error:
                raise ConfigError(f"model.freeze_patch_embedding: {error}") from error
        self._trained = [parameter for parameter in extractor.parameters() if parameter.requires_grad]
        self._norms: list[nn.Module] = []
        if config.model.freeze_batch_norm:
            head = set(find_head(extractor).modules())
            self._norms = [m for m in extractor.modules() if isinstance(m, BATCH_NORMS) and m not in head]

    def begin_epoch(self, epoch: int) -> None:
        """Set training mode and the ``requires_grad`` flags of ``epoch`` (from 0)."""
        self._extractor.train()
        for norm in self._norms:
            norm.eval()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        if epoch < self._warm_up_epochs:
            for parameter in self._warm:
                parameter.requires_grad_(False)


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is a device, else the CPU; anything else must exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device is {name!r} but torch sees {torch.cuda.device_count()} CUDA devices; use run.device=cpu"
        )
    return device
