"""The demo end to end at a tiny size, and the parts of it that a reader relies on."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo import findings, probe, run, table, training, tune, worker
from demo.settings import METHODS, QUICK, QUICK_SEEDS, Settings
from gcng.data import GlyphDataset

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {"loss_terms", "neighbors", "confusable_pairs", "hardness", "diversity"}
TINY = Settings(classes_per_batch=4, samples_per_class=3, embedding_size=8, iterations=4, epoch_length=2, probes=2)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "demo", "--quick", "--output", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False), folder


@pytest.fixture
def letters() -> GlyphDataset:
    """Six made-up classes of four noisy images."""
    generator = torch.Generator().manual_seed(0)
    shapes = (torch.rand(6, 1, 32, 32, generator=generator) > 0.7).float()
    images = (shapes.repeat_interleave(4, 0) * 200 + 40 * torch.rand(24, 1, 32, 32, generator=generator)).byte()
    return GlyphDataset(images, torch.arange(6).repeat_interleave(4), [f"class {i}" for i in range(6)])


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_the_quick_demo_prints_one_table_of_both_methods(quick_run):
    done, _ = quick_run
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(table.HEADER)
    assert [row[0] for row in cells[2:]] == ["not trained", "N-pair (19)", "GCA-HNG", "GCA-HNG minus N-pair"]
    for row in cells[3:5]:
        assert 0 < float(row[1]) <= 1 and 0 < float(row[2]) <= 1
        assert row[5] == "not measured" or re.fullmatch(r"\d+ MB", row[5])
    assert "not photographs" in done.stdout
    assert "report.html" in done.stdout


def test_the_quick_demo_writes_results_of_equal_starts_and_batches(quick_run):
    done, folder = quick_run
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "runs" / "results.json").read_text())
    assert {run["method"] for run in results["runs"]} == set(METHODS)
    assert len(results["runs"]) == len(METHODS) * len(QUICK_SEEDS)
    assert len({run["start_checksum"] for run in results["runs"]}) == 1
    assert len({run["batch_checksum"] for run in results["runs"]}) == 1
    assert all(run["seconds"] > 0 and run["cpu_seconds"] > 0 for run in results["runs"])
    assert results["versions"]["torch"] == torch.__version__
    assert results["machine"]["cores"] >= 1
    assert results["settings"] == QUICK.as_dict()
    assert table.render(results) in done.stdout


def test_the_quick_demo_draws_every_figure_into_the_report(quick_run):
    done, folder = quick_run
    assert done.returncode == 0, done.stderr
    files = {path.stem: path for path in (folder / "figures").glob("*.png")}
    assert set(files) == FIGURES
    for path in files.values():
        width, height = png_size(path)
        assert width > 1000 and height > 400
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == len(FIGURES)
    results = json.loads((folder / "runs" / "results.json").read_text())
    assert all(cell in html for row in table.rows(results) for cell in row)
    assert "photographs" in html


def test_both_methods_start_alike_and_see_the_same_batches(letters):
    outcomes = [training.train(method, letters, TINY, seed=3) for method in METHODS]
    assert outcomes[0].start_checksum == outcomes[1].start_checksum
    assert outcomes[0].batch_checksum == outcomes[1].batch_checksum
    ends = [training.checksum(outcome.extractor) for outcome in outcomes]
    assert len({outcomes[0].start_checksum, *ends}) == 3
    other = training.train("n-pair", letters, TINY, seed=4)
    assert other.start_checksum != outcomes[0].start_checksum
    assert other.batch_checksum != outcomes[0].batch_checksum


def test_a_training_repeats_bit_for_bit_and_looking_changes_nothing(letters):
    first = training.train("gca-hng", letters, TINY, seed=0)
    again = training.train("gca-hng", letters, TINY, seed=0)
    seldom = training.train("gca-hng", letters, Settings(**{**TINY.as_dict(), "probes": 1}), seed=0)
    assert first.terms == again.terms == seldom.terms
    assert training.checksum(first.extractor) == training.checksum(again.extractor)
    assert training.checksum(first.extractor) == training.checksum(seldom.extractor)
    assert [look.iteration for look in first.probes] == [0, 2, 4]
    assert [look.iteration for look in seldom.probes] == [0, 4]


def test_the_first_step_of_both_methods_has_the_same_n_pair_loss(letters):
    plain, generated = (training.train(method, letters, TINY, seed=1) for method in METHODS)
    assert set(plain.terms) == {"n_pair"}
    assert {"synthetic", "node_ce", "class_ce", "similarity", "diversity"} < set(generated.terms)
    assert plain.terms["n_pair"][0] == pytest.approx(generated.terms["n_pair"][0], rel=1e-6)
    assert plain.terms["n_pair"][-1] != generated.terms["n_pair"][-1]
    assert all(len(values) == TINY.iterations for values in generated.terms.values())


def test_hardness_with_kappa_zero_is_the_distance_of_the_positive(letters):
    """(17): at kappa 0 a negative that is farther than the positive moves to the positive's distance."""
    extractor = training.start_extractor(TINY, 0)
    one_positive = Settings(**{**TINY.as_dict(), "samples_per_class": 2})
    step = training._GCAHNGStep(extractor, one_positive, 6, 0)
    step.criterion.schedule.j_avg = 1e-4
    # One sample of every class twice over: mixing two equal negatives leaves their distance as it is.
    images, labels = letters.batch([0, 1, 4, 4, 8, 8, 12, 12])
    look = probe.look_at_negatives(extractor, step.criterion, (images, labels), 0)
    assert look.kappa == 0
    anchors_of_class_0 = slice(0, 2 * 3)  # the other pairs have a positive at distance 0
    real = look.real_hardness[: 2 * 6].view(2, 3, 2)[:, :, 0].flatten()
    torch.testing.assert_close(look.hardness[anchors_of_class_0], real.clamp(max=1), rtol=1e-3, atol=1e-3)
    assert 0 < look.gate_mean < 1 and look.gate_quantiles == sorted(look.gate_quantiles)


