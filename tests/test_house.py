"""Rules of CONTRIBUTING.md that a machine can check: one version, forbidden calls, tests that can fail."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gcng

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("gcng", "kernels")
EVERYTHING = (*LIBRARY, "benchmarks", "demo", "examples", "tests")

# Registers implementations and autocast rules by device type.
MAY_NAME_CUDA = {"gcng/ops/registration.py"}
# run_case puts an op through the closeness gate of tests/closeness.py.
CHECKING_CALLS = {"raises", "warns", "fail", "opcheck", "run_case"}
COMPARISONS = {"allclose", "isclose", "equal", "array_equal"}


def python_files(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def call_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def unsafe_loads(tree: ast.Module) -> list[int]:
    """Lines of torch.load calls that do not say weights_only=True."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("weights_only") != "True":
                lines.append(node.lineno)
    return lines


def fixed_devices(tree: ast.Module) -> list[int]:
    """Lines that call .cuda(), or that name the device "cuda" without having asked whether there is one."""
    harmless: list[ast.AST] = []  # a comparison, a dictionary key, a choice by torch.cuda.is_available()
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and "is_available" in ast.unparse(node.test):
            harmless.append(node)
        elif isinstance(node, ast.Subscript):
            harmless.append(node.slice)
        elif isinstance(node, ast.Dict):
            harmless += [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Compare):
            harmless.append(node)
    exempt = {id(leaf) for node in harmless for leaf in ast.walk(node)}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            # gcng.ops.native.cuda() asks for the compiled kernels.
            lines += [] if ast.unparse(node.func) == "native.cuda" else [node.lineno]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt:
            lines += [node.lineno] if re.fullmatch(r"cuda(:\d+)?", node.value) else []
    return lines


def functions_under_test(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("test_", "bench_")):
            yield node


def can_fail(function: ast.FunctionDef) -> bool:
    """True if the body asserts, expects an error, or calls something named assert_... or check_..."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Raise) and node.exc is not None and "AssertionError" in ast.unparse(node.exc):
            return True
        if isinstance(node, ast.Call):
            name = call_name(node)
            if name in CHECKING_CALLS or name.lstrip("_").startswith(("assert_", "check_")):
                return True
    return False


def unused_comparisons(tree: ast.Module) -> list[int]:
    """Lines where the result of a comparison is thrown away, as in a bare ``torch.allclose(a, b)``."""
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return sorted(
        value.lineno
        for value in values
        if isinstance(value, ast.Compare) or (isinstance(value, ast.Call) and call_name(value) in COMPARISONS)
    )


def self_comparisons(tree: ast.Module) -> list[int]:
    """Lines that compare an expression with itself, which tells nothing unless it runs something twice."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and call_name(node) in {*COMPARISONS, "assert_close"}:
            sides = node.args
        else:
            continue
        runs = any(isinstance(leaf, (ast.Call, ast.Subscript)) for side in sides for leaf in ast.walk(side))
        if len(sides) > 1 and not runs and ast.dump(sides[0]) == ast.dump(sides[1]):
            lines.append(node.lineno)
    return lines


def test_the_version_is_written_once_and_agrees_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+((\.dev|a|b|rc)\d+)?", gcng.__version__)
    assert project_table()["project"]["dynamic"] == ["version"]
    source = project_table()["tool"]["setuptools"]["dynamic"]["version"]
    assert source == {"attr": "gcng._version.__version__"}
    assignment = re.compile(r"^__version__\s*=\s*[\"']", re.MULTILINE)
    written = [path for path in python_files(LIBRARY) if assignment.search(path.read_text(encoding="utf-8"))]
    assert written == [ROOT / "gcng" / "_version.py"]
    assert f"\n## {gcng.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_installed_metadata_agree():
    try:
        installed = metadata.version("gcng")
    except metadata.PackageNotFoundError:
        pytest.skip("gcng is not installed in this environment")
    assert installed == gcng.__version__, "install again: the metadata are those of another version"


def test_a_build_needs_setuptools_only():
    assert project_table()["build-system"]["requires"] == ["setuptools>=77"]
    for name in ("setup.py", "gcng/build.py", "gcng/libraries.py"):
        nodes = list(ast.walk(parse(ROOT / name)))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        roots = {module.split(".")[0] for module in imported}
        assert roots <= {*sys.stdlib_module_names, "gcng", "setuptools"}, (name, roots)


