"""Translation of the authors' YAML settings into a gcng configuration.

Owns the table of their keys: where each one goes, what it is when a file leaves it out (their own default),
and which ones have no effect.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

_BACKBONES = {
    "Resnet50": "torchvision:resnet50",
    "Googlenet": "torchvision:googlenet",
    "DINO": "timm:vit_small_patch16_224.dino",
}
_POLICIES = {"step": "step"}


@dataclass(frozen=True)
class _Rule:
    target: str
    default: Any
    convert: Callable[[Any], Any]


def _chosen(table: Mapping[str, str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in table:
            raise ValueError(f"must be one of {', '.join(table)}, got {value!r}")
        return table[value]

    return convert


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be True or False, got {value!r}")
    return value


def _pooling(value: Any) -> str:
    return "average_max" if _flag(value) else "average"


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value:
        raise ValueError(f"must be an integer, got {value!r}")
    return int(value)


def _number(value: Any) -> float:
    # PyYAML reads 1e-4 (no point) as text, so numbers in text are numbers here.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value!r}")
    return float(value)


def _pair(value: Any) -> list[float]:
    items = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) != 2:
        raise ValueError(f"must be a pair of numbers, got {value!r}")
    return [float(item) for item in items]


_RULES = {
    "MODEL.BACKBONE": _Rule("model.backbone", "Resnet50", _chosen(_BACKBONES)),
    "MODEL.PRETRAINED": _Rule("model.pretrained", True, _flag),
    "MODEL.EMBEDDING_SIZE": _Rule("model.embedding_size", 512, _integer),
    "MODEL.NORM": _Rule("model.normalize", False, _flag),
    "MODEL.POOLING": _Rule("model.pooling", False, _pooling),
    "MODEL.GNN_LAYER": _Rule("loss.num_layers", 2, _integer),
    "MODEL.ATT_HEAD": _Rule("loss.num_heads", 8, _integer),
    "LOSS.ALPHA": _Rule("loss.alpha", 90.0, _number),
    "LOSS.BETA": _Rule("loss.beta", 10000, _number),
    "LOSS.SOFTMAX_FACTOR": _Rule("loss.softmax_factor", 10000, _number),
    "LOSS.DOT_WEIGHT": _Rule("loss.similarity_weight", 20, _number),
    "LOSS.DIV_WEIGHT": _Rule("loss.diversity_weight", 10, _number),
    "TRAIN.NUM_SAMPLED_CLASSES": _Rule("data.num_classes_per_batch", 40, _integer),
    "TRAIN.NUM_PER_CLASS": _Rule("data.samples_per_class", 2, _integer),
    "TRAIN.EPOCHES": _Rule("schedule.epochs", 300, _integer),
    "TRAIN.SCALE": _Rule("data.crop_scale", (0.08, 1), _pair),
    "SOLVER.BASE_LR": _Rule("optimizer.extractor_lr", 0.1, _number),
    "SOLVER.EMBEDDING_RATIO": _Rule("optimizer.embedding_ratio", 1.0, _number),
    "SOLVER.CLASSIFIER_LR": _Rule("optimizer.classifier_lr", 0.001, _number),
    "SOLVER.GNN_LR": _Rule("optimizer.graph_lr", 0.0003, _number),
    "SOLVER.WEIGHT_DECAY": _Rule("optimizer.weight_decay", 0.0, _number),
    "SOLVER.LR_POLICY": _Rule("schedule.extractor_policy", "step", _chosen(_POLICIES)),
    "SOLVER.METRIC_DECAY_STEPS": _Rule("schedule.metric_decay_steps", 10, _integer),
    "SOLVER.METRIC_GAMMA": _Rule("schedule.metric_gamma", 0.1, _number),
    "SOLVER.WARM_UP_EPOCH": _Rule("schedule.warm_up_epochs", 1, _integer),
    "SOLVER.BN_FREEZE": _Rule("model.freeze_batch_norm", False, _flag),
    "SOLVER.PATCH_FREEZE": _Rule("model.freeze_patch_embedding", False, _flag),
    "DATA_LOADER.NUM_THREADS": _Rule("data.workers", 8, _integer),
    "TEST.EVAL_EPOCH": _Rule("evaluation.every", 10, _integer),
}

# Keys that the authors' code accepts and never uses, or that name places on their machine.
_IGNORED = {
    "SOLVER.GNN_GAMMA": "never used by the authors (the graph's rate follows a cosine)",
    "SOLVER.GNN_DECAY_STEPS": "never used by the authors (the graph's rate follows a cosine)",
    "NUM_GPUS": "never used by the authors",
    "OUTPUT_DIR": "never used by the authors; use run.output",
    "DEBUG": "never used by the authors",
    "CUDA": "never used by the authors; use run.device",
    "PYTORCH_VERSION_LESS_THAN_040": "never used by the authors",
    "ROOT_DIR": "a path of the authors' checkout",
    "DATA_DIR": "a path of the authors' checkout; use data.root",
    "TRAIN.MODEL_PATH": "use run.output",
    "TRAIN.BOARD_LOG_PATH": "use run.output and logging.tensorboard",
}
_CLIP = ("SOLVER.GRAD_CLIP", "SOLVER.GRAD_L2_CLIP")
_PATHS = ("TRAIN.DATASET", "TEST.DATASET")


@dataclass(frozen=True)
class ImportedRecipe:
    """A translated settings file.

    Attributes:
        config: Nested dictionaries in the layout of :class:`gcng.training.Config`.
        ignored: Key of the file to the reason why it has no counterpart.
        notes: What a reader of the translation should know.
    """

    config: dict[str, dict[str, Any]]
    ignored: dict[str, str]
    notes: tuple[str, ...]


def import_yaml(path: str | Path) -> ImportedRecipe:
    """Read one of the authors' YAML files.

    Raises:
        ModuleNotFoundError: PyYAML is not installed; the message says how to get it.
        OSError: The file cannot be read.
        ValueError: It is not YAML, not a mapping, has an unknown key, or a value of the wrong kind.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("gcng recipes import reads YAML with PyYAML: pip install pyyaml") from error
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(content).__name__}")
    return translate(content, source=str(path))


