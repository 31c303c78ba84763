"""Which form runs on a CUDA tensor, on devices that are not there: what is built, what it was built for, and the words.

A device is a compute capability that torch would report. The libraries are real shared libraries with a real record of
a build and no kernel, so that what is loaded, refused and reported is what would be on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gcng
from benchmarks.providers import extension
from gcng import build, libraries
from gcng.cli import main
from gcng.explanation import OPS, cuda_path
from gcng.ops import dispatch, native, triton_path

ROOT = Path(__file__).resolve().parents[1]
CUDA, TRITON, TORCH = dispatch.CUDA_SYNTHESIS, dispatch.TRITON.synthesis, dispatch.TORCH.synthesis
ROOM = 64  # for the list of architectures in the record of a library
SHIPPED = " ".join(option.split(",code=", 1)[1] for option in build.cuda_architectures(build.CUDA_ARCHITECTURES))


@pytest.fixture(scope="module")
def whole_library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("library")
    try:
        compiler = build.compiler()
    except build.BuildError as error:
        pytest.skip(f"{error}")
    sources = libraries.source_hash(libraries.source_folder(), cuda=True)
    source = build._write_build_info(folder / "info.cpp", {"sources": sources, "flags": "F" * ROOM})
    build.run_compiler([*compiler, "-shared", "-fPIC", str(source), "-o", str(folder / "library.so")])
    return (folder / "library.so").read_bytes()


class Machine:
    """CUDA devices by their compute capability, and the two places of libraries, empty at first."""

    def __init__(self, folder: Path, library: bytes) -> None:
        self.folder, self.library, self.capabilities, self.asked = folder, library, [(9, 0)], []

    def capability(self, index: int) -> tuple[int, int]:
        self.asked.append(index)
        return self.capabilities[index]

    def put(self, flags: str, place: str = ".") -> bytes:
        assert self.library.count(b"F" * ROOM) == 1
        text = f'{flags}", "filler": "'
        content = self.library.replace(b"F" * ROOM, text.ljust(ROOM, "-").encode())
        (self.folder / place).mkdir(exist_ok=True)
        (self.folder / place / libraries.CUDA_LIBRARY).write_bytes(content)
        return content

    def tensor(self, index: int = 0, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        """What a dispatch may look at."""
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), dtype=dtype, numel=lambda: 1)

    def synthesis(self, index: int = 0, dtype: torch.dtype = torch.float32) -> object:
        return dispatch.synthesis_kernels(self.tensor(index, dtype))


def forget() -> None:
    for cached in (native._load_cuda, native._warn_of_cuda, triton_path._warn, triton_path._capability_cause):
        cached.cache_clear()
    triton_path.triton_cause.cache_clear()


class Driver:
    """Triton's, on a machine that has what it takes to start kernels, or raises what Triton would."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    @property
    def utils(self) -> object:
        if self.error:
            raise self.error
        return object()


