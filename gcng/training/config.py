"""What a run is made of: typed, frozen configuration sections with their defaults and bounds.

Owns the keys. Reading files and overrides is in :mod:`gcng.training.config_io`. Imports neither torch nor
numpy, so the command line can show and check a configuration at once.

Numeric defaults are those of the published recipe ``sop/resnet50``; every published recipe is in
:mod:`gcng.recipes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def bounded(
    default: Any,
    help_text: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    choices=None,
    below=None,
) -> Any:
    """A dataclass field with its meaning and its bounds as metadata (checked by ``config_io``)."""
    metadata = {"help": help_text, "at_least": at_least, "above": above, "below": below, "choices": choices}
    return field(default=default, metadata=metadata)


DATA_KINDS = (
    *("matplotlib_letters", "glyphs", "omniglot"),
    *("class_folders", "manifest", "cub200", "cars196", "sop", "inshop"),
)


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run takes place."""

    output: str = bounded("runs/gcng", "folder of the log and the checkpoints")
    seed: int = bounded(0, "seed of weights, batches, augmentation, mixing and dropout", at_least=0, below=2**63)
    device: str = bounded("auto", "auto, cpu, cuda or cuda:INDEX")
    precision: str = bounded(
        "float32", "autocast dtype of the extractor and the ops", choices=("float32", "bfloat16", "float16")
    )
    nonfinite_policy: str = bounded(
        "skip", "skip a step that is not finite, or stop at the first", choices=("skip", "stop")
    )
    nonfinite_limit: int = bounded(10, "skipped steps in a row that end the run as diverged", at_least=1)


@dataclass(frozen=True)
class DataConfig:
    """Data sets, batches of M classes x K samples, augmentation."""

    kind: str = bounded("matplotlib_letters", "kind of data set: see docs/training.md", choices=DATA_KINDS)
    root: str = bounded("", "folder or file of the data set; matplotlib_letters needs none")
    num_classes_per_batch: int = bounded(40, "M: classes in a batch", at_least=1)
    samples_per_class: int = bounded(2, "K: samples of each class in a batch", at_least=1)
    batches_per_epoch: int = bounded(0, "steps of an epoch; 0 means samples // batch size", at_least=0)
    image_size: int = bounded(0, "side in pixels after cropping; 0 means the data set's own", at_least=0)
    crop_scale: tuple[float, ...] = bounded((0.08, 1.0), "area range of the random resized crop")
    workers: int = bounded(0, "loader processes; results do not depend on them", at_least=0)


@dataclass(frozen=True)
class ModelConfig:
    """The embedding extractor."""

    backbone: str = bounded("small_conv", "small_conv, torchvision:NAME, timm:NAME or an import path MODULE:CALLABLE")
    embedding_size: int = bounded(512, "D: width of the embeddings", at_least=1)
    pretrained: bool = bounded(False, "start from the backbone's published weights")
    normalize: bool = bounded(False, "scale embeddings to unit length")
    pooling: str = bounded("average", "pooling before the head", choices=("average", "average_max"))
    head: str = bounded(
        "linear", "embedding layer; norm_linear has a batch norm first", choices=("linear", "norm_linear")
    )
    freeze_batch_norm: bool = bounded(False, "keep the backbone's batch norm statistics fixed")
    freeze_patch_embedding: bool = bounded(False, "do not train a vision transformer's patch embedding")


@dataclass(frozen=True)
class LossConfig:
    """Arguments of :class:`gcng.losses.GCAHNGLoss`."""

    num_layers: int = bounded(1, "L: propagation layers", at_least=1)
    num_heads: int = bounded(2, "H: attention heads; divides the embedding size", at_least=1)
    alpha: float = bounded(5.0, "how fast hardness grows as the N-pair loss falls (16)", at_least=0)
    beta: float = bounded(20.0, "how fast the synthetic term fades in as the generator loss falls (21)", at_least=0)
    softmax_factor: float = bounded(20.0, "weight of the class cross-entropy of synthetic negatives (24)", at_least=0)
    similarity_weight: float = bounded(20.0, "weight of the similarity term (25)", at_least=0)
    diversity_weight: float = bounded(60.0, "weight of the diversity term (26)", at_least=0)
    l2_reg: float = bounded(3e-3, "weight of the squared norm in the N-pair losses", at_least=0)
    dropout: float = bounded(0.1, "dropout of the edge attention (11)", at_least=0, below=1)
    singletons: str = bounded("skip", "classes with one sample in a batch", choices=("skip", "error"))
    official_sim_mask: bool = bounded(False, "use the authors' mask in (25)")
    memory_budget: str = bounded("", "workspace of the loss such as 2GiB; empty means from free memory")


