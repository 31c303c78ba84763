"""The build: only what changed, one at a time, whole files or none, and a reason wherever it cannot be done."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gcng import build, compilation, libraries
from gcng.cli import main
from gcng.cli.build import writable_folder

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["gcng_cpu_baseline.so"]


def _cause() -> str:
    try:
        build.torch_folder(), build.compiler()
    except build.BuildError as error:
        return str(error)
    return ""


def _cuda_cause() -> str:
    try:
        build.cuda_compiler()
    except build.BuildError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(_cause()), reason=f"nothing can be built: {_cause()}")
needs_nvcc = pytest.mark.skipif(bool(_cuda_cause()), reason=_cuda_cause())


@pytest.fixture
def csrc(tmp_path, monkeypatch) -> Path:
    """A source tree of two kernels, one registration without torch, and a header: it builds in a second."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "tensor_access.h").write_text("#pragma once\n")
    (folder / "cpu" / "value.h").write_text("#pragma once\nint value();\n")
    (folder / "cpu" / "value.cpp").write_text('#include "cpu/value.h"\nint value() { return 1; }\n')
    (folder / "cpu" / "alone.cpp").write_text("int alone() { return 2; }\n")
    (folder / "register_value.cpp").write_text(
        '#include "cpu/value.h"\n'
        'extern "C" __attribute__((visibility("default"))) int gcng_value() { return value(); }\n'
    )
    monkeypatch.setattr(libraries, "source_folder", lambda: folder)
    return folder


def build_small(tmp_path: Path, **options: object) -> Path:
    return build.build_cpu(tmp_path / "out", objects=tmp_path / "objects", names=NAMES, **options)[0]


def value_of(library: Path, tmp_path: Path) -> int:
    """What the function of a library returns; a copy is loaded, as a path is mapped once only."""
    copy = tmp_path / f"copy{len(list(tmp_path.glob('copy*')))}.so"
    shutil.copy(library, copy)
    # Its torch libraries are in no search path; torch loaded them.
    import torch  # noqa: F401

    return ctypes.CDLL(str(copy)).gcng_value()


@pytest.fixture(params=["ninja", "threads"])
def runner(request, monkeypatch) -> str:
    """What runs the compilers."""
    if request.param == "threads":
        monkeypatch.setattr(compilation, "ninja", lambda: None)
    elif compilation.ninja() is None:
        pytest.skip("ninja is not installed")
    return request.param


@pytest.fixture
def no_torch(tmp_path, monkeypatch) -> Path:
    """Where torch would lie, if there were one."""
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    real = build.sysconfig.get_path
    elsewhere = {name: str(tmp_path / name) for name in ("platlib", "purelib")}
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: elsewhere.get(name) or real(name))
    return tmp_path / "platlib" / "torch"


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


class Compiled:
    """Names of the sources that are compiled from now on, and whether threads did it."""

    def __init__(self, tmp_path: Path, monkeypatch):
        self.log, self.commands, run = tmp_path / "compiled", [], compilation.run_compiler
        wrapper = script(tmp_path / "c++", f'echo "$*" >>{self.log}', f'exec {" ".join(build.compiler())} "$@"')
        monkeypatch.setenv("CXX", str(wrapper))
        monkeypatch.setattr(compilation, "run_compiler", lambda words: (self.commands.append(words), run(words)))

    def names(self) -> list[str]:
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return sorted(Path(word).name for word in text.split() if word.endswith((".cpp", ".cu")))

    def in_threads(self) -> bool:
        return any("-c" in words for words in self.commands)


@needs_compiler
def test_a_build_compiles_what_changed_and_nothing_else(runner, csrc, tmp_path, monkeypatch):
    compiled = Compiled(tmp_path, monkeypatch)
    library = build_small(tmp_path)
    assert compiled.names() == ["alone.cpp", "build_info.cpp", "register_value.cpp", "value.cpp"]
    assert libraries.read_build_info(library)["sources"] == libraries.source_hash(csrc)
    assert value_of(library, tmp_path) == 1
    build_small(tmp_path)
    assert compiled.names() == []
    (csrc / "cpu" / "value.cpp").write_text('#include "cpu/value.h"\nint value() { return 5; }\n')
    assert value_of(build_small(tmp_path), tmp_path) == 5
    assert compiled.names() == ["build_info.cpp", "value.cpp"]
    (csrc / "cpu" / "value.h").write_text("#pragma once\nint value();  // the number\n")
    build_small(tmp_path)
    assert compiled.names() == ["build_info.cpp", "register_value.cpp", "value.cpp"]
    monkeypatch.setattr(build, "CPU_FLAGS", (*build.CPU_FLAGS, "-g"))
    build_small(tmp_path)
    assert len(compiled.names()) == 4
    assert compiled.in_threads() is (runner == "threads")