def translate(settings: Mapping[str, Any], *, source: str = "settings") -> ImportedRecipe:
    """Translate the authors' settings (nested, or with dotted keys) into a gcng configuration.

    Keys that the file leaves out get the authors' own defaults, because that is what the file means there.
    Their ``GRAD_L2_CLIP`` clips by value, so it becomes ``optimizer.clip_value``.

    Raises:
        ValueError: An unknown key or a value of the wrong kind; names the key.
    """
    given = _flatten(settings)
    unknown = [key for key in given if key not in {*_RULES, *_IGNORED, *_CLIP, *_PATHS}]
    if unknown:
        raise ValueError(f"{source}: unknown key {unknown[0]!r}; it is not a setting of the authors' code")
    config: dict[str, dict[str, Any]] = {}
    for key, rule in _RULES.items():
        try:
            value = rule.convert(given.get(key, rule.default))
        except (ValueError, TypeError, SyntaxError) as error:
            raise ValueError(f"{source}: {key} {error}") from None
        section, _, name = rule.target.partition(".")
        config.setdefault(section, {})[name] = value
    clip_on, bound = given.get("SOLVER.GRAD_CLIP", True), given.get("SOLVER.GRAD_L2_CLIP", 0.35)
    config["model"]["head"] = "norm_linear"  # the authors' extractors always end so
    config["optimizer"]["clip_value"] = _number(bound) if clip_on else "none"
    config["optimizer"]["clip_norm"] = "none"
    notes = ["SOLVER.GRAD_L2_CLIP clips by value in the authors' code: optimizer.clip_value"]
    notes += _set_data_paths(given, config)
    return ImportedRecipe(config, {key: _IGNORED[key] for key in given if key in _IGNORED}, tuple(notes))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set_data_paths(given: Mapping[str, Any], config: dict[str, dict[str, Any]]) -> list[str]:
    """Set kind, root and Recall@K ranks from the authors' paths, as their code chooses by these paths too."""
    train, test = (given.get(key) for key in _PATHS)
    if train is None or test is None:
        return ["TRAIN.DATASET or TEST.DATASET is not given: set data.kind, data.root and evaluation.k"]
    folders = PurePosixPath(str(train)), PurePosixPath(str(test))
    if (folders[0].name, folders[1].name) != ("train", "test") or folders[0].parent != folders[1].parent:
        return [f"data.root is not set: {train} and {test} are not the train and test folders of one place"]
    root = folders[0].parent
    in_shop = "IN_SHOP" in root.parts
    if in_shop:
        root = PurePosixPath(*root.parts[: root.parts.index("IN_SHOP") + 1])
    config["data"] |= {"kind": "inshop" if in_shop else "class_folders", "root": str(root)}
    ranks = (
        [1, 10, 20, 30, 40, 50] if in_shop else [1, 10, 100, 1000] if "SOP" in root.parts else [1, 2, 4, 8]
    )
    config["evaluation"]["k"] = ranks
    return [f"data.root is {root}, relative to where gcng runs"]
