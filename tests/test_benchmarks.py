"""The benchmark harness at tiny sizes: its gate, its plan, its tables. Nothing here depends on a timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, measure, memory, plan, preparation, tables
from benchmarks.gate import assert_providers_close, float64_truth
from benchmarks.iteration import make_batch, make_provider, make_weights, official_name, run_iteration
from benchmarks.settings import (
    GEMM_ROWS,
    MEMORY_PROVIDERS,
    Setting,
    all_settings,
    shipped_settings,
    units_per_pair,
)
from tests.closeness import ClosenessError

ROOT = Path(__file__).resolve().parents[1]
SMALL = Setting(1, 16, 8)


def test_operation_counts_per_pair():
    layers = range(1, 4)
    assert [units_per_pair("published", L) for L in layers] == [336 * L - 96 for L in layers]
    assert [units_per_pair("reference", L) for L in layers] == [240 * L - 64 for L in layers]
    assert [units_per_pair("useful", L) for L in layers] == [108 * L - 26 for L in layers]
    assert Setting(1, 512, 160).useful_flops() == 82 * 512**2 * 160 * 161 / 2


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
    quadratic = (
        2 * executed[1] - executed[0]
    )  # node maps grow with N: their share halves from one size to the next
    units = units_per_pair("published", layers) / 2 * D**2
    classifier = 6 * D * SMALL.training_classes / 2  # (24) over N M rows, forward and two gradients
    n_pair = 6 * D / 4  # (19) over M^2 logits
    assert quadratic == pytest.approx(units + classifier + n_pair, rel=1e-12)


def test_every_weight_has_its_name_in_a_checkpoint():
    names = [official_name(name) for name in make_weights(Setting(2, 16, 8))]
    assert len(set(names)) == len(names)
    assert official_name("edge1.ffln.b") == "gnn.gnn.1.edge_model.linear.2.bias"
    assert official_name("node0.e2n.w") == "gnn.gnn.0.node_model.layers.0.edge_to_node.weight"
    assert official_name("bn_edge.w") == "gnn.bottleneck1.0.weight"


def test_settings_name_a_batch_that_exists():
    assert [s.samples for s in all_settings((8, 4), (16,), (1,))] == [4, 8]
    assert Setting(1, 16, 320).training_classes == 160 and SMALL.training_classes == 100
    assert len(shipped_settings()) == 13
    with pytest.raises(ValueError, match="samples is 7, not a multiple of samples_per_class 2"):
        Setting(1, 16, 7)
    with pytest.raises(ValueError, match="name is 'dense'"):
        make_provider("dense", SMALL)


def test_releasing_the_first_graph_changes_no_number():
    outcomes = [
        run_iteration(make_provider(name, SMALL), make_batch(SMALL), keep_gradients=True)
        for name in ("published", "published-freed")
    ]
    assert outcomes[0].gradients.keys() == outcomes[1].gradients.keys()
    assert all(torch.equal(outcomes[0].gradients[key], value) for key, value in outcomes[1].gradients.items())
    assert all(torch.equal(outcomes[0].losses[key], value) for key, value in outcomes[1].losses.items())


def small_outcome():
    return run_iteration(make_provider("published", SMALL), make_batch(SMALL), keep_gradients=True)


def test_the_gate_accepts_plain_torch():
    outcomes = {"published": small_outcome(), "again": small_outcome()}
    worst = assert_providers_close(outcomes, float64_truth(SMALL, "published"))
    assert worst["published"] == worst["again"] < 1e-3


@pytest.mark.parametrize(
    "key", ["metric/z", "generator/edge0.ff2.w", "classifier/scls.b", "generator/bn_edge.w"]
)
def test_the_gate_refuses_a_wrong_gradient(key):
    outcomes = {"published": small_outcome(), "wrong": small_outcome()}
    outcomes["wrong"].gradients[key] *= 1.002
    with pytest.raises(ClosenessError, match=f"wrong gradient {key}"):
        assert_providers_close(outcomes, float64_truth(SMALL, "published"))


def test_the_gate_refuses_a_wrong_loss_and_a_missing_gradient():
    truth = float64_truth(SMALL, "published")
    outcomes = {"published": small_outcome(), "wrong": small_outcome()}
    outcomes["wrong"].losses["diversity"] += 1e-4
    with pytest.raises(ClosenessError, match="wrong loss spread"):
        assert_providers_close(outcomes, truth)
    outcomes["wrong"] = small_outcome()
    del outcomes["wrong"].gradients["generator/gate.w"]
    with pytest.raises(AssertionError, match=r"wrong has no \['gradient generator/gate.w'\]"):
        assert_providers_close(outcomes, truth)


def test_memory_is_predicted_from_the_largest_smaller_size():
    measured = {Setting(1, 16, 8): 100, Setting(1, 16, 16): 300, Setting(2, 16, 16): 7, Setting(1, 16, 64): 1}
    assert memory.predicted_bytes(Setting(1, 16, 32), measured) == 1200
    assert memory.predicted_bytes(Setting(1, 16, 8), measured) is None


def test_rows_that_cannot_fit_are_recorded_and_not_run(monkeypatch):
    def never(provider, setting, threads):
        assert setting.samples == 8, "only the small setting may run"
        return {"status": "measured", "peak_bytes": 1000}

    monkeypatch.setattr(memory, "measure_in_subprocess", never)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3000)
    settings = all_settings((8, 16), (16,), (1,))
    peaks = measure.measure_memory(settings, ("published",), threads=1)
    assert peaks["published"][settings[1]]["status"] == "out of memory"
    assert peaks["published"][settings[1]]["predicted_bytes"] == 4000
    planned = plan.load_plan(measure.timing_plan(settings, peaks, ("published",), repeats=2))
    assert [case.identifier() for case in planned] == [
        f"N8-D16-L1-{name}-{turn}" for turn in (0, 1) for name in ("published", "gemm")
    ]
    assert {case.truth for case in planned} == {"published"}


def test_a_child_process_that_is_killed_is_a_row_and_one_that_fails_is_an_error(monkeypatch):
    codes = iter([-9, 1])

    def run(command, **options):
        return subprocess.CompletedProcess(command, next(codes), "", "no such thing")

    monkeypatch.setattr(memory.subprocess, "run", run)
    assert memory.measure_in_subprocess("published", SMALL, 1) == {"status": "killed"}
    with pytest.raises(RuntimeError, match="exit code 1:\nno such thing"):
        memory.measure_in_subprocess("published", SMALL, 1)


def example_results():
    def provider(seconds, peak):
        spread = {"median": seconds, "min": seconds, "max": 2 * seconds, "count": 3}
        row = {"status": "measured", "peak_bytes": peak, "predicted_bytes": None}
        return {"time": spread, "relative_error": 1e-5, "memory": row}

    missing = {"memory": {"status": "out of memory", "predicted_bytes": 31_000_000_000, "available_bytes": 9}}
    rows = []
    for setting, published in (
        (Setting(1, 512, 160), provider(9.0, 5_000_000_000)),
        (Setting(1, 512, 320), missing),
    ):
        row = measure._setting_row(setting)
        row["providers"] = {
            "published": published,
            "reference": provider(6.0, 4_000_000_000),
            "blocked": provider(2.0, 250_000_000),
        }
        row["gemm"] = {"shape": [GEMM_ROWS, 512, 2048], "flops": 2e11}
        rows.append(row)
    described = {"cpu": "Example (R) 9 Processor", "cores": 2, "memory_bytes": 24 * 2**30}
    versions, protocol = {"torch": "2", "gcng": "0"}, {"threads": 2, "dtype": "float32", "dropout": 0.0}
    stamp = {"commit": "0123456789abcdef", "date": "2025-01-01T00:00:00+00:00"}
    return {"machine": described, "versions": versions, "protocol": protocol, **stamp, "rows": rows}


def test_the_summary_shows_times_ratios_and_what_did_not_fit():
    lines = tables.summary(example_results()).splitlines()
    share = 82 * 512**2 * 160 * 161 / 2 / 2.0 / 2e11
    assert lines[-2] == (
        "| 160 | 512 | 1 | 9 s / 5.0 GB | 6 s / 4.0 GB | 2 s / 250 MB | 4.5x | 3.0x | 5.0 % "
        f"| {100 * share:.0f} % |"
    )
    assert (
        "| out of memory (31.0 GB predicted) | 6 s / 4.0 GB | 2 s / 250 MB | - | 3.0x | 0.8 % |" in lines[-1]
    )
    assert "Example (R) 9 Processor, 2 cores, 24 GiB; torch 2, gcng 0 at 0123456789" in lines[0]
    assert machine.file_name(example_results()["machine"]) == "example-9-2-cores.json"


def test_the_details_show_every_provider():
    text = tables.details(example_results())
    assert "| 160, 512, 1 | published formulation | 9 | 9 | 18 | 3 | 90 | 1.0e-05 | 5000 | - |" in text
    assert "| 320, 512, 1 | published formulation | - | - | - | - | - | - | out of memory | 31000 |" in text
    assert "Yardstick (1024 x 512) @ (512 x 2048): 200 to 200 GFLOP/s" in text


def test_tables_are_written_between_the_markers_and_checked(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    results = tmp_path / "results"
    results.mkdir()
    (results / "example.json").write_text(json.dumps(example_results()))
    for name in tables.TARGETS:
        (tmp_path / name).write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    options = ["--root", str(tmp_path), "--results", str(results)]
    assert tables.main([*options, "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().err
    assert tables.main(options) == 0
    assert tables.main([*options, "--check"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="README.md must hold"):
        tables.main(options)


def test_the_shipped_tables_are_what_the_results_say():
    assert tables.load_results(), "benchmarks/results holds no results file"
    assert tables.main(["--check"]) == 0


def test_smoke_run_measures_every_provider(tmp_path):
    output = tmp_path / "smoke.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure",
        "--smoke",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (row,) = results["rows"]
    assert set(row["providers"]) == set(MEMORY_PROVIDERS)
    for name, provider in row["providers"].items():
        assert provider["memory"]["status"] == "measured"
        assert ("time" in provider) == (name != "published-freed")
    assert row["gemm"]["flops"] > 0
    assert results["protocol"]["dropout"] == 0 and results["machine"]["cores"] >= 1
    assert tables.summary(results) and tables.details(results)


def test_a_setting_that_fails_the_gate_is_never_timed(monkeypatch):
    calls = []

    def refuse(outcomes, truth):
        calls.append(sorted(outcomes))
        raise ClosenessError("published loss n_pair: not close")

    monkeypatch.setattr(preparation, "assert_providers_close", refuse)
    prepared = preparation.Preparation()
    (first, _, second, _) = plan.cases_of(SMALL, ["published"], "published", repeats=2)
    for case in (first, second):
        with pytest.raises(AssertionError, match="n_pair: not close"):
            prepared.ready(case)
    assert calls == [["published"]]
