"""The GPU suite, rehearsed: every command of `benchmarks/gpu_suite.sh` on the CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import bandwidth, checks, operations, plan, sweeps, verdicts
from benchmarks.results import Results
from benchmarks.settings import Setting
from gcng.ops import dispatch
from gcng.ops.synthesis_tiles import Synthetic, TorchSynthesisKernels

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
LISTED = ("rates", "bandwidth", "stages", "overhead", "accuracy", "sweeps")
MEASURED = (*LISTED, "first", "targets", "wall", "ops", "scaling")
SANITIZERS = ("sanitizer-memcheck", "sanitizer-racecheck", "sanitizer-initcheck")


def suite(*words, out, **environment):
    settings = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([str(SUITE), *words], env=settings, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1500)
def test_a_dry_run_goes_through_every_part_and_a_second_one_skips_what_is_done(tmp_path):
    done = suite("--dry-run", out=tmp_path, GPU_SUITE_SECONDS="1200", TRITON_INTERPRET="1")
    log = (tmp_path / "gpu-suite.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-4000:]
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    status = {one["part"]: one["status"] for one in results["checks"]}
    assert status["repeats"] == status["warm"] == "passed" and status["build"] in ("passed", "not run")
    assert [status[name] for name in SANITIZERS] == ["not run"] * 3
    assert status["tests"] == status["long"] == "not run" or torch.cuda.is_available()
    files = {path.stem for path in (ROOT / "tests").glob("test_gpu_*.py")}
    assert {name.removeprefix("tests-") for name in status if name.startswith("tests-")} == files
    assert "long-test_gpu_pairs" in status
    for name in LISTED:
        assert results[name], name
    measured = {(one["form"], one["gates"]): "passes" in one for one in results["bandwidth"]}
    assert measured == {(form, gates): True for form in ("CUDA C++", "Triton") for gates in ("bfloat16", "float32")}
    assert all(one["commit"] for one in results["bandwidth"]) and "bandwidth" in results["finished"]
    tables = {row["table"] for row in results["sweeps"]["tables"] if "seconds" in row and row["changes"]}
    assert {"product_tiles.edge_products", "class_cross_entropy.WITHOUT_PANELS"} < tables
    names = {row["name"] for row in results["rows"] if row["complete"]}
    assert {entry.name for entries in plan.shrunk(plan.gpu_plan()).values() for entry in entries} == names
    timed = [row for row in results["rows"] if any("time" in one for one in row["providers"].values())]
    assert len(timed) == len(results["rows"])
    again = suite("--dry-run", "repeats", "first", "stages", out=tmp_path)
    assert again.returncode == 0 and "repeats: done" in again.stdout
    assert json.loads(path.read_text())["rows"] == results["rows"]


def test_parts_are_listed_and_unknown_ones_refused(tmp_path):
    listed = suite("--list", out=tmp_path).stdout
    assert listed.split()[0] == "build" and all(f"\n{name}" in listed for name in MEASURED)
    wrong = suite("--dry-run", "nothing", out=tmp_path)
    assert wrong.returncode == 2 and "no part 'nothing'" in wrong.stderr
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if "mark." + "gpu" in path.read_text()}
    assert marked == {path.name for path in (ROOT / "tests").glob("test_gpu_*.py")}  # where the suite looks
    assert set(MEASURED) - set(LISTED) == set(plan.gpu_plan())


def test_what_does_not_fit_into_the_time_is_left_for_the_next_run(tmp_path):
    done = suite("--dry-run", "first", out=tmp_path, GPU_SUITE_SECONDS="10")
    assert done.returncode == 0 and "first: left for the next run" in done.stdout
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("part", "code", "log", "status"),
    [
        ("tests", 0, "===== 26 passed, 2 skipped in 31.02s =====", "passed"),
        ("tests", 0, "26 skipped in 0.24s", "not run"),
        ("tests", 1, "1 failed, 25 passed in 9.1s", "failed"),
        ("tests", 124, "..........", "not run"),
        ("tests-test_gpu_ops", 124, "......s.. [ 40%]\n..F..... [ 80%]\n", "failed"),
        ("long-test_gpu_pairs", 137, "....E", "failed"),
        ("first", 124, "FE", "not run"),
        ("sanitizer-memcheck", 0, "===== ERROR SUMMARY: 0 errors", "passed"),
        ("sanitizer-memcheck", 9, "===== ERROR SUMMARY: 3 errors", "failed"),
        ("sanitizer-memcheck", 0, "nothing was said", "failed"),
        ("sanitizer-racecheck", 0, "=== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        ("sanitizer-racecheck", 9, "=== RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "failed"),
        ("sanitizer-racecheck", 1, "Error: Device not supported", "not run"),
        ("sanitizer-initcheck", 0, "===== ERROR SUMMARY: 0 errors", "passed"),
        ("sanitizer-initcheck", 9, "===== ERROR SUMMARY: 1 error", "failed"),
        ("sanitizer-initcheck", 0, "libx.so: No such file or directory\n== ERROR SUMMARY: 0 errors", "passed"),
        ("build", 127, "timeout: failed to run command 'nvcc': No such file or directory", "not run"),
        ("build", 1, "fatal error: a.h: No such file or directory", "failed"),
    ],
)
def test_what_never_ran_never_counts_as_passed(part, code, log, status):
    assert verdicts.judged(part, code, log)["status"] == status


def test_a_cut_off_log_says_what_was_finished():
    found = verdicts.judged("tests-test_gpu_ops", 124, "header\n....... [ 40%]\n..F.....")
    assert found["details"].startswith("1 failed, 14 passed, then ran out of the time")


def test_a_lost_gpu_is_named_before_what_was_counted():
    log = "!!! Exit: tests/test_gpu_ops.py::test_x: the GPU is lost: illegal access !!!\n3 passed in 5.1s"
    found = verdicts.judged("tests-test_gpu_ops", 1, log)
    assert found["status"] == "failed" and "test_x: the GPU is lost" in found["details"]
    assert found["details"].endswith("3 passed in 5.1s")


def test_the_entries_of_a_part_become_one(tmp_path):
    results = Results.open(tmp_path / "results.json")

    def store(name, status, details):
        verdicts.store(results.data, name, {"status": status, "details": details})
        results.save()

    assert verdicts.joined(results.data, "tests")["status"] == "not run"
    for name, status in (("tests-a", "passed"), ("tests-b", "not run"), ("repeats", "failed")):
        store(name, status, "26 passed")
    words = "a: passed, 26 passed; b: not run, 26 passed"
    assert verdicts.joined(results.data, "tests") == {"status": "not run", "details": words}
    store("tests-b", "passed", "3 passed")
    assert verdicts.main(["--results", str(results.path), "join", "tests"]) == 0
    stored = {one["part"]: one for one in Results.open(results.path).data["checks"]}
    assert stored["tests"]["status"] == "passed" and stored["tests"]["commit"]
    store("tests-a", "failed", "1 failed")
    assert verdicts.main(["--results", str(results.path), "join", "tests"]) == 1


def test_a_verdict_makes_the_file_and_needs_no_torch_afterwards(tmp_path):
    path, log = tmp_path / "r.json", tmp_path / "log"
    log.write_text("3 passed in 1s")
    assert verdicts.main(["--results", str(path), "record", "tests-a", "0", str(log)]) == 0
    code = "import sys; sys.modules['torch'] = None; from benchmarks import verdicts as v; sys.exit(v.main({}))"
    words = ["--results", str(path), "record", "tests-b", "1", str(log)]
    done = subprocess.run([sys.executable, "-c", code.format(words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "tests-b: failed: 3 passed in 1s\n", done.stderr
    assert [one["part"] for one in Results.open(path).data["checks"]] == ["tests-a", "tests-b"]


def stand_in(folder, words, **replaced):
    """Run the suite of a checkout that computes nothing; an interpreter without site-packages can install nothing."""
    sources = {
        "gcng/__init__.py": "",
        "gcng/__main__.py": "import gcng.kernels as k, sys\nprint(*sys.argv[1:], 'with', k.__file__)",
        "kernels/__init__.py": "",
        "benchmarks/__init__.py": "",
        "benchmarks/verdicts.py": "print('recorded')",
        "benchmarks/machine.py": "machine = str\nfile_name = '{}.json'.format",
        "benchmarks/gpu_suite.sh": SUITE.read_text(),
        "python": f'#!/bin/sh\nexec {sys.executable} -S "$@"\n',
        **replaced,
    }
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    path = [str(folder / "bin"), *(name for name in os.environ["PATH"].split(":") if not Path(name, "nvcc").exists())]
    settings = {"OUT": str(folder / "out"), "PYTHON": str(folder / "python"), "PYTHONPATH": "", "PATH": ":".join(path)}
    command = [str(folder / "benchmarks/gpu_suite.sh"), *words]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    log = (folder / "out/gpu-suite.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    return done.stdout, log


def test_a_checkout_that_is_not_installed_is_used_through_a_link_that_goes_away(tmp_path):
    said, log = stand_in(tmp_path, ["--dry-run", "build"])
    assert "not installed: a link to kernels/ stands in" in said
    assert f"build with {tmp_path}/gcng/kernels/__init__.py" in log
    assert not (tmp_path / "gcng/kernels").exists() and not (tmp_path / "gcng/kernels").is_symlink()


def test_the_cuda_kernels_are_built_where_the_build_finds_nvcc(tmp_path):
    """Whether or not a program of that name is on the path."""
    places = {"found": ("return '/somewhere/nvcc'", {}), "not found": ("return 1 / 0", {"bin/nvcc": "#!/bin/sh\n"})}
    asked = {}
    for name, (body, more) in places.items():
        (tmp_path / name).mkdir()
        more = more | {"gcng/build.py": f"def cuda_compiler():\n    {body}\n"}
        _, log = stand_in(tmp_path / name, ["build"], **more)
        asked[name] = "build --cuda with" in log
    assert asked == {"found": True, "not found": False}


def test_a_repeat_that_differs_in_one_bit_fails(monkeypatch):
    assert checks.repeats("cpu", smoke=True)["status"] == "passed"
    arrays, calls = operations.Ready.arrays, []

    def disturbed(self):
        found = arrays(self)
        calls.append(self)
        if len(calls) == 3:
            found["loss n_pair"] = torch.nextafter(found["loss n_pair"], torch.tensor(9.0))
        return found

    monkeypatch.setattr(operations.Ready, "arrays", disturbed)
    result = checks.repeats("cpu", smoke=True)
    assert result["status"] == "failed" and "repeat 2 differs in loss n_pair" in result["details"]


def test_results_that_are_not_finite_are_named(monkeypatch):
    monkeypatch.setattr(bandwidth, "forms", lambda device: {})
    assert checks.once("cpu", smoke=True) == []
    monkeypatch.setattr(operations.Ready, "arrays", lambda self: {"output": torch.tensor(float("nan"))})
    assert "messages float32 output" in checks.once("cpu", smoke=True)


def test_what_synthesizes_is_run_with_the_form_that_dispatch_leaves_out_too(monkeypatch):
    class Other(TorchSynthesisKernels):
        calls: ClassVar[list[str]] = []

        def synthesize(self, side, gate, *, need_values):
            self.calls.append("forward")
            return super().synthesize(side, gate, need_values=need_values)

        def embedding_gradient(self, side, gate, grads, out):
            self.calls.append("backward")
            super().embedding_gradient(side, gate, grads, out)

    taken = dispatch.synthesis_kernels(torch.empty(0))
    monkeypatch.setattr(bandwidth, "forms", lambda device: {"a": taken, "b": "not built", "c": Other()})
    assert [form for form, _ in checks.other_syntheses("cpu")] == ["c"]
    assert checks.once("cpu", smoke=True) == [] and set(Other.calls) == {"forward", "backward"}
    monkeypatch.setattr(Other, "synthesize", lambda *_, **__: Synthetic(*[torch.full((8, 4, 16), torch.nan)] * 3))
    monkeypatch.setattr(checks, "SYNTHESIZING", ("synthesis",))
    assert "c: synthesis float32 output" in checks.once("cpu", smoke=True)


def test_a_form_of_the_synthesis_is_timed_after_it_was_held_to_the_truth_only(monkeypatch):
    class Wrong(TorchSynthesisKernels):
        def add_gate_gradient(self, side, synthetic, grads, out):
            super().add_gate_gradient(side, synthetic, grads, out)
            out *= 1 + 1e-5

    made = {"right": TorchSynthesisKernels(), "wrong": Wrong(), "missing": "not built; to build: gcng build --cuda"}
    monkeypatch.setattr(bandwidth, "forms", lambda device: made)
    monkeypatch.setattr(bandwidth, "TRUTH_ROWS", 5)  # no divisor of the anchors
    entries = bandwidth.measure(Setting(1, 24, 18, 3), "bfloat16", "cpu", 2, cold_bytes=64, copy_bytes=2**16)
    right, wrong, missing = entries
    assert missing["reason"] == "not built; to build: gcng build --cuda" and "passes" not in missing
    assert wrong["reason"].startswith("not close enough to the truth\ngrad gates") and "passes" not in wrong
    elements, values = 18 * 18 * 24, 18 * 6 * 24
    counted = {name: (one["bytes"], one["gate_bytes"]) for name, one in right["passes"].items() if "bytes" in one}
    assert counted == {
        "forward": (2 * elements, 2 * elements),
        "gate gradient": (8 * elements + 8 * values, 8 * elements),
        "embedding gradient": (2 * elements + 4 * values, 2 * elements),
        "backward": (10 * elements + 8 * values, 10 * elements),
    }
    times = right["passes"]
    assert {len(one["rounds"]) for one in times.values()} == {2} and right["copy_bytes"] > 0
    both = zip(times["gate gradient"]["rounds"], times["embedding gradient"]["rounds"], strict=True)
    assert times["backward"]["rounds"] == [a + b for a, b in both]


@dataclass(frozen=True)
class Table:
    num_warps: int = 8
    num_stages: int = 2
    block_rows: int = 64
    even: bool = True


def test_a_sweep_changes_one_field_at_a_time_and_puts_the_table_back():
    words = [change for change, _ in sweeps.variants(Table())]
    assert words == [
        "num_warps 8 -> 4", "num_stages 2 -> 3", "num_stages 2 -> 4", "block_rows 64 -> 32", "block_rows 64 -> 128",
    ]  # fmt: skip
    module = type(sys)("example")
    module.table = module.same = table = lambda: Table()
    with sweeps.table_replaced([module], table, lambda: Table(4)):
        assert module.table().num_warps == module.same().num_warps == 4
    assert module.table is module.same is table
    changed = sweeps.answering(lambda width, backward=False: Table(width), ((8,), {}), Table(2))
    assert changed(8) == Table(2) and changed(4) == Table(4) and changed(8, backward=True) == Table(8)


@pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (1.001, True), (1.1, False), (float("nan"), False)], ids=str)
def test_a_change_that_computes_something_else_is_not_timed(factor, kept):
    class Op:
        def arrays(self):
            return {"output": torch.full((3,), factor, dtype=torch.bfloat16), "zero": torch.zeros(2)}

        def run(self):
            return {"forward": 0.25}

    wanted = {"output": torch.ones(3, dtype=torch.bfloat16), "zero": torch.zeros(2)}
    row = sweeps.timed_if_right(Op(), wanted, 2)
    assert row == ({"seconds": 0.25} if kept else {"reason": "gives other numbers: output"})


def test_the_plan_of_a_gpu_holds_what_the_targets_read():
    names = {entry.name: entry for entries in plan.gpu_plan().values() for entry in entries}
    for n in (80, 1024, 2048, 4096, 8192):
        assert "gcng" in plan.providers_of(names[f"iteration/N{n}-D512-L1/bfloat16"])
    for n in (4096, 16_384):
        assert "gcng-recompute" in plan.providers_of(names[f"iteration/N{n}-D512-L1/bfloat16"])
    for precision in ("tf32", "float32"):
        assert "reference" in plan.providers_of(names[f"iteration/N512-D512-L1/{precision}"])
    assert names["iteration/N4096-D512-L1-C11318/bfloat16"].setting == Setting(1, 512, 4096, classes=11_318)
    assert "liger" in plan.providers_of(names["class_cross_entropy/N32768-D512-L1-C131072/bfloat16"])