@dataclass(frozen=True)
class OptimizerConfig:
    """Three AdamW: extractor, graph network, classifier."""

    extractor_lr: float = bounded(2e-4, "learning rate of the extractor", above=0)
    embedding_ratio: float = bounded(1.0, "learning rate of the embedding head over that of the backbone", above=0)
    graph_lr: float = bounded(1.5e-4, "learning rate of the graph network", above=0)
    classifier_lr: float = bounded(1e-3, "learning rate of the softmax classifier", above=0)
    weight_decay: float = bounded(1e-4, "decay of extractor and graph network", at_least=0)
    classifier_weight_decay: float = bounded(0.01, "decay of the classifier", at_least=0)
    clip_value: float | None = bounded(10.0, "clamp gradients elementwise to +-value; none is off", above=0)
    clip_norm: float | None = bounded(None, "scale gradients to this norm instead; none is off", above=0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Epochs and learning rates over them."""

    epochs: int = bounded(200, "epochs of the run", at_least=1)
    warm_up_epochs: int = bounded(1, "first epochs in which only the embedding head is trained", at_least=0)
    extractor_policy: str = bounded("step", "learning rate of the extractor over epochs", choices=("step", "constant"))
    metric_decay_steps: int = bounded(20, "epochs between two decays of the extractor's rate", at_least=1)
    metric_gamma: float = bounded(0.5, "factor of each decay", above=0)
    graph_policy: str = bounded("cosine", "learning rate of the graph over epochs", choices=("cosine", "constant"))


@dataclass(frozen=True)
class EvaluationConfig:
    """Retrieval on classes that were not trained on."""

    every: int = bounded(5, "epochs between two evaluations; 0 is never", at_least=0)
    k: tuple[int, ...] = bounded((1, 10, 100, 1000), "ranks of Recall@K")
    batch_size: int = bounded(128, "images embedded at once", at_least=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Crash-safe snapshots of the whole run."""

    every_steps: int = bounded(0, "also save every so many steps; 0 is at epoch ends only", at_least=0)
    keep: int = bounded(3, "newest checkpoints to keep, beside the best", at_least=1)
    best_metric: str = bounded("recall_at_1", "metric whose best checkpoint is kept; higher is better")
    allow_config_change: bool = bounded(False, "resume although keys that change results differ")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while the run goes on. The JSON-lines log is always written."""

    every: int = bounded(10, "steps between two log records", at_least=1)
    progress: str = bounded("auto", "progress bar on stderr; auto is on a terminal", choices=("auto", "on", "off"))
    tensorboard: bool = bounded(False, "also write TensorBoard scalars (needs the tensorboard package)")


@dataclass(frozen=True)
class Config:
    """One whole run. Read it with :func:`gcng.training.load_config`.

    Example:
        >>> from gcng.training import load_config
        >>> load_config(overrides=["loss.alpha=4"]).loss.alpha
        4.0
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# Keys that may differ between a checkpoint and the run that resumes from it: they change where and how often,
# not what is computed.
FREE_ON_RESUME = frozenset(
    {
        "run.output",
        "run.device",
        "run.nonfinite_policy",
        "run.nonfinite_limit",
        "data.root",
        "data.workers",
        "evaluation.batch_size",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "checkpoint.best_metric",
        "checkpoint.allow_config_change",
        "logging.every",
        "logging.progress",
        "logging.tensorboard",
    }
)
