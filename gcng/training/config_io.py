"""Reading, checking, merging and writing configurations.

Owns the text side of :mod:`gcng.training.config`: TOML files, dotted overrides, the error messages that name
a key and its nearest valid neighbor, the hash that ties a checkpoint to its settings. No torch import.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gcng.memory import parse_bytes
from gcng.training.config import FREE_ON_RESUME, Config
from gcng.training.errors import ConfigError

_HEADER = re.compile(r"""\s*\[\s*["']?([\w-]+)["']?\s*\]""")
_ASSIGNMENT = re.compile(r"""\s*["']?([\w.-]+)["']?\s*=""")
_SECTIONS = {section.name: section.default_factory for section in dataclasses.fields(Config)}


def _leaf_fields() -> dict[str, tuple[dataclasses.Field, Any]]:
    leaves = {}
    for name, section in _SECTIONS.items():
        hints = typing.get_type_hints(section)
        for leaf in dataclasses.fields(section):
            leaves[f"{name}.{leaf.name}"] = (leaf, hints[leaf.name])
    return leaves


_LEAVES = _leaf_fields()


def config_keys() -> dict[str, str]:
    """Every dotted key with its meaning, its choices and its default on one line, in the order of the sections."""
    lines = {}
    for key, (leaf, _) in _LEAVES.items():
        choices = leaf.metadata["choices"]
        among = f" ({', '.join(choices)})" if choices else ""
        lines[key] = f"{leaf.metadata['help']}{among} [{_toml_value(leaf.default)}]"
    return lines


def load_config(
    path: str | Path | None = None,
    *,
    recipe: str | None = None,
    base: Mapping[str, Mapping[str, Any]] | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Config:
    """Build a configuration from defaults, ``base``, a recipe, a TOML file and overrides; later ones win.

    Args:
        path: TOML file with the sections of :class:`gcng.training.Config`. It may name a recipe itself with a
            top-level ``recipe = "sop/resnet50"``.
        recipe: Name of a shipped recipe (``gcng recipes list``).
        base: Nested values to start from, such as the configuration in a checkpoint.
        overrides: ``"loss.alpha=4"`` strings, or a mapping of dotted keys to values.

    Returns:
        The checked, frozen configuration.

    Raises:
        ConfigError: (a ``ValueError``) an unknown key, a wrong type, a NaN, a value out of bounds, a missing
            or malformed file. The message names the file, the key and the nearest valid key.
    """
    values: dict[str, Any] = {} if base is None else flatten(base, "saved configuration")
    file_values, lines = ({}, {}) if path is None else _read_located(path)
    named = file_values.pop("recipe", None)
    if recipe is None and named is not None:
        if not isinstance(named, str):
            raise ConfigError(f"{path}: recipe must be a string such as 'sop/resnet50', got {named!r}")
        recipe = named
    if recipe is not None:
        values.update(flatten(_read_recipe(recipe), f"recipe {recipe}"))
    if path is not None:
        values.update(flatten(file_values, str(path), lines))
    if isinstance(overrides, Mapping):
        values.update({key: (value, "override") for key, value in overrides.items()})
    else:
        values.update({key: (_Text(text), "override") for key, text in map(split_override, overrides)})
    return _build(values)


def _read_recipe(name: str) -> dict[str, Any]:
    from gcng.recipes import load_recipe

    try:
        return load_recipe(name)
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file as nested dictionaries; ConfigError with the line where it is malformed."""
    return _read_located(path)[0]


def _read_located(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a TOML file, and the line of each section and dotted key."""
    try:
        text = Path(path).read_bytes().decode()
        return tomllib.loads(text.replace("\r\n", "\n")), _lines_of(text)
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; `gcng recipes show NAME` prints one to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None


def _lines_of(text: str) -> dict[str, int]:
    """Where sections and keys stand, ``{"loss": 1, "loss.alpha": 2}``, for messages only: tomllib does not say."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            section = header[1]
            lines.setdefault(section, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault(f"{section}.{assignment[1]}" if section else assignment[1], number)
    return lines


def flatten(
    nested: Mapping[str, Any], source: str, lines: Mapping[str, int] = types.MappingProxyType({})
) -> dict[str, tuple[Any, str]]:
    """``{"loss": {"alpha": 4}}`` to ``{"loss.alpha": (4, source)}``; unknown sections are ConfigErrors.

    ``lines``: where sections and keys stand in the file that is the source, which then says so.
    """

    def place(name: str) -> str:
        return f"{source}:{lines[name]}" if name in lines else source

    flat = {}
    for section, content in nested.items():
        if section not in _SECTIONS:
            raise ConfigError(f"{place(section)}: unknown section [{section}]{_nearest(section, _SECTIONS)}")
        if not isinstance(content, Mapping):
            raise ConfigError(f"{place(section)}: {section} must be a table ([{section}]), got {content!r}")
        for name, value in content.items():
            flat[f"{section}.{name}"] = (value, place(f"{section}.{name}"))
    return flat


def split_override(text: str) -> tuple[str, str]:
    """``"loss.alpha=4"`` to ``("loss.alpha", "4")``."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"override {text!r} must look like KEY=VALUE, for example loss.alpha=4")
    return key.strip(), value.strip()


class _Text(str):
    """A value that still has to be parsed by the type of its key (it came from the command line)."""


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    if not close and "." in name:
        by_leaf = {key.rpartition(".")[2]: key for key in valid}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1)]
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def _build(values: Mapping[str, tuple[Any, str]]) -> Config:
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, (value, source) in values.items():
        if key not in _LEAVES:
            raise ConfigError(f"{source}: unknown key {key!r}{_nearest(key, _LEAVES)}")
        leaf, kind = _LEAVES[key]
        section, _, name = key.partition(".")
        parsed = _parse(value, kind, key, source) if isinstance(value, _Text) else _coerce(value, kind, key, source)
        _check_bounds(parsed, leaf, key, source)
        sections[section][name] = parsed
    config = Config(**{name: _SECTIONS[name](**content) for name, content in sections.items()})
    _check_together(config)
    return config


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if part is types.NoneType else _type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]


