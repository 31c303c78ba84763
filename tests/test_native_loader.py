"""The loader: which library runs, and that a missing, cut, foreign or old one is a warning and never a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch

import gcng
import gcng.functional as F
from gcng import build, libraries
from gcng.cli import main
from gcng.ops import layout, native

ROOT = Path(__file__).resolve().parents[1]
# What this checkout has, before a test hides it.
STATUS = native.cpu_status()
built = pytest.mark.skipif(STATUS.path is None, reason=f"no C++ kernels: {STATUS.cause}")


def run_python(code: str, **environment: str) -> object:
    """Runs code in a fresh interpreter; returns the JSON that its last line prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def forget() -> None:
    for cached in (native._load_cpu, native._load_cuda, native._cpu_or_warning):
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place of libraries, looked at by a loader that has not looked yet."""
    monkeypatch.setattr(libraries, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(libraries, "user_folder", lambda: tmp_path / "user")
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


@pytest.fixture
def whole_library() -> bytes:
    if STATUS.path is None:
        pytest.skip(f"no C++ kernels: {STATUS.cause}")
    return STATUS.path.read_bytes()


def put(folder: Path, content: bytes) -> None:
    for name in libraries.cpu_libraries():
        (folder / name).write_bytes(content)


def check_falls_back(cause: str) -> None:
    """No library: one warning that says why and what to do, then the torch path, and the same cause in all reports."""
    with pytest.warns(RuntimeWarning, match=cause) as caught:
        assert F.knn(torch.eye(3), k=1)[1].shape == (3, 1)
        assert native.cpu() is None
    assert len(caught) == 1 and "gcng build" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert F.knn(torch.eye(3), k=1)[0].shape == (3, 1)
    assert native.cpu_status().cause in gcng.explain()
    assert "retrieval: blocked torch path, slower: the C++ kernels topk_merge are not loaded" in gcng.explain()


def test_the_extension_is_built_where_it_can_be():
    if not build.plan().cpu:
        pytest.skip(f"cannot be built here: {build.plan().reason}")
    status = native.cpu_status()
    assert status.path is not None, f"{status.cause} (or: python -m gcng.build)"


def test_a_missing_library_is_one_warning(folder):
    check_falls_back("not built; to build: gcng build")
    assert "not built" in native.cuda_status().cause and native.cuda() is None


def test_a_library_cut_anywhere_is_never_loaded(folder, whole_library):
    for part in [*range(0, 100, 7), *(len(whole_library) * step // 30 for step in range(1, 30)), -65, -1]:
        put(folder, whole_library[: part if part >= 0 else len(whole_library) + part])
        forget()
        assert native.cpu_status().path is None
        assert "is not a shared library" in native.cpu_status().cause or "cut short" in native.cpu_status().cause
    check_falls_back("cut short or damaged")


def test_a_library_of_other_sources_is_not_loaded(folder, whole_library):
    wanted = libraries.source_hash(libraries.source_folder()).encode()
    assert whole_library.count(wanted) == 1
    put(folder, whole_library.replace(wanted, b"0" * len(wanted)))
    check_falls_back("built from other sources")


def test_a_library_without_its_record_is_not_loaded(folder, whole_library):
    put(folder, whole_library.replace(libraries.MARKER, b"x" * len(libraries.MARKER)))
    check_falls_back("does not say what it was built from")


@pytest.mark.parametrize("patch", ["machine", "symbol"])
def test_a_library_that_does_not_link_is_a_warning(folder, whole_library, patch):
    if patch == "machine":
        content = whole_library[:18] + (0xB7).to_bytes(2, "little") + whole_library[20:]  # of an AArch64
    else:
        assert b"aoti_torch_library_init_impl\0" in whole_library
        content = whole_library.replace(b"aoti_torch_library_init_impl\0", b"aoti_torch_library_init_gone\0")
    put(folder, content)
    check_falls_back("does not load")


def test_an_unreadable_library_is_a_warning(folder, whole_library):
    for name in libraries.cpu_libraries():
        (folder / name).symlink_to(folder / "loop")
    (folder / "loop").symlink_to(folder / "loop")
    check_falls_back("not built")


@built
def test_the_next_best_library_is_taken_where_the_best_is_damaged(folder, monkeypatch, whole_library):
    names = list(libraries.cpu_libraries())
    put(folder, whole_library)
    for damaged in range(len(names)):
        assert native._find(names, command="").path == folder / names[damaged]
        (folder / names[damaged]).write_bytes(b"\x7fELF")
    user = folder / "user"
    user.mkdir()
    (user / names[0]).write_bytes(whole_library)
    assert native._find(names, command="").path == user / names[0]


@built
def test_every_instruction_set_gives_the_same_bits():
    code = """
        import json, torch
        from gcng.ops import layout, native, nearest
        generator = torch.Generator().manual_seed(5)
        scores = torch.randint(-200, 200, (40, 3000), generator=generator).double() / 8
        values, indices = torch.full((40, 9), -torch.inf).double(), torch.full((40, 9), -1)
        native.cpu().topk_merge(scores, 0, None, None, None, values, indices)
        classes = layout._class_layout(indices[:, 0] % 7)
        print(json.dumps([native.cpu_status().path.name, values.tolist(), [x.tolist() for x in (indices, *classes)]]))
    """
    results = [run_python(code, ATEN_CPU_CAPABILITY=limit) for limit in ("avx512", "avx2", "default")]
    assert results[2][0] == "gcng_cpu_baseline.so"
    assert len({json.dumps(result[1:]) for result in results}) == 1
    assert {result[0] for result in results} == set(native.runnable_libraries())


@built
def test_ten_of_ten_forked_children_finish():
    """The parent has used the kernels and torch's threads; a child has neither these threads nor a way to wait."""
    report = run_python("""
        import json, os, signal, time, torch
        from gcng.ops import layout, native, nearest
        torch.set_num_threads(2)

        def work():
            values, indices = torch.full((64, 5), -torch.inf), torch.full((64, 5), -1)
            native.cpu().topk_merge(scores, 0, None, None, None, values, indices)
            return values, indices, *layout._class_layout(indices[:, 0])

        scores = torch.rand(64, 4000, generator=torch.Generator().manual_seed(1))
        expected = work()
        torch.rand(800, 800) @ torch.rand(800, 800)
        codes = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                same = all(torch.equal(a, b) for a, b in zip(work(), expected))
                os._exit(0 if same else 1)
            end, done = time.monotonic() + 20, 0
            while not done and time.monotonic() < end:
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.005)
            if not done:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            codes.append(os.waitstatus_to_exitcode(status) if done else "hangs")
        print(json.dumps(codes))
    """)
    assert report == [0] * 10