@needs_compiler
def test_what_ninja_made_is_up_to_date_for_the_threads(csrc, tmp_path, monkeypatch):
    """Same commands, same record of them: it does not matter who built before."""
    if compilation.ninja() is None:
        pytest.skip("ninja is not installed")
    build_small(tmp_path)
    compiled = Compiled(tmp_path, monkeypatch)
    commands = {path.name: path.read_text() for path in (tmp_path / "objects").rglob("*.cmd")}
    library = build_small(tmp_path).read_bytes()
    monkeypatch.setattr(compilation, "ninja", lambda: None)
    other = build.build_cpu(tmp_path / "out2", objects=tmp_path / "objects", names=NAMES)[0]
    assert len(compiled.names()) == 4 and other.read_bytes() == library
    wrapper = f"{tmp_path / 'c++'}"
    again = {path.name: path.read_text() for path in (tmp_path / "objects").rglob("*.cmd")}
    assert {name: text.replace(wrapper, "c++", 1) for name, text in again.items()} == commands


@needs_compiler
@pytest.mark.parametrize("lines", [["exit 1"], ["kill -9 $$"], None])
def test_a_ninja_that_does_not_work_is_as_none(lines, csrc, tmp_path, monkeypatch):
    log = tmp_path / "arguments"
    program = script(tmp_path / "ninja", f'echo "$*" >{log}', *lines) if lines else tmp_path / "gone"
    monkeypatch.setattr(compilation, "ninja", lambda: str(program))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert value_of(build_small(tmp_path), tmp_path) == 1
    assert lines is None or log.read_text().endswith("-j 3\n")


@needs_compiler
def test_an_interrupted_build_goes_on_where_it_was(csrc, tmp_path, monkeypatch):
    if (program := compilation.ninja()) is None:
        pytest.skip("ninja is not installed")
    (csrc / "cpu" / "value.cpp").write_text("#error\n")
    monkeypatch.setenv("MAX_JOBS", "1")
    waits = script(tmp_path / "ninja", f'{program} "$@"', f"touch {tmp_path / 'ended'}", "exec sleep 10")
    monkeypatch.setattr(compilation, "ninja", lambda: str(waits))

    def interrupt() -> None:
        while not (tmp_path / "ended").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    # A shell starts what runs in its background with the signal ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            build_small(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    kept = {path.stem for path in (tmp_path / "objects").rglob("*.cmd")}
    assert {"alone", "register_value"} <= kept and "value" not in kept


@needs_compiler
def test_a_folder_may_have_any_name(runner, csrc, tmp_path):
    place = tmp_path / "a $b: 'c' |d&"
    place.mkdir()
    assert value_of(build_small(place), tmp_path) == 1


@needs_compiler
def test_a_compile_error_is_shown_and_the_old_library_stays(csrc, tmp_path, monkeypatch):
    library = build_small(tmp_path)
    before = library.read_bytes()
    (csrc / "cpu" / "alone.cpp").write_text("int alone() { return two; }\n")
    with pytest.raises(build.BuildError, match="error: .two. was not declared|undeclared identifier .two.") as first:
        build_small(tmp_path)
    monkeypatch.setattr(compilation, "ninja", lambda: None)
    with pytest.raises(build.BuildError) as second:
        build_small(tmp_path)
    assert str(first.value) == str(second.value) and len(str(first.value).splitlines()) > 2
    assert library.read_bytes() == before
    assert [path.name for path in library.parent.iterdir()] == NAMES


@needs_compiler
def test_a_source_that_changes_during_the_build_is_an_error(csrc, tmp_path, monkeypatch):
    run = compilation.run_compiler

    def edit(command):
        run(command)
        (csrc / "cpu" / "alone.cpp").write_text("int alone() { return 3; }\n")

    monkeypatch.setattr(compilation, "run_compiler", edit)
    with pytest.raises(build.BuildError, match="changed during the build"):
        build_small(tmp_path)


