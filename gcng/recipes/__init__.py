"""The published settings by name, and the reader of the authors' YAML files.

Owns ``<data set>/<backbone>.toml`` beside this file: the twelve settings that the paper's code ships. Imports
nothing else of gcng.

Example:
    >>> from gcng.recipes import load_recipe, recipe_names
    >>> "sop/resnet50" in recipe_names()
    True
    >>> load_recipe("sop/resnet50")["loss"]["diversity_weight"]
    60.0
"""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from typing import Any

from gcng.recipes.importer import ImportedRecipe, import_yaml, translate

__all__ = ["ImportedRecipe", "import_yaml", "load_recipe", "recipe_names", "recipe_text", "translate"]


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted: ``cars/dino-vits16`` ... ``sop/resnet50``."""
    folders = [entry for entry in resources.files(__name__).iterdir() if entry.is_dir()]
    return sorted(
        f"{folder.name}/{entry.name.removesuffix('.toml')}"
        for folder in folders
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def recipe_text(name: str) -> str:
    """The TOML text of a recipe, comments included.

    Raises:
        KeyError: No such recipe; the message names the nearest one.
    """
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(names)}"
        raise KeyError(f"unknown recipe {name!r}; {hint}")
    folder, _, stem = name.partition("/")
    return resources.files(__name__).joinpath(folder, f"{stem}.toml").read_text(encoding="utf-8")


def load_recipe(name: str) -> dict[str, Any]:
    """The keys that a recipe sets, nested as in :class:`gcng.training.Config`."""
    return tomllib.loads(recipe_text(name))
