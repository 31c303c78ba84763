"""Configuration: defaults, layers, overrides, and the message of every mistake."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gcng.training.config import DATA_KINDS, FREE_ON_RESUME, Config
from gcng.training.config_io import (
    as_nested,
    changed_keys,
    config_hash,
    config_keys,
    load_config,
    to_toml,
)
from gcng.training.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_defaults_are_the_published_sop_resnet50_numbers():
    config, recipe = load_config(), load_config(recipe="sop/resnet50")
    for section in ("loss", "optimizer", "schedule", "evaluation"):
        assert getattr(config, section) == getattr(recipe, section)
    assert (config.data.num_classes_per_batch, config.data.samples_per_class) == (40, 2)


def test_later_layers_win(tmp_path):
    path = write(tmp_path, 'recipe = "cub/resnet50"\n[loss]\nalpha = 3\nbeta = 7.5\n')
    config = load_config(path, overrides=["loss.beta=8"])
    assert config.loss.alpha == 3.0 and isinstance(config.loss.alpha, float)
    assert config.loss.beta == 8.0
    assert config.loss.num_layers == 2  # from the recipe
    assert load_config(path, recipe="sop/resnet50").loss.num_layers == 1  # the argument replaces the file's recipe


def test_overrides_are_parsed_by_the_type_of_their_key():
    config = load_config(
        overrides=[
            "evaluation.k=[1, 5, 10]",
            "optimizer.clip_value=none",
            "optimizer.clip_norm=2",
            "model.normalize=yes",
            "run.output=a=b",
            "data.workers=2",
            "data.crop_scale=[0.5, 1]",
        ]
    )
    assert config.evaluation.k == (1, 5, 10)
    assert config.optimizer.clip_value is None and config.optimizer.clip_norm == 2.0
    assert config.model.normalize is True and config.run.output == "a=b" and config.data.workers == 2
    assert config.data.crop_scale == (0.5, 1.0)
    assert load_config(overrides={"loss.alpha": 4}).loss.alpha == 4.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.alhpa=4"], r"override: unknown key 'loss.alhpa'; did you mean 'loss.alpha'\?"),
        (["alpha=4"], r"unknown key 'alpha'; did you mean 'loss.alpha'\?"),
        (["los.alpha=4"], r"did you mean 'loss.alpha'\?"),
        (["loss.alpha"], "must look like KEY=VALUE"),
        (["loss.alpha=four"], "loss.alpha must be a number, got 'four'"),
        (["loss.alpha=nan"], "loss.alpha must be finite, got nan"),
        (["loss.alpha=inf"], "loss.alpha must be finite, got inf"),
        (["loss.alpha=-1"], "loss.alpha must be at least 0, got -1.0"),
        (["optimizer.graph_lr=0"], "optimizer.graph_lr must be above 0, got 0.0"),
        (["data.kind=folders"], "data.kind must be one of matplotlib_letters, .*class_folders"),
        (["loss.dropout=1"], "loss.dropout must be below 1, got 1.0"),
        (["loss.num_layers=1.5"], "loss.num_layers must be an integer, got '1.5'"),
        (["loss.num_layers=0"], "loss.num_layers must be at least 1, got 0"),
        (["model.normalize=2"], "model.normalize must be true or false, got '2'"),
        (["run.precision=fp8"], "run.precision must be one of float32, bfloat16, float16, got 'fp8'"),
        (["run.device=gpu"], "run.device must be auto, cpu, cuda or cuda:INDEX, got 'gpu'"),
        (["evaluation.k=0"], r"evaluation.k must be one or more ranks >= 1, got \[0\]"),
        (["evaluation.k=1,x"], "evaluation.k must be an integer, got 'x'"),
        (["data.crop_scale=1,0.5"], "data.crop_scale must be"),
        (["optimizer.clip_norm=1"], "clip_value and optimizer.clip_norm are both given"),
        (["loss.num_heads=3"], "loss.num_heads must divide model.embedding_size, got 3 and 512"),
    ],
)
def test_bad_override_names_key_and_cause(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loss]\nalhpa = 4\n", r"run.toml:2: unknown key 'loss.alhpa'; did you mean 'loss.alpha'\?"),
        ("[los]\nalpha = 4\n", r"run.toml:1: unknown section \[los\]; did you mean 'loss'\?"),
        ("loss = 4\n", r"run.toml:1: loss must be a table"),
        ("[loss]\nalpha = 'x'\n", "run.toml:2: loss.alpha must be a number, got 'x'"),
        ("[loss]\nalpha = true\n", "run.toml:2: loss.alpha must be a number, got True"),
        ("[loss]\nalpha = nan\n", "run.toml:2: loss.alpha must be finite, got nan"),
        ("[loss]\nnum_layers = 1.0\n", "run.toml:2: loss.num_layers must be an integer, got 1.0"),
        ("[run]\noutput = 3\n", "run.toml:2: run.output must be a string, got 3"),
        ("[evaluation]\nk = 3\n", "run.toml:2: evaluation.k must be a list of an integer, got 3"),
        ("# one\n[run]\n\noutput = 'a'\n[loss]\r\n \"alpha\" = -1\n", "run.toml:6: loss.alpha must be at least 0"),
        ("loss.alpha = -1\n", "run.toml:1: loss.alpha must be at least 0"),
        ("[loss\nalpha = 4\n", r"not valid TOML: .*line 1"),
        ("recipe = 'sop/resnet5'\n", r"unknown recipe 'sop/resnet5'; did you mean 'sop/resnet50'\?"),
        ("recipe = 5\n", "recipe must be a string"),
    ],
)
def test_bad_file_names_file_key_and_cause(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_missing_and_binary_files_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.toml does not exist; `gcng recipes show"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "bytes.toml")


def test_config_is_frozen_and_every_key_is_documented():
    config = load_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss.alpha = 3.0
    assert all(text for text in config_keys().values())
    assert config_keys()["data.kind"].endswith(f"({', '.join(DATA_KINDS)}) [\"matplotlib_letters\"]")
    assert config_keys()["optimizer.clip_norm"].endswith('[\"none\"]')
    assert config_keys()["evaluation.k"].endswith("[[1, 10, 100, 1000]]")
    assert set(config_keys()) >= FREE_ON_RESUME


def test_toml_round_trip(tmp_path):
    config = load_config(recipe="cub/dino-vits16", overrides=['run.output=a "quoted" path'])
    path = write(tmp_path, to_toml(as_nested(config), "two\nlines"))
    assert load_config(path) == config


def test_hash_follows_results_only():
    base = load_config()
    assert config_hash(base) == config_hash(load_config(overrides=["data.workers=2", "logging.every=1"]))
    changed = load_config(overrides=["loss.alpha=4", "data.workers=2", "run.seed=1"])
    assert config_hash(base) != config_hash(changed)
    assert changed_keys(as_nested(base), changed) == ["loss.alpha", "run.seed"]
    assert isinstance(base, Config)


def test_reading_a_configuration_imports_no_torch():
    code = (
        "import sys; from gcng.training import load_config; load_config(recipe='sop/resnet50');"
        "sys.exit(int(any(m in sys.modules for m in ('torch', 'numpy'))))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_configuration_in_the_documentation_is_valid(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    config = load_config(write(tmp_path, block))
    assert config.run.output == "runs/letters" and config.model.embedding_size == 64


def test_public_names_exist_and_others_do_not():
    import gcng.training

    for name in gcng.training.__all__:
        assert getattr(gcng.training, name).__name__ == name
    assert set(gcng.training.__all__) <= set(dir(gcng.training))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        getattr(gcng.training, "absent")  # noqa: B009


@pytest.mark.parametrize("budget", ["2 potatoes", "-1", "0", "inf"])
def test_memory_budget_is_checked_before_anything_is_started(budget):
    with pytest.raises(ConfigError, match=f"loss.memory_budget: memory_budget is '{budget}'"):
        load_config(overrides=[f"loss.memory_budget={budget}"])
    assert load_config(overrides=["loss.memory_budget=2GiB"]).loss.memory_budget == "2GiB"


def test_every_kind_of_data_set_is_documented():
    text = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`.*\|$", text, re.MULTILINE)
    assert sorted(rows) == sorted(DATA_KINDS)
