"""`gcng bench` with a results file: what of an earlier run it keeps, and that it says so."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from benchmarks import bench_attention, machine, measure, plan
from benchmarks.results import Results
from gcng.cli import main

HERE = {"commit": "c" * 40, "modified": False}
OTHER = plan.Setting(1, 64, 40)  # of a row that `--smoke` does not ask for
ATTENTION = "attention/N8-D16-L1/float32"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A results file with rates and rows, how it is written, and the command, which says what it would measure."""
    path = tmp_path / "mine.json"
    (entry,) = [e for entries in plan.smoke_plan().values() for e in entries if e.operation == "attention"]
    asked = []

    def write(source):
        path.unlink(missing_ok=True)
        results = Results.open(path)
        for setting in (entry.setting, OTHER):
            row = results.row(bench_attention.OPERATION, setting, "float32")
            row |= source | {"complete": True, "date": "2025-01-01T00:00:00+00:00"}
        results.data["rates"] = {"gemm": {}, "copy": {"bytes": 1.0, "bytes_moved": 2}, **source}
        results.finish("rates")

    def run(*options):
        assert main(["bench", "attention", "--smoke", "--json", str(path), *options]) == 0
        return asked

    def measured(options, announce):
        results = Results.open(options.json)
        parts = measure.chosen(measure.parts_of(options), options.parts)
        entries = [entry for entries in parts.values() for entry in entries]
        asked[:] = [entry.name for entry in measure.unfinished(entries, results, options.force)]
        asked.extend(name for name in parts if name in measure.ALL_MODULES and not results.is_finished(name))
        return 0

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(machine, "revision", lambda: HERE)
    return path, write, run


def test_what_this_commit_gave_is_kept_and_counted(file, capsys):
    path, write, run = file
    write(HERE)
    before = path.read_text()
    assert run() == [] and path.read_text() == before
    assert "1 row, rates of mine.json kept, of this commit; --force measures again\n" in capsys.readouterr().err
    assert run("--force") == [ATTENTION]
    assert "kept" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"commit": "d" * 40, "modified": False}, HERE),
        ({**HERE, "modified": True}, HERE),
        (HERE, {**HERE, "modified": True}),
        ({"commit": "unknown", "modified": False}, {"commit": "unknown", "modified": False}),
        ({**HERE, "modified": None}, {**HERE, "modified": None}),  # a copy without its repository
    ],
)
def test_what_another_source_gave_is_measured_again(file, capsys, monkeypatch, then, now):
    path, write, run = file
    monkeypatch.setattr(machine, "revision", lambda: now)
    write(then)
    assert run() == [ATTENTION, "rates"]
    expected = "0 rows of mine.json kept; 1 row, rates of another commit or of changed files measured again\n"
    assert expected in capsys.readouterr().err
    names = [row["name"] for row in json.loads(path.read_text())["rows"]]
    assert names == ["attention/N40-D64-L1/float32"], "what is not asked for stays"


def test_a_file_is_compared_as_it_was_before(file, capsys, monkeypatch):
    path, write, run = file
    write(HERE)
    results = json.loads(path.read_text())
    time = {"median": 1.0, "min": 1.0, "max": 1.0, "count": 1, "rounds": [1.0]}
    results["rows"][0]["providers"] = {"gcng": {"status": "measured", "time": {"forward": time}}}
    path.write_text(json.dumps(results))

    def slower(options, announce):
        found = json.loads(path.read_text())
        found["rows"][0]["providers"]["gcng"]["time"]["forward"] = dict.fromkeys(time, 9.0) | {"rounds": [9.0]}
        path.write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(measure, "measure", slower)
    assert main(["bench", "attention", "--smoke", "--json", str(path), "--compare", str(path)]) == 1
    assert "1 changed beyond the spread" in capsys.readouterr().out