def starting(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Triton starts kernels, or fails with an error."""
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime import driver

        monkeypatch.setattr(driver, "_active", Driver(error))
    triton_path._start_cause.cache_clear()


@pytest.fixture
def machine(tmp_path, monkeypatch, whole_library):
    native.cpu_status()  # keeps what this checkout has
    there = Machine(tmp_path, whole_library)
    monkeypatch.setattr(libraries, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(libraries, "user_folder", lambda: tmp_path / "user")
    monkeypatch.setattr(torch.cuda, "get_device_capability", there.capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there.capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    starting(monkeypatch)
    forget()
    yield there
    monkeypatch.undo()
    forget()
    triton_path._start_cause.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    triton_path.triton_cause.cache_clear()


needs_triton = pytest.mark.skipif(bool(triton_path.triton_cause()), reason=triton_path.triton_cause())


def check_reports(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """explain() and `gcng env` say of every device what the dispatch does on it, and warn of nothing."""
    words = {CUDA: "CUDA C++ kernels", TRITON: "Triton kernels", TORCH: "blocked torch path, slower: "}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained = gcng.explain()
        assert main(["env", "--json"]) == 0
    env = json.loads(capsys.readouterr().out)
    assert env["explain"] == explained
    assert f"CUDA C++ kernels: {env['extension']['cuda']}" in explained.splitlines()
    for index in range(len(machine.capabilities)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernels, pairs = machine.synthesis(index), dispatch.pair_kernels(machine.tensor(index))
        assert cuda_path("synthesis", index).startswith(words[kernels])
        assert f"  synthesis: {cuda_path('synthesis', index)}" in explained.splitlines()
        on_pairs = words[TRITON if pairs is dispatch.TRITON.pair else TORCH]
        assert all(cuda_path(op, index).startswith(on_pairs) for op in OPS if op != "synthesis")
        status = native.cuda_status(index)
        assert (str(status.path) if status.path else status.cause) in env["extension"]["cuda"]


def test_cuda_kernels_run_without_triton(machine, no_triton, capsys):
    machine.put(SHIPPED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.synthesis() is CUDA
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert dispatch.pair_kernels(machine.tensor()) is dispatch.TORCH.pair
    check_reports(machine, capsys)
    assert extension(torch.device("cuda", 0)) == "gcng_cuda"
    with native.disabled():
        assert machine.synthesis() is TORCH and extension(torch.device("cuda", 0)) == "none"


@needs_triton
def test_cuda_kernels_run_beside_triton(machine, capsys):
    machine.put(SHIPPED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.synthesis() is CUDA and dispatch.pair_kernels(machine.tensor()) is dispatch.TRITON.pair
        assert machine.synthesis(dtype=torch.float64) is TORCH
        with triton_path.disabled():
            assert machine.synthesis() is CUDA and dispatch.pair_kernels(machine.tensor()) is dispatch.TORCH.pair
        with dispatch.forced_kernels(*dispatch.TORCH):
            assert machine.synthesis() is TORCH
    assert extension(torch.device("cuda", 0)) == "triton, gcng_cuda"
    check_reports(machine, capsys)


@needs_triton
def test_nothing_built_is_no_warning(machine, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.synthesis() is TRITON
    assert extension(torch.device("cuda", 0)) == "triton"
    check_reports(machine, capsys)
    assert gcng.explain().endswith("CUDA C++ kernels: none; not built; to build: gcng build --cuda")


def test_nothing_at_all_is_torch_and_one_warning(machine, no_triton, capsys):
    with pytest.warns(RuntimeWarning, match="the Triton kernels are not used") as caught:
        assert machine.synthesis() is TORCH and machine.synthesis() is TORCH
    assert len(caught) == 1
    check_reports(machine, capsys)


@needs_triton
def test_a_device_without_code_is_one_warning(machine, capsys):
    """Of an A100, an H100 and another A100, the second alone runs what was built for it; each other one warns once.

    The remedy names what all of them need, or a build for one would take the other's code away.
    """
    machine.capabilities = [(8, 0), (9, 0), (8, 0)]
    machine.put("sm_90a")
    with pytest.warns(RuntimeWarning) as caught:
        found = [machine.synthesis(index) for index in (0, 1, 2, 0, 1, 2)]
    assert found == [TRITON, CUDA, TRITON] * 2
    path = machine.folder / libraries.CUDA_LIBRARY
    assert [str(warning.message) for warning in caught] == [
        f"gcng: the CUDA C++ kernels of the synthesis are not used on CUDA device {index}, its Triton or torch form "
        f"runs: {path} was built for sm_90a, not for compute capability 8.0; "
        "build it again: TORCH_CUDA_ARCH_LIST=8.0,9.0 gcng build --cuda"
        for index in (0, 2)
    ]
    assert CUDA._takes(machine.tensor(1)) and not CUDA._takes(machine.tensor(0))
    assert [extension(torch.device("cuda", index)) for index in (0, 1)] == ["triton", "triton, gcng_cuda"]
    check_reports(machine, capsys)


@needs_triton
def test_a_machine_where_triton_cannot_start_kernels_takes_the_torch_path(machine, monkeypatch, capsys):
    starting(monkeypatch, RuntimeError("Failed to find C compiler. Please specify via CC\nor else"))
    with pytest.warns(RuntimeWarning) as caught:
        found = [machine.synthesis(), machine.synthesis()]
    assert found == [TORCH, TORCH] and len(caught) == 1
    words = "takes a C compiler and Python's headers (RuntimeError: Failed to find C compiler. Please specify via CC)"
    assert words in str(caught[0].message) and "slower torch path" in str(caught[0].message)
    assert words in gcng.explain()


def test_a_device_without_code_is_torch_without_triton(machine, no_triton, capsys):
    machine.capabilities = [(8, 0)]
    machine.put("sm_90a")
    with pytest.warns(RuntimeWarning) as caught:
        assert machine.synthesis() is TORCH
    assert ["build it again: TORCH_CUDA_ARCH_LIST=8.0 gcng build --cuda" in str(x.message) for x in caught] == [
        True,
        False,
    ]
    assert "triton is not installed" in str(caught[1].message)
    check_reports(machine, capsys)


@needs_triton
@pytest.mark.parametrize("what", ["cut", "stale", "foreign"])
def test_a_library_that_cannot_be_used_is_one_warning(machine, capsys, what):
    machine.capabilities = [(8, 0), (9, 0)]
    whole = machine.put(SHIPPED)
    path = machine.folder / libraries.CUDA_LIBRARY
    if what == "cut":
        content, cause = whole[:-65], "is cut short or damaged"
    elif what == "stale":
        wanted = libraries.source_hash(libraries.source_folder(), cuda=True).encode()
        content, cause = whole.replace(wanted, b"0" * len(wanted)), "was built from other sources"
    else:
        content, cause = whole[:18] + (0xB7).to_bytes(2, "little") + whole[20:], "does not load"  # of an AArch64
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning) as caught:
        assert [machine.synthesis(index) for index in (0, 1, 0, 1)] == [TRITON] * 4
    assert len(caught) == 2
    for index, warning in enumerate(caught):
        text = str(warning.message)
        assert cause in text and f"CUDA device {index}," in text and text.endswith("build it again: gcng build --cuda")
    check_reports(machine, capsys)


def test_what_the_remedy_builds_is_used(machine, capsys):
    """Where the package cannot be written, `gcng build` writes to the user's cache; each device takes its own."""
    machine.capabilities = [(8, 0), (9, 0)]
    machine.put("sm_90a")
    machine.put("sm_80", place="user")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [machine.synthesis(index) for index in (0, 1)] == [CUDA, CUDA]
    names = [Path(native.cuda(index)._name).parent.name for index in (0, 1)]
    assert names == ["user", machine.folder.name]
    check_reports(machine, capsys)


def test_nothing_is_asked_of_a_device_twice(machine, monkeypatch):
    """A lookup by index, so that a graph can be captured and torch.compile's calls cost nothing."""
    machine.capabilities = [(9, 0), (7, 5)]
    machine.put(SHIPPED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = [machine.synthesis(index) for index in (0, 1)]
    most = len(machine.asked)
    assert set(machine.asked) == {0, 1}
    monkeypatch.setattr(libraries, "read_build_info", None)
    assert [machine.synthesis(index) for index in (0, 1)] == first == [CUDA, TORCH]
    assert len(machine.asked) == most


@pytest.mark.parametrize(
    ("flags", "runs", "not_on"),
    [
        ("sm_80", "8.0 8.6 8.9", "7.5 9.0 10.0"),
        ("sm_86", "8.6 8.9", "8.0 9.0"),
        ("sm_90a", "9.0", "8.9 9.1 10.0"),
        ("sm_100f", "10.0 10.3", "9.0 11.0 12.0"),
        ("sm_120", "12.0 12.1", "1.2 10.0 13.0"),
        ("[sm_80,compute_80]", "8.0 8.6 9.0 10.0 12.1", "7.5 6.1"),
        ("[sm_90a,compute_90a]", "9.0", "8.9 9.1 10.0"),
        ("sm_70 sm_90a", "7.0 7.5 9.0", "8.0 10.0"),
        (SHIPPED, "8.0 8.6 8.7 8.9 9.0 10.0 10.3 11.0 12.0", "7.5 7.0"),
        ("", "", "8.0 9.0"),
    ],
)
def test_devices_that_a_library_has_code_for(flags, runs, not_on):
    for text in (runs + " " + not_on).split():
        capability = tuple(map(int, text.split(".")))
        assert native.runs_on(flags, capability) == (text in runs.split()), text


def test_a_damaged_better_library_is_named(tmp_path):
    """A worse one runs in its place: one warning, and the same cause in the reports."""
    names = native.runnable_libraries()
    if len(names) < 2 or native.cpu_status().path is None:
        pytest.skip("needs the compiled CPU kernels for two instruction sets")
    (tmp_path / names[0]).write_bytes(b"\x7fELF")
    (tmp_path / names[1]).symlink_to(native.cpu_status().path.with_name(names[1]))
    code = f"""
        import json, pathlib, warnings
        from gcng import libraries
        libraries.package_folder = lambda: pathlib.Path({str(tmp_path)!r})
        libraries.user_folder = lambda: pathlib.Path({str(tmp_path / "user")!r})
        import gcng, torch
        import gcng.functional as F
        from gcng.explanation import extension_in_use
        with warnings.catch_warnings(record=True) as caught:
            F.knn(torch.eye(3), k=1), F.knn(torch.eye(3), k=1)
        print(json.dumps([[str(x.message) for x in caught], extension_in_use()["cpu"], gcng.explain()]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    messages, shown, explained = json.loads(done.stdout.splitlines()[-1])
    cause = f"{tmp_path / names[0]} is not a shared library; build it again: gcng build"
    assert messages == [f"gcng: the compiled CPU kernels are not those for all of this processor: {cause}"]
    assert shown.startswith(str(tmp_path / names[1])) and shown.endswith(f"; not a better one: {cause}")
    assert f"C++ kernels: {shown}" in explained.splitlines()
