"""Options of the timing benchmarks, and the session that holds the prepared providers of one setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.plan import Case, default_plan, load_plan
from benchmarks.preparation import Preparation


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plan", type=Path, help="cases to time, a file written by python -m benchmarks.measure"
    )
    parser.addoption("--threads", type=int, default=2, help="threads of torch; default 2")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        path = metafunc.config.getoption("--plan")
        cases = load_plan(json.loads(path.read_text())) if path else default_plan()
        metafunc.parametrize("case", cases, ids=Case.identifier)


@pytest.fixture(scope="session")
def preparation() -> Preparation:
    return Preparation()
