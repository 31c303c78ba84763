"""Imports point downwards only, cost little, and leave no trace."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Part of gcng (a module or package directly in gcng/) -> the parts that it may import.
BASE = frozenset({"_version", "mode", "memory", "batch_layout"})
DEFINITION = BASE | {"libraries", "reference", "kernels"}
OPS = DEFINITION | {"ops", "functional"}
LIBRARY = OPS | {"nn", "losses", "data", "models", "recipes", "evaluation"}
# gcng.memory and gcng.batch_layout stand alone: command line and sampler use them without the ops.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "_version": frozenset(),
    "mode": frozenset({"_version"}),
    "memory": frozenset({"_version", "mode"}),
    "batch_layout": frozenset({"_version", "mode"}),
    "libraries": frozenset(),
    "compilation": frozenset({"libraries"}),
    "build": frozenset({"libraries", "compilation"}),
    "kernels": BASE,
    "reference": BASE,
    "ops": DEFINITION,
    "functional": DEFINITION | {"ops"},
    "explanation": OPS,
    "nn": OPS,
    "losses": OPS | {"nn"},
    "data": BASE,
    "models": BASE,
    "recipes": BASE,
    "evaluation": OPS,
    "training": LIBRARY,
    "cli": LIBRARY | {"training", "explanation", "build"},
}
# gcng/__init__.py hands out names of every part on first use; gcng/__main__.py starts the command line.
UNBOUND = {"__init__", "__main__"}
OPTIONAL = ("PIL", "matplotlib", "yaml", "tensorboard", "torchvision", "timm", "sklearn")


def library_modules() -> Iterator[tuple[list[str], Path]]:
    """Yields (dotted parts, file) of every module: gcng/ops/edges.py is [gcng, ops, edges]."""
    for folder in ("gcng", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            yield (["gcng", *parts] if folder == "kernels" else parts), path


def imported_parts(tree: ast.Module, module: list[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, part of gcng) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module.split(".") if node.module else []
            if node.level:
                origin = module[: len(module) - node.level] + origin
            targets = [[*origin, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "gcng" and len(target) > 1 and target[1] in MAY_IMPORT:
                yield node.lineno, target[1]


def direction_errors(source: str, module: list[str]) -> list[str]:
    """Upward imports of one module's source, as text that names importer, line and imported part."""
    part, name = module[1], ".".join(module)
    if part not in MAY_IMPORT:
        return [f"{name}: the part {part!r} is missing in MAY_IMPORT"]
    allowed = MAY_IMPORT[part] | {part}
    found = imported_parts(ast.parse(source), module)
    return [f"{name}:{line} imports gcng.{target}" for line, target in found if target not in allowed]


def run_python(code: str) -> object:
    """Runs code in a fresh interpreter in the root folder; returns the JSON that its last line prints."""
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def test_imports_only_point_downwards():
    errors = []
    for module, path in library_modules():
        if len(module) > 2 or module[1] not in UNBOUND:
            errors += direction_errors(path.read_text(encoding="utf-8"), module)
    assert not errors, "\n".join(errors)


def test_the_table_of_parts_has_no_cycle():
    def below(part: str, path: tuple[str, ...] = ()) -> set[str]:
        assert part not in path, f"cycle: {' -> '.join([*path, part])}"
        return {part}.union(*(below(name, (*path, part)) for name in MAY_IMPORT[part]))

    assert "losses" not in below("nn")
    assert below("cli") == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "source",
    [
        "from gcng import losses",
        "from gcng.losses import GCAHNGLoss",
        "import gcng.training.step",
        "from ..losses import GCAHNGLoss",
        "from .. import cli",
        "def late():\n    from gcng.data import folders",
    ],
)
def test_an_upward_import_is_found(source):
    assert len(direction_errors(source, ["gcng", "ops", "edges"])) == 1


@pytest.mark.parametrize(
    "source", ["from gcng import reference, mode", "from . import panels", "import torch", "import gcng"]
)
def test_a_downward_import_passes(source):
    assert direction_errors(source, ["gcng", "ops", "edges"]) == []


def test_importing_gcng_imports_neither_torch_nor_numpy():
    loaded = run_python("""
        import json, sys
        import gcng
        print(json.dumps(sorted({"torch", "numpy", "triton", "PIL", "matplotlib"} & set(sys.modules))))
    """)
    assert loaded == []


def test_importing_the_functional_interface_is_light_and_leaves_no_trace():
    """Beyond torch: no compiler, no optional package, few modules; CUDA and files stay untouched."""
    report = run_python("""
        import json, sys
        import torch
        before = set(sys.modules)
        events = []
        FORBIDDEN = {"os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.exec",
                     "os.system", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"}

        def audit(event, arguments):
            writes = False
            if event == "open":
                mode, flags = arguments[1:3]
                writes = bool(flags & 3) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))
            if writes or event in FORBIDDEN:
                events.append([event, repr(arguments)[:200]])

        sys.addaudithook(audit)
        import gcng
        gcng.functional
        added = set(sys.modules) - before
        print(json.dumps({
            "events": events,
            "gcng": sorted(name for name in added if name.startswith("gcng")),
            "added": sorted(name for name in added if not name.startswith("gcng")),
            "cuda": torch.cuda.is_initialized(),
        }))
    """)
    assert "gcng.functional" in report["gcng"]
    assert report["events"] == []
    assert report["cuda"] is False
    roots = {name.split(".")[0] for name in report["added"]}
    assert not roots & {*OPTIONAL, "triton", "scipy", "setuptools"}
    # The compiler stack alone takes longer to import than everything that is allowed here.
    assert not [name for name in report["added"] if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert len(report["added"]) < 100, report["added"]


def test_every_module_imports_without_the_optional_packages():
    names = {".".join(part for part in module if part != "__init__") for module, _ in library_modules()}
    if importlib.util.find_spec("gcng.kernels") is None:  # only an installation (editable or not) maps it
        names = {name for name in names if not name.startswith("gcng.kernels")}
    failures = run_python(f"""
        import importlib, json, sys, traceback
        sys.modules.update(dict.fromkeys({OPTIONAL!r}))
        failures = []
        for name in {sorted(names - {"gcng.__main__"})!r}:
            try:
                importlib.import_module(name)
            except Exception:
                failures.append(traceback.format_exc())
        print(json.dumps(failures))
    """)
    assert failures == [], "\n".join(failures)
