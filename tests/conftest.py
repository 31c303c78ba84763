"""What every test runs under: two threads, fixed seeds, NaN in uninitialized memory; and who is skipped."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

# Read when torch loads its thread library, so it stands before the imports. Threads that wait by spinning make
# small ops thirty times slower where other work shares the cores; sleeping ones cost nothing that is noticed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import numpy as np
import pytest
import torch

from benchmarks import machine
from tests import triton_interpreter

TEST_THREADS = 2
TEST_SEED = 20250101

# The same examples on every run, no deadline on a busy machine. HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(TEST_THREADS)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
    triton_interpreter.configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and torch sees none"
    if not config.getoption("--long"):
        reasons["long"] = "takes minutes; run with --long"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """End a process whose GPU refuses all work after a failure: what comes later would fail under wrong names."""
    report = yield
    if report.failed and item.get_closest_marker("gpu") and (broken := machine.gpu_error()):
        if "PYTEST_XDIST_WORKER" in os.environ:
            words = f"{item.nodeid}: {report.longreprtext[-4000:]}\nthe GPU is lost: {broken}"
            print(words, file=sys.stderr, flush=True)
            os._exit(1)  # reported as a crash of this test, and replaced
        pytest.exit(f"{item.nodeid}: the GPU is lost: {broken}\n{report.longreprtext}", returncode=1)
    return report


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Starts every test from the same generators, whatever ran before it."""
    random.seed(TEST_SEED)
    np.random.seed(TEST_SEED)
    torch.manual_seed(TEST_SEED)


@pytest.fixture(autouse=True)
def nan_filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills memory that torch hands out unwritten (``empty``, ``resize_``): NaN, or the largest integer.

    An op that forgets to write an element, or reads one too early, then fails every comparison instead of
    passing on memory that happened to be zero. torch fills under deterministic algorithms only;
    ``warn_only`` keeps ops usable that have no deterministic form. A fill commits the pages it writes, so a
    test that measures allocations opts out with ``@pytest.mark.raw_memory``.
    """
    if request.node.get_closest_marker("raw_memory"):
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For files whose sizes are so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