def test_confusable_pairs_finds_the_pair_that_was_made_alike():
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, 16, generator=generator)
    means[3] = means[1] + 0.05 * torch.randn(16, generator=generator)
    labels = torch.arange(5).repeat(4)
    embeddings = means[labels] + 0.1 * torch.randn(20, 16, generator=generator)
    pairs = findings.confusable_pairs(embeddings, labels, count=2)
    assert (pairs[0].first, pairs[0].second) == (1, 3)
    assert pairs[0].correlation > 0.9 > pairs[1].correlation
    assert 0 < pairs[0].mistakes <= pairs[0].samples == 8
    assert pairs[1].mistakes == 0


def test_queries_are_half_missed_ones():
    labels = torch.arange(40) % 4
    nearest = labels.clone()
    nearest[[3, 17, 30]] += 1
    queries = findings.choose_queries([nearest, labels], labels, count=6)
    assert len(set(queries)) == 6
    assert sorted(queries[3:]) == [3, 17, 30]
    assert len(findings.choose_queries([labels], labels, count=6)) == 6


def test_trainings_from_other_weights_or_batches_are_not_compared():
    same = {"method": "n-pair", "seed": 0, "start_checksum": "a", "batch_checksum": "b"}
    run.check_same_start_and_batches([same, {**same, "method": "gca-hng"}])
    with pytest.raises(RuntimeError, match="start_checksum at seed 0"):
        run.check_same_start_and_batches([same, {**same, "start_checksum": "c"}])


def test_a_failing_training_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 1 trainings failed: -m demo.worker --method n-pair"):
        run.run_trainings(Settings(**{**QUICK.as_dict(), "classes_per_batch": 50}), (0,), tmp_path)


def test_tables_show_mean_range_and_paired_difference():
    def made(method: str, seed: int, recall: float) -> dict:
        scores = {"recall_at_1": recall, "mean_average_precision_at_r": recall / 2, "num_queries": 10}
        sizes = {"seconds": 10.0, "cpu_seconds": 5.0 if method == "n-pair" else 20.0, "peak_bytes": None}
        return {"method": method, "seed": seed, "scores": scores, "scores_before": scores, **sizes}

    runs = [made("n-pair", 0, 0.5), made("n-pair", 1, 0.7), made("gca-hng", 0, 0.6), made("gca-hng", 1, 0.6)]
    rows = table.rows({"runs": runs})
    assert rows[1][1] == "0.6000 (0.5000 to 0.7000)"
    assert rows[2][1] == "0.6000 (0.6000 to 0.6000)"
    assert rows[3][1] == "+0.0000 (-0.1000 to +0.1000)"
    assert rows[1][5] == "not measured"
    said = table.verdict({"runs": runs})
    assert "Recall@1: GCA-HNG minus N-pair is +0.0000 on average; GCA-HNG is ahead in 1 of 2 seeds." in said
    assert "4.0 times the processor time" in said


def test_the_documents_show_the_committed_results():
    assert table.write_documents(check=True) == [], "run python -m demo.table"


def test_the_committed_results_are_of_the_shipped_settings():
    results = json.loads(table.RESULTS.read_text())
    assert results["settings"] == Settings().as_dict()
    assert len(results["seeds"]) >= 2
    run.check_same_start_and_batches(results["runs"])


def test_blocks_go_between_their_markers_only():
    begin, end = "<!-- x:begin -->", "<!-- x:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert table.with_block(text, "x", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="each once"):
        table.with_block(text + begin, "x", "new")


def test_trials_name_what_differs_from_the_shipped_settings():
    trial = {"method": "n-pair", "seed": 1, "recall_at_1": 0.5, "mean_average_precision_at_r": 0.25, "cpu_seconds": 3.2}
    settings = [Settings().as_dict(), {**Settings().as_dict(), "alpha": 2.5, "iterations": 7}]
    lines = table.render_trials([{**trial, "settings": chosen} for chosen in settings]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["n-pair", "nothing", "1", "0.5000", "0.2500", "3"]
    assert cells[3][1] == "iterations 7, alpha 2.5"


def test_tuning_trials_are_read_from_words():
    trials = tune.parse_trials(["n-pair", "extractor_lr=0.5", "iterations=7", "gca-hng"])
    assert trials == [
        ("n-pair", Settings(extractor_lr=0.5, iterations=7)),
        ("gca-hng", Settings()),
    ]
    with pytest.raises(ValueError, match="'speed=3' is neither"):
        tune.parse_trials(["n-pair", "speed=3"])


def test_the_workers_use_disjoint_classes():
    names = [set(worker.load_letters(split, QUICK).classes) for split in ("train", "test")]
    assert len(names[0]) == len(names[1]) == QUICK.max_classes
    assert not names[0] & names[1]
