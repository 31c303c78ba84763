"""``gcng recipes list | show | import``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gcng.cli.output import note, print_result
from gcng.recipes import import_yaml, load_recipe, recipe_names, recipe_text
from gcng.training.config_io import load_config, to_toml
from gcng.training.errors import EXIT_DONE, ConfigError


def run(arguments: argparse.Namespace) -> int:
    """List the published settings, show one, or translate a file of the authors' code."""
    return {"list": _list, "show": _show, "import": _import}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print_result({"recipes": recipe_names()}, as_json=True)
    else:
        print("\n".join(recipe_names()))
    return EXIT_DONE


def _show(arguments: argparse.Namespace) -> int:
    try:
        text = recipe_text(arguments.name)
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
    if arguments.json:
        print_result(load_recipe(arguments.name), as_json=True)
    else:
        print(text, end="")
    return EXIT_DONE


def _import(arguments: argparse.Namespace) -> int:
    imported = import_yaml(arguments.file)
    load_config(base=imported.config)  # values out of bounds are refused here, not in the middle of a run
    for key, reason in imported.ignored.items():
        note(f"gcng recipes import: {key} is ignored: {reason}")
    for text in imported.notes:
        note(f"gcng recipes import: {text}")
    text = to_toml(imported.config, f"Translated from {Path(arguments.file).name}.")
    if arguments.output is not None:
        Path(arguments.output).write_text(text, encoding="utf-8")
        result = {"output": arguments.output, "ignored": list(imported.ignored)}
        print_result(result, as_json=arguments.json)
    elif arguments.json:
        print_result({**imported.config, "ignored": imported.ignored}, as_json=True)
    else:
        print(text, end="")
    return EXIT_DONE