@needs_compiler
def test_the_lock_has_a_time_limit(csrc, tmp_path):
    (tmp_path / "objects").mkdir()
    with open(tmp_path / "objects" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(build.BuildError, match="another build has held"):
            build_small(tmp_path, timeout=0.3)
        assert time.monotonic() - start < 30
    assert build_small(tmp_path, timeout=0.3).is_file()


def start_build(csrc: Path, tmp_path: Path) -> subprocess.Popen:
    code = f"""
        from pathlib import Path
        from gcng import build, compilation, libraries
        libraries.source_folder = lambda: Path({str(csrc)!r})
        tmp_path = Path({str(tmp_path)!r})
        print("start", flush=True)
        build.build_cpu(tmp_path / "out", objects=tmp_path / "objects", names={NAMES!r}, timeout=200)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"start\n"
    return process


@needs_compiler
def test_a_killed_build_leaves_a_whole_library_or_none(runner, csrc, tmp_path):
    """At 10 random moments; the next build neither waits for the dead one nor trips over what it left."""
    library, moments = tmp_path / "out" / NAMES[0], random.Random(runner)
    for number in range(10):
        (csrc / "cpu" / "value.cpp").write_text(f'#include "cpu/value.h"\nint value() {{ return {number}; }}\n')
        process = start_build(csrc, tmp_path)
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if library.exists():
            libraries.read_build_info(library)
    assert value_of(build_small(tmp_path, timeout=20), tmp_path) == 9
    # The compilers of a dead build live a little longer; every build removes what they left.
    end = time.monotonic() + 30
    while list((tmp_path / "objects").rglob("*.part")):
        assert time.monotonic() < end
        time.sleep(0.2)
        build_small(tmp_path)


@needs_compiler
def test_four_builds_at_once_all_succeed(runner, csrc, tmp_path):
    processes = [start_build(csrc, tmp_path) for _ in range(4)]
    assert [process.wait(timeout=200) for process in processes] == [0] * 4
    for process in processes:
        process.stdout.close()
    assert value_of(tmp_path / "out" / NAMES[0], tmp_path) == 1


def test_without_a_compiler_the_package_is_built_without_kernels(csrc, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    plan = build.plan()
    assert not plan.cpu and ("no-such-compiler" in plan.reason or "torch" in plan.reason)
    build.build_package(plan, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "to build them later: gcng build" in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_isolated_build_finds_the_torch_of_its_environment(no_torch, monkeypatch):
    """pip hides what is installed from a build that it isolates; where that lies is no secret."""
    missing = build.Plan(False, False, "torch is not installed in the environment that builds")
    assert build.plan() == missing
    (no_torch / "lib").mkdir(parents=True)
    assert build.plan() == missing, "what an uninstalled torch left"
    (no_torch / "version.py").write_text("__version__ = '2.10.1+cu128'\n")
    assert "2.11 or later" in build.plan().reason
    (no_torch / "version.py").write_text("__version__ = '2.12.0'\n")
    assert build.torch_folder() == no_torch
    no_torch.parent.rename(no_torch.parents[1] / "purelib")
    assert build.torch_folder().parent.name == "purelib"


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_install_the_package_without_kernels(system, csrc, tmp_path):
    """In a fresh process, as setup.py runs there: no fcntl on Windows, no sched_getaffinity on either."""
    code = f"""
        import builtins, os, sys
        real = builtins.__import__
        def without(name, *rest):
            if name == "fcntl" and {system!r} == "win32":
                raise ModuleNotFoundError("No module named 'fcntl'")
            return real(name, *rest)
        builtins.__import__ = without
        from gcng import build, compilation, libraries
        from pathlib import Path
        libraries.source_folder = lambda: Path({str(csrc)!r})
        sys.platform = {system!r}
        del os.sched_getaffinity
        assert build.num_jobs() >= 1
        plan = build.plan()
        build.build_package(plan, Path({str(tmp_path / "out")!r}))
        print(plan.cpu, plan.cuda, plan.reason)
        try:
            build.build_cpu(Path({str(tmp_path / "out")!r}))
        except build.BuildError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("MAX_JOBS", "GCNG_BUILD_CUDA")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    reason = f"the kernels are built on Linux only, and this is {system}"
    assert done.stdout.splitlines() == [f"False False {reason}", reason], done.stderr
    assert "without the compiled CPU kernels" in done.stderr and not (tmp_path / "out").exists()


def test_an_older_torch_is_refused(tmp_path, monkeypatch):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: Spec)
    (tmp_path / "version.py").write_text("__version__ = '2.10.1+cu128'\ncuda: Optional[str] = '12.8'\n")
    assert "2.11 or later" in build.plan().reason
    (tmp_path / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '12.8'\n")
    assert build.torch_folder() == tmp_path and build.torch_has_cuda()
    (tmp_path / "version.py").write_text("__version__ = '3.0.0'\ncuda: Optional[str] = None\n")
    assert not build.torch_has_cuda()


def test_a_kernel_that_does_not_compile_does_not_fail_the_installation(csrc, tmp_path, capsys):
    (csrc / "cpu" / "alone.cpp").write_text("int alone() {\n  return two + three;\n}\n")
    build.build_package(build.Plan(True, False, ""), tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gcng: without the compiled CPU kernels"), lines
    assert "csrc/cpu/alone.cpp:2:" in lines[0] and "two" in lines[0] and "-std=" not in lines[0]


def test_cuda_that_was_asked_for_is_built_or_fails(csrc, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GCNG_BUILD_CUDA", "maybe")
    with pytest.raises(build.BuildError, match="'maybe'; use auto, 0 or 1"):
        build.plan()
    monkeypatch.setenv("GCNG_BUILD_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match="no nvcc"):
        build.plan()
    nvcc = tmp_path / "none" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho no device compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    with pytest.raises(build.BuildError, match="no CUDA source"):
        build.plan()
    (csrc / "cuda").mkdir()
    (csrc / "cuda" / "one.cu").write_text("")
    assert build.plan().cuda
    with pytest.raises(build.BuildError, match="no device compiler"):
        build.build_package(build.Plan(False, True, ""), tmp_path / "out")
    monkeypatch.setenv("GCNG_BUILD_CUDA", "auto")
    capsys.readouterr()
    build.build_package(build.Plan(False, True, ""), tmp_path / "out")
    line = "gcng: without the CUDA kernels, to build them later: gcng build --cuda (no device compiler)\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("GCNG_BUILD_CUDA", "0")
    assert not build.plan().cuda
    monkeypatch.setenv("GCNG_BUILD_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="'Hopper' is not an architecture"):
        build.plan()


def test_architectures_and_jobs_are_read_as_torch_reads_them(monkeypatch):
    assert build.cuda_architectures("8.0;9.0a, 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert build.cuda_architectures() == ["-gencode=arch=compute_75,code=sm_75"]
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.num_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "0")
    with pytest.raises(build.BuildError, match="MAX_JOBS is '0'"):
        build.num_jobs()


@needs_nvcc
def test_the_cuda_library_needs_neither_a_gpu_nor_torch(runner, csrc, tmp_path, monkeypatch, no_torch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (csrc / "cuda").mkdir()
    (csrc / "cuda" / "double.cu").write_text(
        "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
        'extern "C" int gcng_twice(float* x, void* stream) {\n'
        "  twice<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(x);\n"
        "  return static_cast<int>(cudaGetLastError());\n"
        "}\n"
    )
    (library,) = build.build_cuda(tmp_path / "out", objects=tmp_path / "objects")
    info = libraries.read_build_info(library)
    assert info["sources"] == libraries.source_hash(csrc, cuda=True)
    assert info["flags"] == "[sm_80,compute_80] sm_90a sm_100a"
    assert library.read_bytes().count(b".nv_fatbin") >= 1
    assert ctypes.CDLL(str(library)).gcng_twice is not None


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_each_library_has_the_vectors_of_its_name():
    folder = libraries.package_folder()
    if not (folder / NAMES[0]).is_file() or len(libraries.cpu_libraries()) == 1:
        pytest.skip("no libraries for several instruction sets are built")
    registers = {}
    for name in libraries.cpu_libraries():
        text = subprocess.run(["objdump", "-d", folder / name], capture_output=True, text=True, check=True).stdout
        registers[name] = {kind for kind in ("xmm", "ymm", "zmm") if f"%{kind}" in text}
    assert registers == {
        "gcng_cpu_avx512.so": {"xmm", "ymm", "zmm"},
        "gcng_cpu_avx2.so": {"xmm", "ymm"},
        "gcng_cpu_baseline.so": {"xmm"},
    }


def test_the_command_builds_into_the_package_or_the_users_cache(csrc, tmp_path, monkeypatch, capsys):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(libraries, "package_folder", lambda: package / "_native")
    monkeypatch.setattr(libraries, "user_folder", lambda: tmp_path / "user")
    assert writable_folder() == package / "_native"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != package)
    assert writable_folder() == tmp_path / "user"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build"]) == 2
    assert "no C++ compiler" in capsys.readouterr().err or _cause()
    if not _cause():
        monkeypatch.delenv("CXX")
        assert main(["build", "--json"]) == 0
        assert "gcng_cpu_baseline.so" in capsys.readouterr().out
        assert (tmp_path / "user" / NAMES[0]).is_file()
        (csrc / "cpu" / "alone.cpp").write_text("int alone() {\n  return two;\n}\n")
        assert main(["build"]) == 2
        assert "-std=c++20" in (text := capsys.readouterr().err) and "return two;" in text, "all that the compiler said"


def test_one_library_that_cannot_be_built_does_not_keep_the_other_away(tmp_path, monkeypatch, capsys):
    def fail(target, timeout):
        raise build.BuildError("no C++ compiler")

    monkeypatch.setattr("gcng.cli.build.writable_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "build_cpu", fail)
    monkeypatch.setattr(build, "build_cuda", lambda target, timeout: [target / libraries.CUDA_LIBRARY])
    assert main(["build", "--cuda", "--json"]) == 2
    said = capsys.readouterr()
    assert "gcng build: no C++ compiler" in said.err and libraries.CUDA_LIBRARY in said.out


def test_the_builder_imports_neither_torch_nor_setuptools():
    code = "import sys, gcng.build; print(sorted({'torch', 'setuptools', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
