"""One training of the demo: the same start and the same batches whatever the method."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from demo.probe import Probe, look_at_negatives
from demo.settings import METHODS, Settings
from gcng.data import ClassBalancedBatchSampler, GlyphAugmentation, GlyphDataset
from gcng.data.sampler import mix_seed
from gcng.losses import GCAHNGLoss
from gcng.losses.n_pair import n_pair
from gcng.models import SmallConvNet
from gcng.ops.layout import class_major
from gcng.training import Optimizers, train_step

# Purposes of random numbers; each draws from a generator of its own, seeded by (purpose, seed, ...).
WEIGHTS, BATCHES, AUGMENTATION, CRITERION, STEPS, PROBE_BATCH = range(6)
L2_REG = 3e-3  # of (19), in both methods
EMBEDDED_AT_ONCE = 300


@dataclass
class Clock:
    """Adds up wall and processor seconds of the parts of a training that count as training."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _started: tuple[float, float] = (0.0, 0.0)

    def __enter__(self) -> Clock:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]


@dataclass
class Trained:
    """What a training leaves behind."""

    extractor: nn.Module
    criterion: GCAHNGLoss | None
    clock: Clock
    start_checksum: str  # of the extractor's initial weights
    batch_checksum: str  # of the augmented images and labels of all batches
    terms: dict[str, list[float]] = field(default_factory=dict)  # one value per iteration
    probes: list[Probe] = field(default_factory=list)


def start_extractor(settings: Settings, seed: int) -> nn.Module:
    """The extractor before training: the same weights for every method."""
    torch.manual_seed(mix_seed(WEIGHTS, seed))
    return SmallConvNet(settings.embedding_size)


def augmented_batches(data: GlyphDataset, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``settings.iterations`` batches, images (N, 1, S, S) and labels (N,): the same for every method."""
    sampler = ClassBalancedBatchSampler(
        data,
        settings.classes_per_batch,
        settings.samples_per_class,
        batches_per_epoch=settings.iterations,
        seed=mix_seed(BATCHES, seed),
    )
    augment = GlyphAugmentation()
    for iteration, indices in enumerate(sampler):
        images, labels = data.batch(indices)
        generator = torch.Generator().manual_seed(mix_seed(AUGMENTATION, seed, iteration))
        yield augment(images, generator), labels


def train(
    method: str,
    data: GlyphDataset,
    settings: Settings,
    seed: int,
    *,
    say: Callable[[str], None] = lambda line: None,
    aside: Callable[[], AbstractContextManager] = nullcontext,
) -> Trained:
    """Train an extractor by plain N-pair (19) or by GCA-HNG (28).

    Args:
        method: one of `METHODS`.
        data: the training classes.
        seed: decides weights, batches and augmentation, for both methods alike.
        say: called with a line of progress now and then.
        aside: entered around each look at the generated negatives, which is no part of training.
    """
    if method not in METHODS:
        raise ValueError(f"train: method must be one of {', '.join(METHODS)}, got {method!r}")
    extractor = start_extractor(settings, seed)
    clock, digest = Clock(), hashlib.sha256()
    result = Trained(extractor, None, clock, checksum(extractor), "")
    with clock:
        step = _NPairStep(extractor, settings)
        if method == "gca-hng":
            step = _GCAHNGStep(extractor, settings, len(data.classes), seed)
            result.criterion = step.criterion
    looks = {round(i * settings.iterations / settings.probes) for i in range(settings.probes + 1)}
    probe_batch = probe_images(data, settings)
    for iteration, (images, labels) in enumerate(augmented_batches(data, settings, seed), start=1):
        if method == "gca-hng" and iteration - 1 in looks:
            _look(result, probe_batch, iteration - 1, aside)
        digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
        with clock:
            terms = step(images, labels, end_of_epoch=iteration % settings.epoch_length == 0)
        for name, value in terms.items():
            result.terms.setdefault(name, []).append(value)
        if iteration % 50 == 0 or iteration == settings.iterations:
            say(f"{iteration}/{settings.iterations} iterations, N-pair loss {terms['n_pair']:.3f}")
    if method == "gca-hng":
        _look(result, probe_batch, settings.iterations, aside)
    result.batch_checksum = digest.hexdigest()
    return result


def probe_images(data: GlyphDataset, settings: Settings) -> tuple[Tensor, Tensor]:
    """One fixed batch of the training classes, without augmentation, on which generated negatives are measured."""
    sampler = ClassBalancedBatchSampler(
        data,
        settings.classes_per_batch,
        settings.samples_per_class,
        batches_per_epoch=1,
        seed=mix_seed(PROBE_BATCH),
    )
    return data.batch(next(iter(sampler)))


def embed(extractor: nn.Module, data: GlyphDataset) -> Tensor:
    """(n, D) embeddings of all images, in evaluation mode."""
    training = extractor.training
    extractor.eval()
    with torch.no_grad():
        parts = [
            extractor(data.batch(range(start, min(start + EMBEDDED_AT_ONCE, len(data))))[0])
            for start in range(0, len(data), EMBEDDED_AT_ONCE)
        ]
    extractor.train(training)
    return torch.cat(parts)


def checksum(module: nn.Module) -> str:
    """SHA-256 of a module's state, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _look(
    result: Trained,
    batch: tuple[Tensor, Tensor],
    iteration: int,
    aside: Callable[[], AbstractContextManager],
) -> None:
    with aside():
        result.probes.append(look_at_negatives(result.extractor, result.criterion, batch, iteration))


