"""The shipped recipes are the published settings, and the authors' YAML files translate to them."""

from __future__ import annotations

import ast
import csv
import sys
from pathlib import Path

import pytest

from gcng.recipes import import_yaml, load_recipe, recipe_names, recipe_text, translate
from gcng.training.config_io import load_config, to_toml

# Key in the authors' files -> key here. Written out again, so that a slip in the importer's table shows.
TARGETS = {
    "MODEL.EMBEDDING_SIZE": "model.embedding_size",
    "MODEL.GNN_LAYER": "loss.num_layers",
    "MODEL.ATT_HEAD": "loss.num_heads",
    "MODEL.NORM": "model.normalize",
    "TRAIN.NUM_SAMPLED_CLASSES": "data.num_classes_per_batch",
    "TRAIN.NUM_PER_CLASS": "data.samples_per_class",
    "TRAIN.EPOCHES": "schedule.epochs",
    "LOSS.ALPHA": "loss.alpha",
    "LOSS.BETA": "loss.beta",
    "LOSS.SOFTMAX_FACTOR": "loss.softmax_factor",
    "LOSS.DOT_WEIGHT": "loss.similarity_weight",
    "LOSS.DIV_WEIGHT": "loss.diversity_weight",
    "SOLVER.BASE_LR": "optimizer.extractor_lr",
    "SOLVER.EMBEDDING_RATIO": "optimizer.embedding_ratio",
    "SOLVER.CLASSIFIER_LR": "optimizer.classifier_lr",
    "SOLVER.GNN_LR": "optimizer.graph_lr",
    "SOLVER.LR_POLICY": "schedule.extractor_policy",
    "SOLVER.METRIC_DECAY_STEPS": "schedule.metric_decay_steps",
    "SOLVER.METRIC_GAMMA": "schedule.metric_gamma",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.WARM_UP_EPOCH": "schedule.warm_up_epochs",
    "SOLVER.BN_FREEZE": "model.freeze_batch_norm",
    "SOLVER.PATCH_FREEZE": "model.freeze_patch_embedding",
    "TEST.EVAL_EPOCH": "evaluation.every",
}
BACKBONES = {
    "Resnet50": "torchvision:resnet50",
    "Googlenet": "torchvision:googlenet",
    "DINO": "timm:vit_small_patch16_224.dino",
}


def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def published():
    with open(Path(__file__).parent / "published_recipes.csv", newline="") as file:
        (_, *names), *rows = csv.reader(file)
    return {
        name: {row[0]: literal(row[column]) for row in rows} for column, name in enumerate(names, start=1)
    }


PUBLISHED = published()


def value(config, key):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_all_twelve_are_there_and_no_other():
    assert recipe_names() == sorted(PUBLISHED) and len(PUBLISHED) == 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_equals_the_published_setting(name):
    settings, config = dict(PUBLISHED[name]), load_config(recipe=name)
    for key, target in TARGETS.items():
        assert value(config, target) == settings.pop(key), key
    assert config.model.backbone == BACKBONES[settings.pop("MODEL.BACKBONE")]
    assert config.data.crop_scale == settings.pop("TRAIN.SCALE")
    assert config.model.pooling == ("average_max" if settings.pop("MODEL.POOLING") else "average")
    assert settings.pop("SOLVER.GRAD_CLIP") is True
    # Their key says L2 norm, their code clips by value.
    assert config.optimizer.clip_value == settings.pop("SOLVER.GRAD_L2_CLIP")
    assert config.optimizer.clip_norm is None and config.optimizer.classifier_weight_decay == 0.01
    assert settings == {}  # no published key was left out
    assert config.model.pretrained and config.model.head == "norm_linear"


def test_known_numbers_of_one_recipe():
    config = load_config(recipe="cub/resnet50")
    assert (config.data.num_classes_per_batch, config.data.samples_per_class) == (27, 3)
    assert (config.loss.num_layers, config.loss.num_heads, config.schedule.epochs) == (2, 4, 100)
    assert (config.loss.alpha, config.loss.beta, config.loss.diversity_weight) == (5.0, 20.0, 60.0)
    assert (config.optimizer.extractor_lr, config.optimizer.graph_lr) == (1.5e-4, 1.5e-4)
    assert config.evaluation.k == (1, 2, 4, 8) and config.data.kind == "cub200"


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(KeyError, match="unknown recipe 'sop/resnet'; did you mean 'sop/resnet50'"):
        recipe_text("sop/resnet")
    with pytest.raises(KeyError, match="available: cars/dino-vits16"):
        recipe_text("../config")


def nested(flat):
    tree = {}
    for key, item in flat.items():
        *path, name = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[name] = item
    return tree