def test_the_pinned_torch_satisfies_the_declared_bound():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==(\d+)\.(\d+)", requirements, re.MULTILINE)
    dependencies = project_table()["project"]["dependencies"]
    bound = next(filter(None, (re.match(r"torch>=(\d+)\.(\d+)", line) for line in dependencies)))
    assert [int(part) for part in pinned.groups()] >= [int(part) for part in bound.groups()]


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu130", "2.11.0a0+eb65b36914.nv26", "2.11.0.dev20260101"])
def test_an_installed_torch_of_any_build_is_kept(version):
    (bound,) = (line for line in project_table()["project"]["dependencies"] if line.startswith("torch"))
    requirement = Requirement(bound)
    assert requirement.specifier.contains(version)
    assert not requirement.specifier.contains("2.10.1")


def environment_names(tree: ast.Module) -> set[str]:
    """Names of the variables that os.environ or os.getenv is asked for."""
    asked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv", "os.environ.pop"):
            asked.add(ast.unparse(node.args[0]).strip("'\""))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            asked.add(ast.unparse(node.slice).strip("'\""))
    return asked


def test_no_variable_of_our_own_is_read_at_run_time():
    """docs/building.md says so; gcng/build.py runs during an installation and under `gcng build`."""
    for path in python_files(LIBRARY):
        own = {name for name in environment_names(parse(path)) if name.startswith("GCNG_")}
        assert own == ({"GCNG_BUILD_CUDA"} if path == ROOT / "gcng" / "build.py" else set()), path
    assert environment_names(ast.parse("os.environ.get('A')\nos.getenv('B', '')\nos.environ['C']")) == {"A", "B", "C"}


def test_the_slices_of_an_op_carry_its_name():
    """CONTRIBUTING.md names the exceptions."""
    ops = [path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")]
    ops.remove("iteration")
    for op in ops:
        test = "pairs" if op in ("messages", "edges", "gates") else op
        kernel = {"edges": "edge_mlp", "retrieval": "nearest"}.get(op, op)
        for path in (f"gcng/reference/{op}", f"gcng/ops/{op}", f"kernels/{kernel}", f"tests/test_ops_{test}"):
            assert (ROOT / f"{path}.py").is_file(), path


def test_torch_load_is_always_weights_only():
    files = python_files(EVERYTHING)
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in unsafe_loads(parse(path))]
    assert not found, found
    assert unsafe_loads(ast.parse("torch.load(path)\ntorch.load(path, weights_only=False)")) == [1, 2]
    assert unsafe_loads(ast.parse("torch.load(path, map_location='cpu', weights_only=True)")) == []


def test_no_device_is_written_into_the_library():
    files = [path for path in python_files(LIBRARY) if path.relative_to(ROOT).as_posix() not in MAY_NAME_CUDA]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in fixed_devices(parse(path))]
    assert not found, found
    assert fixed_devices(ast.parse("x.cuda()\nx.to('cuda:0')\ntorch.zeros(1, device='cuda')")) == [1, 2, 3]
    asked = [
        "x.device.type == 'cuda'",
        "state['cuda']",
        "{'cuda': 1}",
        "to('cuda' if torch.cuda.is_available() else 'cpu')",
    ]
    assert fixed_devices(ast.parse("\n".join(asked))) == []


def test_no_leftover_words_and_no_catch_all_modules():
    words = re.compile(r"\b(TO" + "DO|FIX" + r"ME)\b", re.IGNORECASE)
    files = python_files(EVERYTHING)
    left = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not left, left
    vague = [str(path) for path in files if re.search(r"(^|_)(utils?|helpers?|misc|common)$", path.stem)]
    assert not vague, vague


def test_every_test_can_fail():
    files = python_files(("tests", "benchmarks"))
    idle = [
        f"{path.relative_to(ROOT)}::{function.name}"
        for path in files
        for function in functions_under_test(parse(path))
        if not can_fail(function)
    ]
    assert not idle, idle
    for finder in (unused_comparisons, self_comparisons):
        found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in finder(parse(path))]
        assert not found, (finder.__name__, found)


def test_the_lint_sees_a_test_that_cannot_fail():
    bodies = ["torch.allclose(x, y)", "assert x == y", "x == y"]
    tree = ast.parse("\n".join(f"def test_{n}():\n    {body}" for n, body in enumerate(bodies)))
    assert [can_fail(function) for function in functions_under_test(tree)] == [False, True, False]
    assert unused_comparisons(tree) == [2, 6]
    comparing = ["assert x.a == x.a", "assert torch.equal(x, x)", "assert f(x) == f(x)", "assert x[0] == x[0]"]
    assert self_comparisons(ast.parse("\n".join(comparing))) == [1, 2]
