"""docs/data.md gives every public name of gcng.data and gcng.models with its exact signature."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import gcng.data
import gcng.models

TEXT = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "import" not in block]
PUBLIC = {name: getattr(package, name) for package in (gcng.data, gcng.models) for name in package.__all__}


def documented(name: str) -> ast.arguments | None:
    """The arguments of the first call-like mention of ``name`` in the signature blocks."""
    for block in BLOCKS:
        code = "\n".join(line.split("  #")[0] for line in block.splitlines())
        start = re.search(rf"(?:^|   ){name}\(", code, re.M)
        if start is None:
            continue
        depth, place = 1, start.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(code[place], 0)
            place += 1
        function = ast.parse(f"def f({code[start.end() : place - 1]}): pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        return function.args
    return None


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", TEXT)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_documented_signatures_are_exact(name: str) -> None:
    arguments = documented(name)
    if arguments is None:
        assert name in {"ClassSubset", "FrozenParameters", "GlyphGrid", "FontFace", "render_hangul16"}
        return
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    keyword = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    assert [argument.arg for argument in arguments.args] == [p.name for p in positional]
    assert [argument.arg for argument in arguments.kwonlyargs] == [p.name for p in keyword]
    empty = inspect.Parameter.empty
    optional = [p for p in positional if p.default is not empty] + [
        p for p in keyword if p.default is not empty
    ]
    written = [*arguments.defaults, *(node for node in arguments.kw_defaults if node is not None)]
    assert len(written) == len(optional)
    for node, parameter in zip(written, optional, strict=True):
        text = ast.unparse(node)
        if text != "ImageNet":  # stands for six digits
            assert eval(text) == parameter.default, f"{name}: {parameter.name}"