def folders(name):
    place = {"cars": "CARS196", "cub": "CUB200", "inshop": "IN_SHOP", "sop": "SOP"}[name.partition("/")[0]]
    return {"TRAIN.DATASET": f"data/{place}/class/train", "TEST.DATASET": f"data/{place}/class/test"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_translation_gives_the_recipe(name):
    imported = translate(nested(PUBLISHED[name] | folders(name)))
    recipe = load_recipe(name)
    for section, content in recipe.items():
        for key, item in content.items():
            if (section, key) not in (("data", "kind"), ("data", "image_size")):
                assert imported.config[section][key] == item, (section, key)
    assert imported.ignored == {}
    place = "data/IN_SHOP" if "inshop" in name else folders(name)["TRAIN.DATASET"].removesuffix("/train")
    kind = "inshop" if "inshop" in name else "class_folders"
    assert (imported.config["data"]["kind"], imported.config["data"]["root"]) == (kind, place)


def test_keys_without_effect_are_reported_and_defaults_are_the_authors():
    given = {
        "NUM_GPUS": 1,
        "DEBUG": False,
        "OUTPUT_DIR": "x",
        "SOLVER": {"GNN_GAMMA": 0.5, "GNN_DECAY_STEPS": 20},
    }
    imported = translate(given | {"TRAIN": {"MODEL_PATH": "a", "BOARD_LOG_PATH": "b"}})
    assert set(imported.ignored) == {
        *("NUM_GPUS", "DEBUG", "OUTPUT_DIR", "SOLVER.GNN_GAMMA", "SOLVER.GNN_DECAY_STEPS"),
        *("TRAIN.MODEL_PATH", "TRAIN.BOARD_LOG_PATH"),
    }
    assert all(imported.ignored.values())
    config = load_config(base=imported.config)
    assert (config.loss.alpha, config.loss.beta, config.loss.softmax_factor) == (90.0, 10000.0, 10000.0)
    assert (config.optimizer.clip_value, config.optimizer.extractor_lr, config.data.workers) == (0.35, 0.1, 8)
    assert any("data.kind" in note for note in imported.notes)


def test_clipping_that_is_off_stays_off():
    imported = translate({"SOLVER": {"GRAD_CLIP": False, "GRAD_L2_CLIP": 10.0}})
    assert load_config(base=imported.config).optimizer.clip_value is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LOSS": {"ALHPA": 1}}, "settings: unknown key 'LOSS.ALHPA'"),
        ({"LOSS": {"ALPHA": "x"}}, "settings: LOSS.ALPHA could not convert"),
        ({"LOSS": {"ALPHA": True}}, "LOSS.ALPHA must be a number, got True"),
        (
            {"MODEL": {"BACKBONE": "VGG"}},
            "MODEL.BACKBONE must be one of Resnet50, .*, got 'VGG'",
        ),
        ({"MODEL": {"NORM": 1}}, "MODEL.NORM must be True or False, got 1"),
        ({"MODEL": {"GNN_LAYER": 1.5}}, "MODEL.GNN_LAYER must be an integer, got 1.5"),
        ({"SOLVER": {"LR_POLICY": "cos"}}, "SOLVER.LR_POLICY must be one of step, got 'cos'"),
        ({"TRAIN": {"SCALE": "(1)"}}, "TRAIN.SCALE must be a pair"),
        ({"TRAIN": {"SCALE": "__import__('os')"}}, "TRAIN.SCALE"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        translate(settings)


YAML = """
MODEL:
  BACKBONE: Resnet50
  EMBEDDING_SIZE: 512
  POOLING: True
  GNN_LAYER: 1
  ATT_HEAD: 2
NUM_GPUS: 1
LOSS: {DIV_WEIGHT: 60, DOT_WEIGHT: 20, BETA: 20, ALPHA: 5.0, SOFTMAX_FACTOR: 20}
SOLVER:
  BASE_LR: 2e-4
  GNN_LR: 0.00015
  METRIC_GAMMA: 0.5
  GNN_GAMMA: 0.5
  METRIC_DECAY_STEPS: 20
  WEIGHT_DECAY: 0.0001
  GRAD_L2_CLIP: 10.0
TRAIN: {NUM_PER_CLASS: 2, NUM_SAMPLED_CLASSES: 40, EPOCHES: 200, SCALE: "(0.08, 1)"}
TEST: {EVAL_EPOCH: 5}
"""


def test_yaml_file_becomes_the_recipe(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    (tmp_path / "a.yml").write_text(YAML)
    imported = import_yaml(tmp_path / "a.yml")
    (tmp_path / "a.toml").write_text(to_toml(imported.config, "translated"))
    config, recipe = load_config(tmp_path / "a.toml"), load_config(recipe="sop/resnet50")
    assert (config.loss, config.optimizer, config.schedule) == (
        recipe.loss,
        recipe.optimizer,
        recipe.schedule,
    )
    assert set(imported.ignored) == {"NUM_GPUS", "SOLVER.GNN_GAMMA"}
    for text, message in (
        ("a: [", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("X: 1", "unknown key 'X'"),
    ):
        (tmp_path / "bad.yml").write_text(text)
        with pytest.raises(ValueError, match=message):
            import_yaml(tmp_path / "bad.yml")


def test_missing_yaml_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yml").write_text(YAML)
    with pytest.raises(ModuleNotFoundError, match="pip install pyyaml"):
        import_yaml(tmp_path / "a.yml")
