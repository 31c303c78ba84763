"""The set-up of a fresh machine: exact pins that PyPI can resolve, and a package check that lets one conflict pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLEAN = "No broken requirements found."
TRITON = 'torch 2.13.0 has requirement triton==3.7.1; platform_system == "Linux", but you have triton 3.9.0.'
NUMPY = "scipy 1.17.1 has requirement numpy<2.7,>=1.26.4, but you have numpy 3.0.0."


def pins(name: str) -> dict[str, str]:
    """Package -> version of one requirements file; every line must be an exact pin."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = {}
    for line in filter(None, lines):
        if line != "-r requirements.txt":
            match = re.fullmatch(r"([a-z0-9-]+)==(\d[\w.]*)( ; platform_system == \"Linux\")?", line)
            assert match, f"{name}: {line!r} is no exact pin"
            found[match[1]] = match[2]
    return found


def test_torch_is_pinned_first_and_triton_where_no_resolver_sees_it():
    """torch from PyPI requires one triton exactly: a pin of another one beside it cannot be resolved."""
    assert next(iter(pins("requirements.txt"))) == "torch"
    resolved = pins("requirements.txt") | pins("requirements-dev.txt")
    assert "triton" not in resolved
    assert set(pins("requirements-triton.txt")) == {"triton"}
    oldest = pins("requirements-triton36.txt")
    assert set(oldest) == {"numpy", "triton"} and oldest["triton"].startswith("3.6.")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("requirements-triton.txt", "requirements-triton36.txt", "requirements-peers.txt"):
        assert re.search(rf"install --no-deps --requirement {name}$", makefile, re.MULTILINE), name
        in_set_up = re.search(rf"(READY\)|\.ready): .*{re.escape(name)}", makefile) is not None
        assert in_set_up is name.startswith("requirements-triton"), name


def test_peers_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {re.match(r"[a-z0-9-]+", line)[0] for line in extras["bench"]}
    assert set(pins("requirements-peers.txt")) <= named


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("said", "passes"),
    [([CLEAN], True), ([TRITON], True), ([NUMPY], False), ([TRITON, NUMPY], False), ([], False)],
)
def test_only_the_triton_that_torch_pins_may_differ(tmp_path, said, passes):
    pip = tmp_path / "pip"
    pip.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in said), f"exit {int(said != [CLEAN])}"]))
    pip.chmod(0o755)
    ready = tmp_path / ".ready"
    ready.touch()
    command = ["make", "--silent", "check-packages", f"READY={ready}", f"PIP={pip}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is passes, done.stdout + done.stderr
    assert ("scipy" in done.stderr) is (NUMPY in said)


def test_the_ci_sets_up_the_environments_that_its_variables_name(tmp_path):
    log = tmp_path / "log"
    commands = {"make": f'#!/bin/sh\necho "$@" >>{log}\nexit 7\n', "cuda/bin/nvcc": "#!/bin/sh\n"}
    for name, text in commands.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    named = {"PYTHON": sys.executable, "VENV": "/a", "VENV_TRITON36": "/b", "CXX": "sh"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "CUDA_HOME": str(tmp_path / "cuda"), **named}

    def ci(**changed: str) -> subprocess.CompletedProcess[str]:
        run = [ROOT / ".ci" / "run"]
        return subprocess.run(run, env={**settings, **changed}, capture_output=True, text=True, check=False)

    done = ci()
    assert done.returncode == 7 and log.read_text() == "setup /b/.ready lint extension\n", done.stderr
    done = ci(CXX="no-such-compiler -x")
    assert done.returncode == 1 and "no C++ compiler (no-such-compiler)" in done.stderr
    done = ci(CUDA_HOME=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("ci: no nvcc"), done.stderr
    assert log.read_text().count("\n") == 1
    # Whichever half of the tests fails, the run does, and shows what all of them said.
    for half in ("ARGS=--ignore-glob", "ARGS=tests/test_triton"):
        script = f'case "$*" in setup*) ;; *{half}*) echo "this half fails"; exit 1 ;; *) echo "said by $1" ;; esac'
        (tmp_path / "make").write_text(f"#!/bin/sh\n{script}\n")
        done = ci()
        assert done.returncode == 1 and "this half fails" in done.stdout, done.stdout + done.stderr
        assert all(f"said by {name}\n" in done.stdout for name in ("test", "test-triton36", "test-sanitizers"))


def test_every_package_that_training_asks_for_is_in_its_extra():
    """`require(...)` in gcng/data and gcng/training names a package to install: `pip install '.[train]'` brings it."""
    files = [path for folder in ("data", "training") for path in (ROOT / "gcng" / folder).rglob("*.py")]
    asked = {name for path in files for name in re.findall(r'install="([\w-]+)"', path.read_text(encoding="utf-8"))}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"matplotlib", "scipy"} <= asked
    assert asked <= {re.match(r"[a-z0-9-]+", line)[0] for line in extras["train"]}
