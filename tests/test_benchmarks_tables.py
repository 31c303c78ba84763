"""What is made from a results file: tables, figures, exponents, targets, comparisons, and `gcng bench`."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, details, notes, operations, plots, scaling, summaries, tables, targets
from benchmarks.results import LISTS, Results, row_name, spread, work_of
from benchmarks.settings import Setting
from benchmarks.words import bytes_words, seconds_words
from gcng.cli import main

ROOT = Path(__file__).resolve().parents[1]
STAMP = {"commit": "0123456789abcdef", "modified": False, "date": "2025-01-01T00:00:00+00:00", "extension": "none"}
MISSING = {"status": "out of memory", "reason": "predicted not to fit", "memory": {"predicted_bytes": 31_000_000_000}}


def measured(seconds, peak, *, passes=("forward",), error=1e-5):
    time = {name: spread([seconds, seconds, 2 * seconds]) for name in passes}
    return {"status": "measured", "time": time, "relative_error": error, "memory": {"peak_bytes": peak}}


def row(name, setting, providers, precision="float32"):
    operation = operations.load(name)
    sizes = {"batch_classes": setting.batch_classes, "training_classes": setting.training_classes}
    return {
        "name": row_name(name, setting, precision), "operation": name, "precision": precision,
        "setting": {**setting.as_dict(), **sizes}, "work": work_of(operation, setting, precision),
        "providers": providers, "complete": True, "gemm": {"shape": [1024, 512, 2048], "flops": 2e11}, **STAMP,
    }  # fmt: skip


@pytest.fixture
def results():
    """A file whose times grow with N² D² and whose dense memory with N² D."""
    rows = []
    for n in (80, 160, 320):
        providers = {
            "published": measured(9e-4 * n, 20_000 * n * n) if n < 320 else MISSING,
            "reference": measured(6e-4 * n, 16_000 * n * n),
            "gcng": measured(2.0 * (n / 160) ** 2, 2_000_000 * n),
        }
        rows.append(row("iteration", Setting(1, 512, n), providers))
    both = ("forward", "backward", "both")
    peers = {
        "reference": measured(0.5, 10**8, passes=both), "gcng": measured(0.002, 10**6, passes=both),
        "scaled_dot_product_attention": measured(0.003, 10**7, passes=both), "flex_attention": measured(1e-4, 10**6),
    }  # fmt: skip
    rows.append(row("attention", Setting(1, 512, 160), peers))
    stage = {"seconds": 1.5, "calls": 2, "flops": 1e11, "bytes": 1e9}
    rest = {"seconds": 0.5, "flops": 0.0, "bytes": 0.0}
    one = {
        "setting": Setting(1, 512, 160).as_dict(),
        "name": "N160-D512-L1",
        "provider": "gcng",
        "precision": "float32",
    }
    gemm = {"float32": {"512": {"shape": [1024, 512, 2048], "flops": 2e11}}}
    errors = {"output": 2e-7, "grad q": 5e-7}
    found = {name: {"worst": 5e-7, "array": "grad q", "errors": errors} for name in ("reference", "gcng")}
    ways = {"way": "torch.compile", "reason": "RuntimeError: no"}, {"way": "public function", **spread([2e-5, 3e-5])}
    return {
        "format": 2,
        "machine": {"cpu": "Example (R) 9 Processor", "cores": 2, "memory_bytes": 24 * 2**30, "system": "Linux"},
        "versions": {"torch": "2", "gcng": "0"},
        "protocol": {"threads": 2, "device": "cpu"},
        "rates": {"gemm": gemm, "copy": {"bytes_moved": 2**29, "bytes": 1e10}},
        "rows": rows,
        "stages": [{**one, "seconds": 2.0, "stages": {"edges": stage, "torch outside of gcng's ops": rest}}],
        "accuracy": [{"operation": "attention", "setting": "N80", "precision": "float32", "providers": found}],
        "overhead": [{"operation": "knn", "setting": "N80-D64-L1", **way} for way in ways],
        "bandwidth": [],
        "checks": [],
    }


def test_numbers_are_printed_with_units():
    assert [seconds_words(s) for s in (7.338, 0.1923, 0.002, 2e-5, 123.4)] == [
        "7.34 s",
        "192 ms",
        "2 ms",
        "20 µs",
        "123 s",
    ]
    assert [bytes_words(b) for b in (3.5e9, 339e6, 31e9, 4096)] == ["3.5 GB", "339 MB", "31.0 GB", "4 kB"]


def test_the_readme_shows_times_ratios_and_what_did_not_fit(results):
    text = summaries.readme([("example.json", results)])
    lines = text.splitlines()
    share = results["rows"][1]["work"]["forward"]["flops"] / 2.0 / 2e11
    cells = ["1", "160", "512", "144 ms / 512 MB", "96 ms / 410 MB", "2 s / 320 MB", "0.1x", "0.0x", "62.5 %"]
    assert f"| {' | '.join([*cells, f'{100 * share:.0f} %'])} |" in lines
    assert any(
        "| out of memory (31.0 GB predicted) | 192 ms / 1.6 GB | 8 s / 640 MB | - | 0.0x | 2.1 % |" in x for x in lines
    )
    assert "Example (R) 9 Processor, 2 cores, 24 GiB; 2 threads; torch 2, gcng 0; commit 0123456789" in text
    assert text.count("`benchmarks/results/example.json`") == 1 and text.count("\n| ---:") == 2


def test_the_readme_has_two_tables_and_two_figures_however_many_machines_there_are(results):
    other, gpus = copy.deepcopy(results), [copy.deepcopy(results) for _ in range(2)]
    other["rows"] = other["rows"][:1]
    for number, gpu in enumerate(gpus):
        gpu["machine"] |= {"gpu": f"Example {number}", "gpu_memory_bytes": 2**37}
    files = [("a.json", other), ("example.json", results), ("gpu-0.json", gpus[0]), ("gpu-1.json", gpus[1])]
    text = summaries.readme(files)
    assert text.count("\n| ---:") == 2 and text.count("![") <= 2
    assert "`benchmarks/results/example.json`" in text and "a.json" not in text and "gpu-1.json" not in text
    documented = details.documentation(files)
    assert all(f"### {name}" in documented for name, _ in files)
    assert documented.count("#### Targets") == len(files)


def test_the_source_of_a_table_says_that_the_machine_was_busy(results):
    (line,) = [x for x in summaries.readme([("example.json", results)]).splitlines() if x.startswith("One iteration")]
    assert "load average" not in line
    results["rows"][0] |= {"load_average": 0.4, "modified": True}
    results["rows"][1]["load_average"] = 1.84
    (line,) = [x for x in summaries.readme([("example.json", results)]).splitlines() if x.startswith("One iteration")]
    assert "commit 0123456789, 0123456789 with changes" in line
    assert "; load average up to 1.8 before a row, earlier rows included; `benchmarks" in line


def test_gpu_cells_say_that_nothing_was_measured():
    cells = list(targets.readings(None))
    assert len(cells) == len(targets.TARGETS) == 13
    assert all(measured == "not measured" and reached == "-" for _, _, measured, reached in cells)
    assert "No GPU has a results file yet." in summaries.readme([])


def test_targets_are_read_from_a_gpu_file(results):
    results["machine"] |= {"gpu": "NVIDIA H200", "gpu_memory_bytes": 141 * 2**30}
    times = {80: 5e-3, 1024: 0.07, 2048: 0.2, 4096: 0.8, 8192: 3.4}
    results["rows"] = [
        row("iteration", Setting(1, 512, n), {"gcng": measured(t, 10**9)}, "bfloat16") for n, t in times.items()
    ]
    results["rows"][3]["providers"]["gcng-recompute"] = measured(0.9, 5 * 10**9)
    for precision, seconds in (("tf32", 0.04), ("float32", 0.1)):
        dense = {"reference": measured(seconds, 10**11)}
        results["rows"].append(row("iteration", Setting(1, 512, 80), dense, precision))
    entropy = {"gcng": measured(0.01, 1), "chunked torch": measured(0.02, 1), "liger": measured(0.009, 1)}
    results["rows"].append(row("class_cross_entropy", Setting(1, 512, 32_768, classes=131_072), entropy, "bfloat16"))
    results["stages"] = [{"provider": "gcng", "generator": {"executed_share": 0.61, "useful_share": 0.4}}]
    results["overhead"] = [{"operation": "iteration", "way": "CUDA graph", "median": 0.004}]
    found = [(measured, reached) for _, _, measured, reached in targets.readings(results)]
    assert found == [
        ("70 ms", "no"), ("800 ms", "yes"), ("+6 %", "yes"), ("61 % (40 % without recompute)", "yes"),
        ("not measured", "-"), ("5.0 GB", "yes"), ("not measured", "-"),
        ("8.0x than tf32, 1/100 of its memory (N = 80); 20.0x than float32, 1/100 of its memory (N = 80)", "yes"),
        ("5 ms", "yes"), ("4 ms", "yes"), ("10 ms; liger 9 ms", "no"), ("not measured", "-"), ("not measured", "-"),
    ]  # fmt: skip
    assert "NVIDIA H200, 141 GiB" in summaries.readme([("nvidia-h200.json", results)])
    # The share is of the fastest product of the card, where a tile's product is slower; and peers have to be there.
    results["stages"][0]["generator"]["gemm_flops"] = 3e14
    results["rates"] = {"gemm": {"bfloat16": {"square": {"flops": 6e14}}}}
    assert targets._share(results) == ("30 % (20 % without recompute)", False)
    results["rates"]["gemm"]["bfloat16"]["square"]["flops"] = 2e14
    assert targets._share(results) == ("61 % (40 % without recompute)", True)
    del entropy["liger"]
    assert targets._cross_entropy(results) == ("10 ms; chunked torch 20 ms; no peer installed", True)


def form_of_the_synthesis(name, gates, forward, backward):
    """An entry whose copy rate is 1e12 and whose gates take 1e9 bytes: 1 ms is the whole rate of a forward."""
    passes = {
        "geometry": spread([1e-5]),
        "forward": {**spread([forward, 1.1 * forward]), "bytes": 1e9, "gate_bytes": 1e9},
        "backward": {**spread([backward, 1.1 * backward]), "bytes": 7e9, "gate_bytes": 5e9},
    }
    entry = {"form": name, "gates": gates, "setting": "N1024-D512-L1", "copy_bytes": 1e12, "relative_error": 3e-7}
    return {**entry, "passes": passes, **STAMP}


def test_both_forms_of_the_synthesis_are_read_as_shares_of_the_copy_rate(results):
    results["machine"] |= {"gpu": "NVIDIA H200", "gpu_memory_bytes": 141 * 2**30}
    forms = [form_of_the_synthesis("CUDA C++", "bfloat16", 1.1e-3, 10e-3)]
    forms.append(form_of_the_synthesis("Triton", "bfloat16", 2.2e-3, 9.9e-3))
    forms.append({"form": "Triton", "gates": "float32", "setting": "N8", "reason": "not close\ngrad z: off\nmore"})
    results["bandwidth"] = forms
    found = [(measured, reached) for *_, measured, reached in targets.readings(results, targets.TARGETS[-2:])]
    # Medians are 5 % above the least time: 1e9 / 1e12 / 1.155e-3.
    assert found == [
        ("CUDA C++ 87 %; Triton 43 %", "yes"),
        ("CUDA C++ 67 % (48 % by gates alone); Triton 67 % (48 % by gates alone)", "no"),
    ]
    words = "ahead, bfloat16 gates: forward: CUDA C++, by 2.00x; backward: no difference beyond the spread."
    assert words in summaries.readme([("nvidia-h200.json", results)])
    text = details.documentation([("nvidia-h200.json", results)])
    where = "| N1024-D512-L1 |"
    assert f"{where} CUDA C++ | bfloat16 | backward | 10.5 ms (10 ms to 11 ms) | 67 % | 48 % | 3.0e-07 |" in text
    assert f"{where} Triton | bfloat16 | geometry | 10 µs (10 µs to 10 µs) | - | - | 3.0e-07 |" in text
    assert "| N8 | Triton | float32 | no: not close grad z: off | - | - | - | - |" in text
    # The form that dispatch prefers has to reach a target, where there is one.
    results["bandwidth"] = forms[1:]
    assert [reached for *_, reached in targets.readings(results, targets.TARGETS[-2:])] == ["no", "no"]
    assert "ahead, CUDA C++ or Triton, is not measured" in targets.form_ahead(results)


def test_the_targets_of_a_cpu_are_read_from_its_rows_and_stages(results):
    assert [reached for *_, reached in targets.readings(results, targets.CPU_TARGETS)] == ["no"] * 3 + ["-"] * 4
    setting, base = Setting(1, 512, 160), {"name": "N160-D512-L1", "precision": "float32", "stages": {}, "seconds": 2.0}
    both = ("forward", "backward", "both")
    dense = {
        "published": measured(8.0, 3 * 10**9), "reference": measured(4.8, 10**9), "gcng": measured(2.0, 2 * 10**8),
    }  # fmt: skip
    forms = {"reference": measured(0.05, 10**8, passes=both), "gcng": measured(0.011, 10**7, passes=both)}
    results["rows"] = [
        row("iteration", setting, dense), row("synthesis", setting, forms),
        row("iteration", Setting(1, 128, 1024), {"gcng": measured(9.0, 650 * 10**6)}),
    ]  # fmt: skip
    times = {"gcng": {"products": 1.7, "rest": 0.4}, "gcng-no-extension": {"products": 1.7, "rest": 0.9}}
    results["stages"] = [
        {**base, "provider": name, "outside_products": one, "generator": {"useful_share": 0.72, "executed_share": 0.8}}
        for name, one in times.items()
    ]
    found = [(measured, reached) for *_, measured, reached in targets.readings(results, targets.CPU_TARGETS)]
    assert found == [
        ("4.0x", "yes"), ("2.4x", "no"), ("6.7 % (200 MB of 3.0 GB)", "yes"), ("72 %", "yes"),
        ("44 % (400 ms of 900 ms)", "yes"), ("4.5x", "no"), ("650 MB", "yes"),
    ]  # fmt: skip
    line = "| time outside of products, of that without the extension | at most 50 % | 44 % (400 ms of 900 ms) | yes |"
    text = summaries.cpu_targets(results)
    assert line in text.splitlines()
    assert summaries.readme([("example.json", results)]).count("\n| ---:") == 2, "the README has no room for it"


def test_the_documentation_shows_every_provider_and_list(results):
    text = details.documentation([("example.json", results)])
    assert (
        "| iteration N320-D512-L1 float32 | published formulation | out of memory (31.0 GB predicted): predicted not"
        in text
    )
    assert "| attention N160-D512-L1 float32 | gcng | 2 ms | 2 ms | 2 ms to 4 ms | 3 |" in text
    # FlexAttention has no backward on a CPU: no peer of forward and backward.
    assert "| attention | 160, 512 | 2 ms | - | 500 ms | - | scaled_dot_product_attention: 3 ms |" in text
    # 1e11 operations in 1.5 s under a product rate of 2e11; at 100 operations a byte that rate is the roof.
    assert "| edges | 1.5 s | 75 % | 66.7 | 33 % | 0.667 | 7 % | 33 % |" in text
    assert "| attention | N80 | float32 | gcng | grad q | 5.0e-07 | 5.0e-07 | 5.0e-07 (grad q) |" in text
    assert "| knn | N80-D64-L1 | torch.compile | no: RuntimeError: no |" in text
    assert "| float32 | 1024 x 512 x 2048 | 200 GFLOP/s |" in text


def test_the_roof_of_a_stage_is_made_of_the_rates_beside_it(results):
    results["stages"][0]["rates"] = {"gemm_flops": 1e11, "copy_bytes": 5e8}
    text = details.documentation([("example.json", results)])
    # At 100 operations a byte the copy rate is the roof now: 5e10 operations per second.
    assert "| edges | 1.5 s | 75 % | 66.7 | 67 % | 0.667 | 133 % | 133 % |" in text
    assert plots.roofline_data(results)["roofs"] == {"N160-D512-L1": [1e11, 5e8]}


def test_a_stage_below_half_of_its_roof_has_a_note_or_says_that_it_has_none(results, tmp_path):
    stages = results["stages"][0]["stages"]
    stages["edges"] |= {"seconds": 0.6}  # 83 % of the roof
    stages["messages"] = {"seconds": 1.5, "calls": 1, "flops": 1e11, "bytes": 1e9}
    stages["gates"] = {"seconds": 1.0, "calls": 1, "flops": 0.0, "bytes": 1e9}
    results["stages"].append({**results["stages"][0], "provider": "gcng-no-extension"})
    path = tmp_path / "notes.toml"
    path.write_text('[messages]\nwhy = "One reason."\nmoves = "More of it."\n[edges]\nwhy = "a"\nmoves = "b"\n')
    assert notes.lines(results, details.roof_share, notes.read(path)).splitlines()[2:] == [
        "- `messages` (33 % at N160-D512-L1): One reason. What would move it: more of it.",
        "- `gates` (10 % at N160-D512-L1): no note yet",
    ]
    assert "- `gates` (10 % at N160-D512-L1): no note yet" in details.documentation([("example.json", results)])
    path.write_text('[messages]\nwhy = "One reason."\n')
    with pytest.raises(ValueError, match=r"\[messages\] must hold why and moves"):
        notes.read(path)


def test_every_note_is_of_a_stage_that_exists():
    importlib.import_module("gcng.nn")  # registers the ops
    schemas = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gcng::")}
    assert set(notes.read()) <= schemas


def test_exponents_are_those_of_the_law_that_made_the_times(results):
    (over_n,) = scaling.scalings(results)
    assert (over_n.size, over_n.values) == ("N", (80, 160, 320))
    assert over_n.time.exponent == pytest.approx(2) and over_n.time.error == pytest.approx(0, abs=1e-9)
    assert over_n.memory.exponent == pytest.approx(1)
    assert over_n.model.exponent == pytest.approx(2, abs=0.02)
    exact = scaling.fit([1, 2, 4, 8], [3, 3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5 * 1.1])
    assert exact.exponent == pytest.approx(1.5, abs=0.05) and 0 < exact.error < 0.05
    with pytest.raises(ValueError, match="at least two different sizes"):
        scaling.fit([2], [1])


def test_every_size_is_fitted_and_stands_beside_the_model(results):
    base = Setting(1, 64, 160)
    sweeps = {
        "D": [Setting(1, d, 160) for d in (64, 128, 256)],
        "L": [Setting(layers, 64, 160) for layers in (1, 2, 3)],
        "K": [Setting(1, 64, 160, samples_per_class=k) for k in (2, 4, 8)],
        "C": [base, *(Setting(1, 64, 160, classes=c) for c in (1000, 10_000))],
    }
    law = {"D": ("embedding_size", 1.8), "L": ("num_layers", 1.1), "K": ("samples_per_class", -0.1)}
    law["C"] = ("training_classes", 0.7)
    rows = {}
    for setting in (one for settings in sweeps.values() for one in settings):
        seconds = 1e-3
        for name, power in law.values():
            seconds *= getattr(setting, name) ** power
        rows[setting] = row("iteration", setting, {"gcng": measured(seconds, 10**6 * setting.num_layers)})
    results["rows"] = list(rows.values())
    found = {one.size: one for one in scaling.scalings(results)}
    assert set(found) == set(sweeps)
    for size, one in found.items():
        assert one.time.exponent == pytest.approx(law[size][1]) and one.time.error == pytest.approx(0, abs=1e-9)
        assert one.values == tuple(getattr(setting, law[size][0]) for setting in sweeps[size])
    assert found["L"].expected == (1, 1) and found["K"].expected == (0, 0)
    assert found["L"].model.exponent == pytest.approx(1.11, abs=0.05)
    text = details.documentation([("example.json", results)])
    assert "| gcng | L | N = 160, D = 64, K = 2 | 1 to 3 (3) | 1.10 ± 0.00 |" in text
    assert "| 1 | 1.00 ± 0.00 | 1 |" in text
    assert set(scaling.EXPECTED) < {*operations.OPERATIONS}


def test_a_comparison_names_what_changed_beyond_the_spread(results, tmp_path, capsys):
    after = copy.deepcopy(results)
    providers = after["rows"][1]["providers"]
    providers["gcng"] = measured(5.0, 2_000_000 * 160)  # was 2 to 4 s
    providers["reference"] = measured(0.1, 10**9)  # within the range of before, but more memory
    after["rows"][2]["providers"]["gcng"] = {"status": "refused", "reason": "not close"}
    told = {(c.row, c.provider, c.what): c.verdict for c in compare.changes(results, after) if c.verdict != "same"}
    assert told == {
        ("iteration/N160-D512-L1/float32", "gcng", "forward"): "slower",
        ("iteration/N160-D512-L1/float32", "reference", "memory"): "larger",
        ("iteration/N320-D512-L1/float32", "gcng", "status"): "changed",
    }
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, data in zip(paths, (results, after), strict=True):
        path.write_text(json.dumps(data))
    assert compare.main([str(path) for path in paths]) == 1
    assert "gcng forward: 2000 -> 5000 ms, x 2.50 (slower)" in capsys.readouterr().out
    assert compare.main([str(paths[0])] * 2) == 0
    assert "0 changed beyond the spread" in capsys.readouterr().out


def test_a_comparison_reports_what_the_second_file_lacks(results):
    after = copy.deepcopy(results)
    first, second = after["rows"][0]["providers"], after["rows"][1]["providers"]
    del first["reference"]  # a provider that is gone
    del second["gcng"]["time"]  # measured, but without a time
    del second["reference"]["memory"]
    del after["rows"][3]  # a row that is gone
    told = {(c.row[:14], c.provider, c.what): c.after for c in compare.changes(results, after) if c.verdict != "same"}
    assert told == {
        ("iteration/N80-", "reference", "status"): compare.GONE,
        ("iteration/N160", "gcng", "forward"): compare.GONE,
        ("iteration/N160", "reference", "memory"): compare.GONE,
    }
    text, worse = compare.report(results, after)
    assert worse and "gcng forward: timed -> not in the second file (changed)" in text
    assert "rows of the first file only: attention/N160-D512-L1/float32\n" in text
    assert compare.report(results, {**results, "rows": results["rows"][:1]})[1] is False
    assert "rows of the first file only" not in compare.report(after, results)[0]


def test_tables_are_written_between_the_markers_and_checked(results, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "example.json").write_text(json.dumps(results))
    for name in tables.TARGETS:
        (tmp_path / name).write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    options = ["--root", str(tmp_path), "--results", str(folder)]
    assert tables.main([*options, "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().err
    assert tables.main(options) == 0
    assert tables.main([*options, "--check"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="README.md must hold"):
        tables.main(options)


def test_figures_are_drawn_and_carry_what_they_show(results, tmp_path):
    folder, figures = tmp_path / "results", tmp_path / "figures"
    folder.mkdir()
    (folder / "example.json").write_text(json.dumps(results))
    options = ["--results", str(folder), "--figures", str(figures)]
    assert plots.main([*options, "--check"]) == 1
    assert plots.main(options) == 0
    assert sorted(path.name for path in figures.iterdir()) == [f"example-{kind}.png" for kind in sorted(plots.KINDS)]
    assert plots.main([*options, "--check"]) == 0
    results["rows"][0]["providers"]["gcng"]["memory"]["peak_bytes"] += 1
    assert plots.stale("example.json", results, figures) == ["wall"]
    (line,) = plots.wall_data(results)["widths"].values()
    assert line["published"]["wall"] == [[320, 31_000_000_000]]
    alone = json.loads(json.dumps(results["rows"][0]))
    alone["setting"]["embedding_size"] = 384
    results["rows"].append(alone)
    assert "384" not in plots.wall_data(results)["widths"]  # one size is no curve


def test_the_shipped_tables_and_figures_are_what_the_results_say():
    assert tables.load_all(), "benchmarks/results holds no results file"
    assert tables.main(["--check"]) == 0
    assert plots.main(["--check"]) == 0


def test_gcng_bench_prints_tables_and_compares(results, tmp_path, capsys, monkeypatch):
    from benchmarks import measure

    path = tmp_path / "r.json"
    seen = []

    def measured_quickly(options, announce):
        seen.append((options.parts, options.smoke))
        file = Results.open(options.json)
        file.data |= {name: results[name] for name in ("rows", "rates", *LISTS)}
        file.save()
        return 0

    monkeypatch.setattr(measure, "measure", measured_quickly)
    assert main(["bench", "attention", "--smoke", "--json", str(path)]) == 0
    assert seen == [(["rates", "attention/N8-D16-L1/float32"], True)]
    assert "#### Every row" in capsys.readouterr().out
    assert main(["bench", "attention", "--smoke", "--json", str(path), "--compare", str(path)]) == 0
    assert "0 changed beyond the spread" in capsys.readouterr().out
    assert main(["bench", "nothing"]) == 2
    assert "op is 'nothing'" in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "none.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_gcng_bench_says_how_to_install_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.measure", None)  # stands for a module that imports what is missing
    assert main(["bench"]) == 2
    assert f"benchmarks.measure is missing; pip install -e '.[bench]' in {ROOT}" in capsys.readouterr().err


def test_gcng_bench_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    import gcng

    monkeypatch.setattr(gcng, "__file__", str(tmp_path / "site" / "gcng" / "__init__.py"))
    assert main(["bench"]) == 2
    assert "the benchmarks are part of the source" in capsys.readouterr().err
