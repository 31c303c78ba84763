"""The benchmark harness at tiny sizes: sizes, gate, plan, memory, restarts. Nothing here depends on a timing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import accuracy, bench_iteration, machine, measure, memory, operations, plan, preparation, words
from benchmarks.iteration import make_batch, make_provider, make_weights, official_name, run_iteration
from benchmarks.plan import Entry
from benchmarks.preparation import Preparation
from benchmarks.results import Results, setting_of
from benchmarks.settings import Setting, executed_generator_units, sweep, units_per_pair
from gcng.memory import MemoryPlan

ROOT = Path(__file__).resolve().parents[1]
SMALL = Setting(1, 16, 8)
ITERATION = bench_iteration.OPERATION


def test_operation_counts_per_pair():
    layers = range(1, 4)
    assert [units_per_pair("published", L) for L in layers] == [336 * L - 96 for L in layers]
    assert [units_per_pair("reference", L) for L in layers] == [240 * L - 64 for L in layers]
    assert [units_per_pair("useful", L) for L in layers] == [108 * L - 26 for L in layers]
    setting = Setting(1, 512, 160)
    assert setting.useful_flops() == 82 * 512**2 * 160 * 161 / 2 + 6 * 160 * 80 * 100 * 512


def test_the_executed_products_are_the_useful_ones_where_everything_is_kept():
    everything = {"stash_edges": True, "stash_hidden": True, "stash_small": True}
    for L in range(1, 4):
        forward = 18 * L + 2
        assert executed_generator_units(L, **everything) == forward + 2 * (forward - 1)
    edges = everything | {"stash_hidden": False}
    assert executed_generator_units(2, **edges) == executed_generator_units(2, **everything) + 32
    nothing = dict.fromkeys(everything, False)
    # Forward 36 and 86, as a walk over the passes gives; every pass of the backward evaluates its tile again.
    assert [executed_generator_units(L, **nothing) for L in (1, 2)] == [36 + 76, 86 + 194]


@pytest.mark.parametrize("layers", [1, 2])
def test_published_executes_the_counted_operations(layers):
    """Products counted by torch at two N: those of pairs, classifier and n-pair loss grow with N^2."""
    D, sizes = 64, (16, 32)
    executed = []
    for N in sizes:
        setting = Setting(layers, D, N)
        provider, batch = make_provider("published", setting), make_batch(setting)
        with FlopCounterMode(display=False) as counter:
            run_iteration(provider, batch)
        counts = counter.get_flop_counts()["Global"]
        executed.append((counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]) / N**2)
    quadratic = 2 * executed[1] - executed[0]  # node maps grow with N: their share halves from one size to the next
    units = units_per_pair("published", layers) / 2 * D**2
    classifier = Setting(layers, D, 32).classifier_flops() / 32**2
    n_pair = 6 * D / 4  # (19) over M^2 logits
    assert quadratic == pytest.approx(units + classifier + n_pair, rel=1e-12)


def test_every_weight_has_its_name_in_a_checkpoint():
    names = [official_name(name) for name in make_weights(Setting(2, 16, 8))]
    assert len(set(names)) == len(names)
    assert official_name("edge1.ffln.b") == "gnn.gnn.1.edge_model.linear.2.bias"
    assert official_name("node0.e2n.w") == "gnn.gnn.0.node_model.layers.0.edge_to_node.weight"
    assert official_name("bn_edge.w") == "gnn.bottleneck1.0.weight"


def test_what_keeps_nothing_keeps_nothing_where_everything_would_fit():
    setting = Setting(1, 64, 40)
    batch = make_batch(setting)
    plans = [make_provider(name, setting).criterion.graph.memory_plan(batch.z) for name in ("gcng", "gcng-recompute")]
    assert plans[0].stash_edges and plans[0].stash_hidden
    assert plans[1] == MemoryPlan(plans[1].pairs_per_tile) and plans[1].pairs_per_tile > 1


def test_settings_name_a_batch_that_exists():
    assert [s.samples for s in sweep(SMALL, samples=(4, 8))] == [4, 8]
    assert Setting(1, 16, 320).training_classes == 160 and SMALL.training_classes == 100
    assert Setting(1, 16, 8, classes=1000).name == "N8-D16-L1-C1000"
    assert Setting(2, 16, 8, samples_per_class=4).name == "N8-D16-L2-K4"
    with pytest.raises(ValueError, match="samples is 7, not a multiple of samples_per_class 2"):
        Setting(1, 16, 7)
    with pytest.raises(ValueError, match="name is 'dense'"):
        make_provider("dense", SMALL)


def test_the_cache_of_torch_counts_as_available_on_a_gpu(monkeypatch):
    for name, size in (("mem_get_info", (20, 80)), ("memory_reserved", 60), ("memory_allocated", 25)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert memory.available_bytes("cuda") == 20 + 60 - 25


def test_memory_is_predicted_from_the_nearest_smaller_size():
    sizes = (Setting(1, 16, 8), Setting(1, 16, 16), Setting(2, 16, 16), Setting(1, 32, 4))
    measured = dict(zip(sizes, (100, 300, 7, 9), strict=True))
    assert memory.predicted_bytes(ITERATION, Setting(1, 16, 32), measured) == 1200
    assert memory.predicted_bytes(ITERATION, Setting(1, 32, 16), measured) == 9 * 16
    assert memory.predicted_bytes(ITERATION, Setting(3, 16, 8), measured) is None


def test_a_row_that_cannot_fit_says_so_and_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 10_000)
    results = Results.open(tmp_path / "r.json")
    known = results.row(ITERATION, SMALL, "float32")
    known["providers"]["published"] = {"status": "measured", "memory": {"peak_bytes": 5000}}
    session = preparation.Preparation(results, "cpu", 1, float("inf"), 1e12, memory_too=False)
    entry = plan.Entry("iteration", replace(SMALL, samples=16), ("published", "gcng"), rounds=1)
    first, second = plan.cases_of([entry])
    with pytest.raises(pytest.skip.Exception, match="predicted not to fit"):
        session.ready(first)
    assert session.ready(second).provider == "gcng"
    session.finish()
    row = results.find("iteration", entry.setting, "float32")
    assert row["complete"] and row["truth"] == "gcng in float64"
    assert row["providers"]["published"]["memory"] == {"predicted_bytes": 20_000, "available_bytes": 10_000}


def test_peak_memory_comes_from_a_process_of_its_own():
    row = memory.measure("synthesis", "reference", Setting(1, 64, 64), "float32", threads=1)
    assert row["status"] == "measured"
    assert row["peak_bytes"] > 4 * 64 * 64 * 64, "the gates alone are larger"
    missing = memory.measure("class_cross_entropy", "liger", Setting(1, 16, 8), "float32", threads=1)
    assert missing["status"] == "unavailable" and missing["reason"]


def test_the_plan_puts_the_most_valuable_first_and_names_every_row_once():
    for made in (plan.cpu_plan(), plan.gpu_plan(), plan.smoke_plan()):
        names = [entry.name for entries in made.values() for entry in entries]
        assert len(set(names)) == len(names)
        for entry in (entry for entries in made.values() for entry in entries):
            assert plan.providers_of(entry), entry.name
    first = plan.cpu_plan()["first"][0]
    assert (first.operation, first.setting.name) == ("iteration", "N160-D512-L1")
    covered = {entry.name for entries in plan.cpu_plan().values() for entry in entries}
    for name in (*plan.MODELS, "iteration"):
        for N in plan.SAMPLES:
            for D in plan.EMBEDDING_SIZES:
                assert f"{name}/N{N}-D{D}-L1/float32" in covered
    assert plan.load(json.loads(json.dumps(plan.dump([first])))) == [first]


def test_cases_of_an_entry_take_turns():
    entry = plan.Entry("retrieval", SMALL, ("gcng", "faiss"), rounds=2)
    assert [(case.provider, case.round) for case in plan.cases_of([entry])] == [
        ("gcng", 0), ("faiss", 0), ("gcng", 1), ("faiss", 1),
    ]  # fmt: skip


def test_parts_are_chosen_by_name_or_by_the_start_of_a_row():
    options = measure.options_for(None, Path("r.json"))
    parts = measure.parts_of(options)
    assert list(parts)[:3] == ["rates", "first", "stages"]
    assert list(measure.chosen(parts, ["stages", "edges/N160"])) == ["stages", "edges/N160"]
    with pytest.raises(ValueError, match="--parts nothing: neither a part"):
        measure.chosen(parts, ["nothing"])
    with pytest.raises(ValueError, match="op is 'nothing'"):
        measure.options_for("nothing", Path("r.json"))
    assert len(measure.options_for("attention", Path("r.json")).parts) == 1 + measure.USER_ROWS


def smoke(path, *more):
    command = [sys.executable, "-m", "benchmarks.measure", "--smoke", "--threads", "1", "--json", str(path), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_smoke_run_writes_rows_and_a_second_run_goes_on(tmp_path):
    path = tmp_path / "smoke.json"
    parts = ("--parts", "iteration/", "attention/")
    done = smoke(path, *parts)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    assert [row["name"] for row in results["rows"]] == ["iteration/N8-D16-L1/float32", "attention/N8-D16-L1/float32"]
    assert results["machine"]["cores"] >= 1 and results["protocol"]["threads"] == 1
    row = results["rows"][0]
    assert row["complete"] and row["truth"] == "published in float64" and row["gemm"]["flops"] > 0
    for name in ("published", "reference", "gcng"):
        provider = row["providers"][name]
        assert provider["status"] == "measured" and provider["time"]["forward"]["count"] == 1, (name, provider)
        # At the size that its process was warmed up with a call may find all of its memory there.
        assert 0 <= provider["memory"]["peak_bytes"] < 2**20 < provider["memory"]["interpreter_bytes"]
        assert 0 < provider["relative_error"] < 1e-2
    # One row is taken away, as if the run had been cut off in it: only that one is measured again.
    results["rows"][0]["complete"] = False
    path.write_text(json.dumps(results))
    assert smoke(path, *parts).returncode == 0
    again = json.loads(path.read_text())
    assert again["rows"][0]["complete"] and again["rows"][0]["date"] >= row["date"]
    assert again["rows"][1] == results["rows"][1]


def test_ending_the_measurement_ends_what_it_started(tmp_path):
    command = [sys.executable, "-m", "benchmarks.measure", "--smoke", "--json", str(tmp_path / "results.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        deadline = time.monotonic() + 60
        while not (started := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started, "nothing was started"
        parent.terminate()
        assert parent.wait(30) == 128 + signal.SIGTERM
        assert "ended; it had said:" in parent.stderr.read()
    while any(Path(f"/proc/{child}").exists() for child in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in started)


def test_a_measurement_leaves_no_signal_handler_behind(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        show = [sys.executable, "-c", "print(1)"]
        assert measure.ended_together(show).stdout == "1\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(measure.ended_together, show).result().stdout == "1\n"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_process_that_is_killed_costs_one_provider(tmp_path, monkeypatch):
    options = measure.options_for(None, tmp_path / "r.json", smoke=True)
    results = Results.open(options.json)
    row = results.row(ITERATION, SMALL, "float32")
    row["providers"] = {"published": {"status": "measured"}}
    row["running"] = "published"
    results.save()
    calls = []

    def killed_once(self, entries):
        calls.append([entry.name for entry in entries])
        return (-9 if len(calls) == 1 else 0), ""

    monkeypatch.setattr(measure.Run, "_pytest", killed_once)
    measure.Run(options, options.json).part("smoke", [plan.Entry("iteration", SMALL)])
    assert calls == [["iteration/N8-D16-L1/float32"]] * 2
    found = json.loads(options.json.read_text())["rows"][0]["providers"]["published"]
    assert found["status"] == "killed" and "exit code -9" in found["reason"]


def test_a_part_that_was_cut_off_is_not_done(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    finished = accuracy.entry
    calls = []

    def interrupted(operation, *arguments):
        calls.append(operation.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finished(operation, *arguments)

    monkeypatch.setattr(accuracy, "entry", interrupted)
    options = measure.options_for(None, path, smoke=True)
    command = ["--results", str(path), "--smoke", "--threads", "1"]
    with pytest.raises(KeyboardInterrupt):
        accuracy.main(command)
    written = Results.open(path)
    assert [one["operation"] for one in written.data["accuracy"]] == [calls[0]] * 2
    assert "accuracy: missing" in measure.listing(measure.parts_of(options), written)
    started = []
    monkeypatch.setattr(measure.Run, "_module", lambda self, module: started.append(module))
    measure.Run(options, path).part("accuracy", [])
    accuracy.main(command)
    assert "accuracy: done" in measure.listing(measure.parts_of(options), Results.open(path))
    measure.Run(options, path).part("accuracy", [])
    assert started == ["benchmarks.accuracy"]
    calls.clear()
    options.force = True
    measure.Run(options, path).part("accuracy", [])
    assert started == ["benchmarks.accuracy"] * 2 and not Results.open(path).data["accuracy"]
    with pytest.raises(KeyboardInterrupt):  # measured again, it is unfinished until its end
        accuracy.main(command)
    assert not Results.open(path).is_finished("accuracy")


def test_an_entry_that_fails_is_never_timed_and_fails_once(tmp_path, monkeypatch):
    session = preparation.Preparation(Results.open(tmp_path / "r.json"), "cpu", 1, float("inf"), 1e12, memory_too=False)
    calls = []

    def broken(*arguments, **options):
        calls.append(arguments)
        raise RuntimeError("no such op")

    monkeypatch.setattr(operations.Operation, "prepare", broken)
    cases = plan.cases_of([plan.Entry("iteration", SMALL, ("gcng",), rounds=2)])
    with pytest.raises(RuntimeError, match="no such op"):
        session.ready(cases[0])
    with pytest.raises(AssertionError, match="is not measured: RuntimeError: no such op"):
        session.ready(cases[1])
    assert len(calls) == 1 and not session.results.data["rows"][0]["complete"]


def test_a_results_file_belongs_to_one_machine(tmp_path):
    path = tmp_path / "r.json"
    results = Results.open(path)
    results.row(ITERATION, SMALL, "float32")
    results.save()
    assert setting_of(Results.open(path).data["rows"][0]) == SMALL
    results.data["machine"]["cpu"] = "Example (R) 9 Processor"
    results.save()
    with pytest.raises(ValueError, match="measured on another machine"):
        Results.open(path)
    results.data["format"] = 1
    results.save()
    with pytest.raises(ValueError, match="has format 1, expected 2"):
        Results.open(path)
    assert machine.file_name({"cpu": "Example (R) 9 Processor", "cores": 2}) == "example-9-2-cores.json"
    assert machine.file_name({"cpu": "x", "cores": 2, "gpu": "NVIDIA H200"}) == "nvidia-h200.json"


def test_a_source_without_git_has_an_unknown_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._source.__wrapped__() == {"commit": "unknown", "modified": None}
    monkeypatch.setattr(machine, "REVISION", tmp_path / "REVISION")
    machine.REVISION.write_text("0123456789abcdef\n")
    source = machine._source.__wrapped__()
    assert source == {"commit": "0123456789abcdef", "modified": None}
    stamped = {**source, "date": "2025-01-01T00:00:00+00:00"}
    results = {"machine": machine.machine(), "versions": machine.versions(), "protocol": {}}
    assert "commit 0123456789, changes unknown; 2025-01-01" in words.source_line("x.json", results, [stamped])


def test_results_of_a_gpu_go_on_beside_another_processor(tmp_path, monkeypatch):
    gpu, described = {"gpu": "NVIDIA X"}, machine.machine()
    monkeypatch.setattr(machine, "machine", lambda device: described | gpu)
    Results.open(tmp_path / "r.json", "cuda").save()
    monkeypatch.setattr(machine, "machine", lambda device: described | {"cpu": "another", "cores": 64} | gpu)
    assert Results.open(tmp_path / "r.json", "cuda").data["machine"]["cpu"] == described["cpu"]
    monkeypatch.setattr(machine, "machine", lambda device: described | {"gpu": "NVIDIA Y"})
    with pytest.raises(ValueError, match="gpu differ"):
        Results.open(tmp_path / "r.json", "cuda")


def test_a_process_whose_gpu_is_lost_ends_so_that_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    def fail():
        raise RuntimeError("an illegal memory access was encountered\nmore")

    assert machine.gpu_error() == ""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert machine.gpu_error() == ""
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert machine.gpu_error() == "an illegal memory access was encountered"
    monkeypatch.setattr("os._exit", leave)
    path = tmp_path / "r.json"
    session = Preparation(Results.open(path), "cpu", 2, float("inf"), 5e12)
    monkeypatch.setattr(session, "_start", lambda entry: fail())
    case = plan.cases_of([Entry("iteration", SMALL, ("gcng",))])[0]
    with pytest.raises(Ended, match="70"):
        session.ready(case)
    assert "the GPU is lost: an illegal memory access was encountered" in capsys.readouterr().err
    # In a timed call: the row is not complete, and says whom to blame.
    row = session.results.row(ITERATION, SMALL, "float32")
    row |= {"running": "gcng", "providers": {"gcng": {"status": "measured"}}, "complete": True}
    session.current = SimpleNamespace(entry=case.entry, row=row, ready={"gcng": SimpleNamespace(run=fail)}, ends=1e20)
    monkeypatch.setattr(session, "_yardstick", lambda: None)
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, **options: call())
    with pytest.raises(Ended, match="70"):
        preparation.check_and_time(benchmark, session, case)
    (row,) = json.loads(path.read_text())["rows"]
    assert row["running"] == "gcng" and not row["complete"]
    measure.blame(row, 70)
    assert row["providers"]["gcng"]["status"] == "killed" and "running" not in row


def test_a_row_whose_truth_ends_the_process_is_measured_by_nobody():
    row = {"running": "truth", "providers": {"gcng": {"status": "measured"}, "reference": {}}, "complete": False}
    measure.blame(row, 70)
    assert row["complete"] and {one["status"] for one in row["providers"].values()} == {"unavailable"}
    assert row["providers"]["gcng"]["reason"] == "no truth: the process was killed (exit code 70)"


@pytest.mark.parametrize(
    ("samples", "source"), [(2048, "gcng-no-extension in float32"), (4096, "gcng in tf32")], ids=str
)
def test_a_large_row_of_a_gpu_is_held_to_what_takes_no_minutes(samples, source, tmp_path, monkeypatch):
    made = []

    def prepare(self, provider, setting, precision, device, *, rounded_to=None):
        made.append(f"{provider} in {precision}")
        if len(made) == 1 and samples == 4096:
            raise torch.OutOfMemoryError("too large")
        return SimpleNamespace(arrays=lambda: {"x": torch.ones(2)})

    session = Preparation(Results.open(tmp_path / "r.json"), "cuda", 2, float("inf"), 1e13)
    entry = Entry("iteration", Setting(1, 512, samples), ("gcng",), "bfloat16")
    session.current = SimpleNamespace(entry=entry, row={"providers": {}}, ready=True)
    monkeypatch.setattr(operations.Operation, "prepare", prepare)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40)
    if samples == 2048:
        assert session._truth(ITERATION, ["gcng"])[1] == source
        return
    with pytest.raises(RuntimeError, match=r"none of \['gcng'\] fits as truth"):
        session._truth(ITERATION, ["gcng"])
    assert session._truth(ITERATION, ["gcng"])[1] == source and made == [source] * 2


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_nothing_is_measured_from_a_source_that_no_commit_holds(tmp_path, monkeypatch, capsys):
    root, path = tmp_path / "source", tmp_path / "r.json"
    free = ("benchmarks/results/x.json", "benchmarks/notes.toml", "README.md")
    for name in ("gcng/op.py", "benchmarks/rates.py", *free):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "One")):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(machine, "ROOT", root)
    for name in free:
        (root / name).write_text("2\n")
    assert machine.changed_files() == []
    (root / "gcng" / "new.py").write_text("3\n")
    started = []
    monkeypatch.setattr(measure.Run, "_module", lambda self, module: started.append(module))
    command = ["--parts", "rates", "--json", str(path)]
    assert measure.main(command) == 2
    assert "differs from its commit in gcng/new.py; commit first" in capsys.readouterr().err
    assert not path.exists() and not started
    assert measure.main([*command, "--allow-modified"]) == 0 and started == ["benchmarks.rates"]
    assert machine._source.__wrapped__()["modified"] is True
