"""Kernels without a GPU: tests run in triton's interpreter, on tensors that make a wrong address visible.

A test marked ``interpreter`` runs in a child pytest process with TRITON_INTERPRET=1, one for each test file,
because ``triton.jit`` decides when a kernel is imported whether it will be interpreted; conftest.py registers
:class:`ChildRuns`, which replays the child's reports. In a process that has the variable set already the test
runs in place, which is what a debugger wants: ``TRITON_INTERPRET=1 pytest tests/test_triton_<op>.py``.

Owns this scheme and the tensors of the tests: ending at a page that must not be touched (:func:`guarded`), or
beyond 2^31 elements without the memory (:func:`spread_rows`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
REPORTS = "GCNG_INTERPRETER_REPORTS"
PROT_NONE, MAP_NORESERVE = 0, 0x4000  # of Linux; Python's mmap does not name them
_alive: list[Any] = []  # guarded memory is never unmapped: a tensor may outlive every reference that python sees


def is_interpreting() -> bool:
    """Whether this process interprets kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class ChildRuns:
    """pytest plugin: runs the marked tests of a file in one child and reports them as if they had run here."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reports: dict[str, dict[str, list[dict]]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if is_interpreting() or item.get_closest_marker("interpreter") is None:
            return None
        file = str(item.path)
        if file not in self.reports:
            marked = [x for x in item.session.items if x.path == item.path and x.get_closest_marker("interpreter")]
            self.reports[file] = self.run(marked)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in self.reports[file][item.nodeid]:
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def run(self, items: list[pytest.Item]) -> dict[str, list[dict]]:
        """Reports of every item by node id; an item that the child never finished gets one failure."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reports.jsonl"
            path.touch()
            names = Path(folder) / "names.txt"
            names.write_text("\n".join(item.nodeid for item in items), encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{names}"]
            command += ["--long"] if self.config.getoption("--long") else []
            command += [f"--maxfail={self.config.getoption('maxfail')}"] if self.config.getoption("maxfail") else []
            environment = {**os.environ, "TRITON_INTERPRET": "1", REPORTS: str(path)}
            done = subprocess.run(command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True)
            lines = path.read_text(encoding="utf-8").splitlines()
        found: dict[str, list[dict]] = {item.nodeid: [] for item in items}
        for data in map(json.loads, lines):
            found[data["nodeid"]].append(data)
        tail = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        for item in items:
            if not found[item.nodeid] or found[item.nodeid][-1]["when"] != "teardown":
                found[item.nodeid].append(self.lost(item, done.returncode, tail))
        return found

    def lost(self, item: pytest.Item, code: int, tail: str) -> dict:
        """A failed report for a test that the child process did not get through."""
        text = f"the interpreting process ended with {code} before this test was done\n{tail}"
        report = pytest.TestReport(
            nodeid=item.nodeid, location=item.location, keywords={}, outcome="failed", longrepr=text, when="call"
        )
        return self.config.hook.pytest_report_to_serializable(config=self.config, report=report)


class ReportWriter:
    """pytest plugin of the child: writes each report down as soon as it exists."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


def configure(config: pytest.Config) -> None:
    """To be called by ``pytest_configure``: the plugin of this process, and the integer overflow check."""
    if not is_interpreting():
        config.pluginmanager.register(ChildRuns(config))
        return
    if REPORTS in os.environ:
        config.pluginmanager.register(ReportWriter(config))
    prepare_interpreter()


def prepare_interpreter() -> None:
    """What every process that interprets kernels does first."""
    check_integer_overflow()
    patch_language_once()


def patch_language_once() -> None:
    """Spare the interpreter from patching triton.language for every helper that a kernel calls: it is patched already.

    Half of the time of a kernel went there. The results keep their bits.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_where_needed(function):
        used = [x for x in (language, language.core) if any(x is value for value in function.__globals__.values())]
        if any(language.core.is_builtin(x.load) for x in used):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_where_needed


def check_integer_overflow() -> None:
    """Make every 8, 16 and 32-bit sum, difference and product of the interpreter fail where it overflows."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)


def guarded(values: Tensor) -> Tensor:
    """A copy of ``values``, contiguous, whose last byte is the last before a page that no access survives.

    A load or store behind the end kills the process, as it may on a GPU: call it in :func:`run_isolated`.
    """
    page = mmap.PAGESIZE
    size = values.numel() * values.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    buffer = (ctypes.c_char * size).from_address(start + pages * page - size)
    _alive.append(memory)
    flat = torch.frombuffer(buffer, dtype=values.dtype, count=values.numel()) if size else values.flatten()
    return flat.view(values.shape).copy_(values)


def guard_allocations() -> None:
    """Let what torch allocates on the CPU from now on be :func:`guarded`, outputs of launchers above all.

    For the code of :func:`check_isolated`; it is not undone.
    """
    for owner, names in ((torch.Tensor, ("new_empty", "new_zeros", "new_full")),
                         (torch, ("empty", "zeros", "full", "empty_like", "zeros_like"))):  # fmt: skip
        for name in names:
            original = getattr(owner, name)

            def allocate(*arguments: Any, _original: Any = original, **options: Any) -> Tensor:
                made = _original(*arguments, **options)
                return guarded(made) if made.device.type == "cpu" else made

            setattr(owner, name, allocate)


def spread_rows(values: Tensor, stride: int) -> Tensor:
    """The rows of a matrix ``stride`` elements apart, in memory that is reserved but, between them, never touched.

    With ``(rows - 1) * stride >= 2**31`` an address computed in 32 bits is wrong and the overflow check fires.
    """
    length = (values.shape[0] - 1) * stride + values.shape[1]
    memory = mmap.mmap(-1, length * values.element_size(), flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
    _alive.append(memory)
    spread = torch.frombuffer(memory, dtype=values.dtype, count=length).as_strided(values.shape, (stride, 1))
    spread.copy_(values)
    return spread


def run_isolated(code: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run python code from the root of the repository in an interpreting process of its own."""
    setup = "from tests.triton_interpreter import prepare_interpreter\nprepare_interpreter()\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-c", setup + code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def check_isolated(code: str, timeout: float = 300) -> None:
    """:func:`run_isolated`, expecting success: an access outside the tensors ends the process by a signal."""
    done = run_isolated(code, timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