@built
def test_a_child_forked_before_the_library_was_loaded_finishes():
    report = run_python("""
        import json, os, signal, torch
        from gcng.ops import native, nearest
        torch.set_num_threads(2)
        scores = torch.zeros(64, 4000)
        torch.rand(800, 800) @ torch.rand(800, 800)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            values, indices = torch.full((64, 5), -torch.inf), torch.full((64, 5), -1)
            native.cpu().topk_merge(scores, 0, None, None, None, values, indices)
            os._exit(int(indices.sum()) != 64 * (0 + 1 + 2 + 3 + 4))
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    """)
    assert report == 0


@built
def test_64_threads_at_once_get_what_one_gets():
    scores = torch.rand(64, 4000)

    def work() -> list[torch.Tensor]:
        values, indices = torch.full((64, 5), -torch.inf), torch.full((64, 5), -1)
        native.cpu().topk_merge(scores, 0, None, None, None, values, indices)
        return [values, indices, *layout._class_layout(indices[:, 0])]

    expected, results = work(), [None] * 64
    start = threading.Barrier(64)

    def run(place: int) -> None:
        start.wait()
        results[place] = work()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


def test_the_switch_turns_kernels_off_and_on_again():
    before = native.cpu()
    with native.disabled():
        assert native.cpu() is None and native.cuda() is None
        with native.disabled():
            assert native.cpu() is None
        assert native.cpu() is None
    assert native.cpu() is before


def test_reports_say_what_is_loaded(capsys):
    status = native.cpu_status()
    assert main(["env", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (str(status.path) if status.path else status.cause) in shown["extension"]["cpu"]
    assert shown["extension"]["cuda"]
    if status.path:
        assert "retrieval: blocked path with the C++ kernels topk_merge" in gcng.explain()
        assert f"C++ kernels: {status.path}" in gcng.explain()


def test_importing_the_loader_loads_nothing():
    loaded = run_python("""
        import json
        import gcng.functional
        from gcng.ops import native
        print(json.dumps([native._load_cpu.cache_info().currsize, "gcng_cpu_" in open("/proc/self/maps").read()]))
    """)
    assert loaded == [0, False]
