"""Options of the timing benchmarks, and the session that holds what is being timed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.plan import Case, cases_of, default_entries, load
from benchmarks.preparation import Preparation
from benchmarks.results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gcng benchmarks")
    group.addoption("--plan", type=Path, help="entries to time, a file written by python -m benchmarks.measure")
    group.addoption("--results", type=Path, help="results file to add rows to; default: a temporary one")
    group.addoption("--on", default="cpu", help="device; default cpu")
    group.addoption("--threads", type=int, default=2, help="threads of torch; default 2")
    group.addoption("--deadline", type=float, default=float("inf"), help="Unix time after which nothing is started")
    group.addoption("--truth-flops", type=float, default=5e12, help="largest work for which a float64 truth is made")
    group.addoption("--no-memory", action="store_true", help="time only")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    name = metafunc.module.OPERATION.name
    path = metafunc.config.getoption("--plan")
    entries = load(json.loads(path.read_text())) if path else default_entries(name)
    cases = cases_of(entry for entry in entries if entry.operation == name)
    metafunc.parametrize("case", cases, ids=Case.identifier)


@pytest.fixture(scope="session")
def preparation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preparation]:
    option = request.config.getoption
    path = option("--results") or tmp_path_factory.mktemp("benchmarks") / "results.json"
    results = Results.open(path, option("--on"))
    session = Preparation(
        results,
        option("--on"),
        option("--threads"),
        min(option("--deadline"), time.time() + 10**9),
        option("--truth-flops"),
        memory_too=not option("--no-memory"),
    )
    yield session
    session.finish()