def _wrong_type(value: Any, kind: Any, key: str, source: str) -> ConfigError:
    return ConfigError(f"{source}: {key} must be {_type_name(kind)}, got {value!r}")


def _coerce(value: Any, kind: Any, key: str, source: str) -> Any:
    """Check a typed value against ``kind``; integers pass as floats, nothing else is cast."""
    if isinstance(kind, types.UnionType):
        if value is None or value == "none":
            return None
        return _coerce(value, typing.get_args(kind)[0], key, source)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(value, kind, key, source)
        return tuple(_coerce(item, typing.get_args(kind)[0], key, source) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(value, kind, key, source)
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{source}: {key} must be finite, got {value}")
    return value


def _parse(text: str, kind: Any, key: str, source: str) -> Any:
    """Parse the text of an override by the type of its key."""
    if isinstance(kind, types.UnionType):
        return None if text.lower() in ("none", "") else _parse(text, typing.get_args(kind)[0], key, source)
    if typing.get_origin(kind) is tuple:
        items = [item.strip() for item in text.strip("[]()").split(",") if item.strip()]
        return tuple(_parse(item, typing.get_args(kind)[0], key, source) for item in items)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise _wrong_type(str(text), kind, key, source)
        return text.lower() in ("true", "1", "yes", "on")
    if kind is str:
        return str(text)
    try:
        return _coerce(kind(text), kind, key, source)
    except ConfigError:
        raise
    except ValueError:
        raise _wrong_type(str(text), kind, key, source) from None


def _check_bounds(value: Any, leaf: dataclasses.Field, key: str, source: str) -> None:
    limits = leaf.metadata
    if value is None:
        return
    if limits["choices"] is not None and value not in limits["choices"]:
        raise ConfigError(f"{source}: {key} must be one of {', '.join(limits['choices'])}, got {value!r}")
    if limits["at_least"] is not None and value < limits["at_least"]:
        raise ConfigError(f"{source}: {key} must be at least {limits['at_least']}, got {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ConfigError(f"{source}: {key} must be above {limits['above']}, got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise ConfigError(f"{source}: {key} must be below {limits['below']}, got {value}")


def _check_together(config: Config) -> None:
    """Checks that need more than one key, or that a single bound cannot express."""
    optimizer, loss, model, data = config.optimizer, config.loss, config.model, config.data
    if optimizer.clip_value is not None and optimizer.clip_norm is not None:
        raise ConfigError("optimizer.clip_value and optimizer.clip_norm are both given; set one of them to 'none'")
    if model.embedding_size % loss.num_heads:
        raise ConfigError(
            f"loss.num_heads must divide model.embedding_size, got {loss.num_heads} and {model.embedding_size}"
        )
    if loss.memory_budget:
        try:
            parse_bytes(loss.memory_budget)
        except ValueError as error:
            raise ConfigError(f"loss.memory_budget: {error}") from None
    low_high = data.crop_scale
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
        raise ConfigError(f"data.crop_scale must be [low, high] with 0 < low <= high <= 1, got {list(low_high)}")
    if not config.evaluation.k or min(config.evaluation.k) < 1:
        raise ConfigError(f"evaluation.k must be one or more ranks >= 1, got {list(config.evaluation.k)}")
    kind, _, index = config.run.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"run.device must be auto, cpu, cuda or cuda:INDEX, got {config.run.device!r}")


def check_best_metric(config: Config) -> None:
    """Refuse a ``checkpoint.best_metric`` that no evaluation of this configuration gives."""
    known = [f"recall_at_{k}" for k in config.evaluation.k]
    known += ["r_precision", "mean_average_precision_at_r", "precision_at_1"]
    if config.checkpoint.best_metric not in known:
        raise ConfigError(
            f"checkpoint.best_metric must be one of {', '.join(known)} (recall_at_K for every K of evaluation.k), "
            f"got {config.checkpoint.best_metric!r}"
        )


def as_nested(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as nested plain dictionaries (tuples become lists), ready for JSON."""
    nested = dataclasses.asdict(config)
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}
        for section, content in nested.items()
    }


def to_toml(nested: Mapping[str, Mapping[str, Any]], comment: str = "") -> str:
    """TOML text of a (partial) nested configuration; None is written as ``"none"``."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for section, content in nested.items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"{name} = {_toml_value(value)}" for name, value in content.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)  # true/false, integers and basic strings are spelled alike in JSON and TOML


def config_hash(config: Config) -> str:
    """SHA-256 over the keys that change results (all but ``FREE_ON_RESUME``), as 64 hex digits."""
    fixed = {key: value for key, value in flat_values(config).items() if key not in FREE_ON_RESUME}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def flat_values(config: Config) -> dict[str, Any]:
    """Dotted key to value."""
    nested = as_nested(config)
    return {f"{section}.{name}": value for section, content in nested.items() for name, value in content.items()}


def changed_keys(saved: Mapping[str, Mapping[str, Any]], config: Config) -> list[str]:
    """Keys that change results and whose saved values differ from those of ``config``."""
    before = {f"{section}.{name}": value for section, content in saved.items() for name, value in content.items()}
    now = flat_values(config)
    return sorted(
        key for key in before.keys() | now.keys() if key not in FREE_ON_RESUME and before.get(key) != now.get(key)
    )