class _NPairStep:
    """One optimizer on (19)."""

    def __init__(self, extractor: nn.Module, settings: Settings) -> None:
        self.extractor, self.settings = extractor, settings
        self.optimizer, self.schedule = _extractor_optimizer(extractor, settings)

    def __call__(self, images: Tensor, labels: Tensor, *, end_of_epoch: bool) -> dict[str, float]:
        batch = class_major(labels)
        loss = n_pair(self.extractor(images)[batch.order], batch, l2_reg=L2_REG)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(self.extractor.parameters(), self.settings.clip_value)
        self.optimizer.step()
        self.schedule.step()
        return {"n_pair": loss.item()}


class _GCAHNGStep:
    """`gcng.training.train_step`, with a schedule for each of the extractor's and the graph's learning rates."""

    def __init__(self, extractor: nn.Module, settings: Settings, num_classes: int, seed: int) -> None:
        self.extractor, self.settings = extractor, settings
        torch.manual_seed(mix_seed(CRITERION, seed))
        self.criterion = GCAHNGLoss(
            settings.embedding_size,
            num_classes,
            settings.num_layers,
            settings.num_heads,
            alpha=settings.alpha,
            beta=settings.beta,
            similarity_weight=settings.similarity_weight,
            diversity_weight=settings.diversity_weight,
            l2_reg=L2_REG,
        )
        optimizer, schedule = _extractor_optimizer(extractor, settings)
        graph = torch.optim.AdamW(
            self.criterion.graph.parameters(), lr=settings.graph_lr, weight_decay=settings.extractor_decay
        )
        classifier = torch.optim.AdamW(self.criterion.classifier.parameters(), lr=settings.classifier_lr)
        self.optimizers = Optimizers(optimizer, graph, classifier)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(graph, settings.iterations)
        self.schedules = (schedule, cosine)
        self.generator = torch.Generator().manual_seed(mix_seed(STEPS, seed))

    def __call__(self, images: Tensor, labels: Tensor, *, end_of_epoch: bool) -> dict[str, float]:
        terms = train_step(
            self.extractor,
            self.criterion,
            images,
            labels,
            self.optimizers,
            clip_value=self.settings.clip_value,
            generator=self.generator,
        )
        if terms.skipped:
            raise RuntimeError(f"the demo's training diverged: a step was given up because of its {terms.skipped}")
        for schedule in self.schedules:
            schedule.step()
        if end_of_epoch:
            self.criterion.schedule.end_epoch()
        return {name: value.item() for name, value in terms.named().items()}


def _extractor_optimizer(extractor: nn.Module, settings: Settings):
    optimizer = torch.optim.AdamW(
        extractor.parameters(), lr=settings.extractor_lr, weight_decay=settings.extractor_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.extractor_lr, total_steps=settings.iterations)
    return optimizer, schedule
