"""What a call costs beside its arithmetic: every way computes the same, and nothing that it starts is left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import compiled_iteration, machine, overhead
from benchmarks.iteration import make_batch, make_provider, run_iteration
from benchmarks.results import Results
from benchmarks.settings import Setting

CPU, TINY = torch.device("cpu"), Setting(1, 8, 8)
CASES = overhead.cases(TINY, CPU)
ALONE = {"implementation alone", "registered op", "torch.compile"}


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for one in value for x in flat(one)] if isinstance(value, (list, tuple)) else []


def test_the_ways_are_with_and_without_gradients():
    assert {"messages", "edges", "edge_moments", "synthesize_negatives"} < set(CASES)
    for name, case in CASES.items():
        expected = ALONE | ({"public function"} if case.public else set())
        expected |= {way + overhead.BOTH for way in expected} if case.leaves else set()
        assert set(overhead.ways(case, CPU)) == expected, name
        more = {"CUDA graph", "CUDA graph" + overhead.BOTH} if case.leaves else {"CUDA graph"}
        assert set(overhead.ways(case, torch.device("cuda"))) == expected | more, name
    assert [name for name, case in CASES.items() if not case.leaves] == ["knn"]


@pytest.mark.parametrize("name", CASES)
def test_every_way_computes_the_same(name):
    case = CASES[name]
    with torch.no_grad():
        alone, registered = case.implementation(False)(), case.registered()
        assert len(alone) == 1 and not any(x.requires_grad for x in flat(alone))
        for ours, theirs in zip(flat(alone), flat(registered), strict=True):
            assert torch.equal(ours, theirs)
        if case.public:
            assert torch.equal(overhead._first(case.public()), overhead._first(registered))
        if not case.leaves:
            return
        calls = []
        for make in (lambda: case.implementation(True), lambda: case.with_gradients(case.registered)):
            torch.manual_seed(0)  # of the gradient that the backward starts from
            calls.append(make())
        forward, backward = calls[0]()
        gradients = calls[1]()
    assert torch.equal(overhead._first(forward), overhead._first(registered))
    for gradient in gradients:
        assert any(gradient.shape == one.shape and torch.equal(gradient, one) for one in flat(backward))
        assert bool((gradient != 0).any())


def test_an_implementation_is_found_by_the_name_of_its_op():
    assert overhead.implementation("knn").__module__ == "gcng.ops.retrieval"
    with pytest.raises(LookupError, match="gcng::nothing has 0 functions named _nothing in gcng.ops, expected 1"):
        overhead.implementation("nothing")


def test_a_row_for_every_way_and_a_reason_where_one_fails(monkeypatch):
    def refuse(call):
        raise NotImplementedError("no compiler\nhere")

    monkeypatch.setattr(overhead, "compiled", refuse)
    rows = overhead.measure_ops(CPU, TINY, calls=1, batches=2, wanted=lambda op, way: op == "center_normalize")
    assert [row["way"] for row in rows] == [*overhead.ways(CASES["center_normalize"], CPU)]
    for row in rows:
        compiled = row["way"].startswith("torch.compile")
        assert row.get("reason") == ("NotImplementedError: no compiler" if compiled else None), row
        assert compiled or row["count"] == 2 and 0 < row["min"] <= row["median"] <= row["max"]


def test_what_comes_too_late_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(overhead, "_timed", lambda *_: pytest.fail("timed after the deadline"))
    rows = overhead.measure_ops(CPU, TINY, 1, 1, wanted=lambda op, way: op == "knn", deadline=0.0)
    assert rows and {row["reason"] for row in rows} == {"no time left"}
    assert overhead.compiled_row(CPU, TINY, late=True)["reason"] == "no time left"


def test_all_ops_are_called_as_they_are_before_any_is_captured_or_compiled(tmp_path, monkeypatch):
    asked = []

    def measured(device, *sizes, wanted, deadline):
        found = [(name, way) for name, case in CASES.items() for way in overhead.ways(case, torch.device("cuda"))]
        asked.append([way for name, way in found if wanted(name, way)])
        return [{"operation": name, "setting": "x", "way": way} for name, way in found if wanted(name, way)]

    monkeypatch.setattr(overhead, "measure_ops", measured)
    monkeypatch.setattr(overhead, "measure_iteration", lambda device, limit: asked.append("iteration") or [])
    monkeypatch.setattr(overhead, "compiled_row", lambda device, late: {"operation": "iteration", "late": late})
    path = tmp_path / "r.json"
    assert overhead.main(["--results", str(path)]) == 0
    plain, iteration, graphs, compiled = asked
    assert iteration == "iteration" and {way.partition(",")[0] for way in graphs} == {"CUDA graph"}
    assert {way.partition(",")[0] for way in compiled} == {"torch.compile"}
    everything = [way for case in CASES.values() for way in overhead.ways(case, torch.device("cuda"))]
    assert sorted(plain + graphs + compiled) == sorted(everything)
    results = Results.open(path)
    assert len(results.data["overhead"]) == len(everything) + 1 and results.is_finished("overhead")


def test_a_run_without_time_is_not_finished_and_the_next_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_source", lambda: {"commit": "c" * 40, "modified": False})
    timed = []
    monkeypatch.setattr(overhead, "seconds_of", lambda call, *_: timed.append(1) or {"median": 1.0, "count": 1})
    monkeypatch.setattr(overhead, "measure_iteration", lambda device, limit: [])
    whole = {"operation": "iteration", "way": "torch.compile"}
    monkeypatch.setattr(overhead, "compiled_row", lambda device, late: whole)
    monkeypatch.setattr(overhead, "cases", lambda setting, device: {"knn": CASES["knn"]})
    monkeypatch.setattr(overhead, "compiled", lambda call: call)
    path = tmp_path / "r.json"
    assert overhead.main(["--results", str(path), "--deadline", "0"]) == 0
    ways = [row["way"] for row in Results.open(path).data["overhead"] if row["operation"] == "knn"]
    assert not timed and not Results.open(path).is_finished("overhead")
    assert overhead.main(["--results", str(path)]) == 0
    rows = Results.open(path).data["overhead"]
    assert len(timed) == len(ways) and Results.open(path).is_finished("overhead")
    assert all("reason" not in row for row in rows) and [row["way"] for row in rows[1:]] == ways
    assert overhead.main(["--results", str(path)]) == 0
    assert len(timed) == len(ways) and Results.open(path).data["overhead"][0]["way"] == "torch.compile"


def test_long_calls_are_timed_less_often(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))
    calls = []
    found = overhead.seconds_of(lambda: calls.append(None), CPU, calls=50, batches=3)
    assert len(calls) == 3 + 1 + 3 and found["median"] == 1 and found["count"] == 3


def test_compiling_starts_no_worker_process(monkeypatch):
    import torch._inductor.config
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    monkeypatch.setattr(torch._inductor.config, "compile_threads", 2)
    overhead.compiled(lambda: None)
    assert get_compile_threads() == 1 and not AsyncCompile.use_process_pool()


def test_an_iteration_that_compiles_for_too_long_is_a_row_and_leaves_no_process(monkeypatch):
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self.pid)

    monkeypatch.setattr(compiled_iteration.subprocess, "Popen", Watched)
    (row,) = overhead.measure_iteration(CPU, Setting(1, 16, 8), calls=1, limit=1)[1:]
    assert row["way"] == "torch.compile" and row["reason"] == "not compiled after 1 s"
    sessions = [path.read_text().rpartition(")")[2].split()[3] for path in Path("/proc").glob("[0-9]*/stat")]
    assert len(started) == 1 and str(started[0]) not in sessions


def test_a_compiled_iteration_is_timed_and_compared(monkeypatch):
    given = {"setting": Setting(1, 16, 8).as_dict(), "device": "cpu", "threads": 1, "calls": 1, "limit": 60}
    compiled = []
    monkeypatch.setattr(compiled_iteration.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(compiled_iteration.torch, "compile", lambda call, **options: compiled.append(call) or call)
    found = compiled_iteration.main(given)
    assert found["count"] == 3 and found["median"] > 0
    assert [call.__name__ for call in compiled] == list(compiled_iteration.LOSSES)
    monkeypatch.setattr(
        compiled_iteration.torch, "compile", lambda call, **options: lambda *a, **k: call(*a, **k) * 1.1
    )
    monkeypatch.setattr(compiled_iteration, "LOSSES", ("classifier_loss",))
    with pytest.raises(AssertionError, match="not close"):
        compiled_iteration.main(given)


def test_an_iteration_with_its_classes_known_is_the_same():
    setting = Setting(1, 16, 8)
    provider, batch = make_provider("gcng", setting), make_batch(setting)
    plain = run_iteration(provider, batch).losses
    known = overhead.capturable(provider, batch)().losses
    assert all(torch.equal(plain[name], loss) for name, loss in known.items())
