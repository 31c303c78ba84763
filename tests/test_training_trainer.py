"""The trainer: bitwise resume, interrupts, steps that are not finite, schedules, frozen parts, the log."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from gcng.training import (
    CheckpointError,
    ConfigError,
    DivergedError,
    Interrupted,
    dry_run,
    fit,
    load_checkpoint,
    read_records,
    save_checkpoint,
)
from gcng.training.checkpoint import CheckpointFolder
from gcng.training.records import RunReport
from gcng.training.runs import states_equal as equal
from gcng.training.trainer import Trainer
from tests.training_run import EPOCHS, LENGTH, NoisyPoints, config, final_state, losses, parts

pytestmark = pytest.mark.usefixtures("one_thread")


def run_and_keep_every_state(tmp_path, settings):
    """A straight run; a checkpoint of every step, made where an interrupt would make it."""
    states = {}

    def keep(trainer, terms):
        states[trainer.step] = tmp_path / f"state-{trainer.step}.pt"
        save_checkpoint(states[trainer.step], trainer.state_dict())

    fit(settings, stream=io.StringIO(), on_step=keep, **parts())
    return states


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_step_is_bitwise(tmp_path, workers):
    straight = config(tmp_path / "straight", f"data.workers={workers}", "schedule.warm_up_epochs=1")
    states = run_and_keep_every_state(tmp_path, straight)
    assert sorted(states) == list(range(1, EPOCHS * LENGTH + 1))
    expected, expected_losses = final_state(straight), losses(straight)
    assert expected["progress"]["epoch"] == EPOCHS and len(expected_losses) == EPOCHS * (LENGTH + 1)
    for step, path in states.items():
        resumed = config(tmp_path / f"from-{step}", f"data.workers={workers}", "schedule.warm_up_epochs=1")
        torch.manual_seed(99)  # the process that resumes has another random state
        result = fit(resumed, resume=path, stream=io.StringIO(), **parts())
        assert result.steps == EPOCHS * LENGTH
        assert equal(final_state(resumed), expected), f"after step {step}"
        assert (
            losses(resumed)
            == [r for r in expected_losses if r["step"] > step or r["kind"] == "epoch"][-len(losses(resumed)) :]
        )


def test_resume_at_epoch_edges_and_with_other_workers_is_bitwise(tmp_path):
    straight = config(tmp_path / "straight", "checkpoint.keep=9")
    fit(straight, stream=io.StringIO(), **parts())
    expected = final_state(straight)
    for epoch in (1, 2):
        resumed = config(tmp_path / f"from-{epoch}", "data.workers=1")
        path = tmp_path / "straight" / "checkpoints" / f"step-{epoch * LENGTH:09d}.pt"
        fit(resumed, resume=path, stream=io.StringIO(), **parts())
        found = final_state(resumed)
        assert equal(
            {k: v for k, v in found.items() if k != "config_hash"},
            {k: v for k, v in expected.items() if k != "config_hash"},
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [5, 8])
def test_signal_saves_after_the_step_and_the_rest_is_bitwise(tmp_path, number, at):
    straight, stopped = config(tmp_path / "straight"), config(tmp_path / "stopped")
    fit(straight, stream=io.StringIO(), **parts())
    before = signal.getsignal(number)

    def interrupt(trainer, terms):
        if trainer.step == at:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"stopped after step {at}; continue with --resume"):
        fit(stopped, stream=io.StringIO(), on_step=interrupt, **parts())
    assert signal.getsignal(number) is before
    assert final_state(stopped)["progress"]["step"] == at
    assert Interrupted.exit_code == 130
    fit(stopped, resume=True, stream=io.StringIO(), **parts())
    assert equal(final_state(stopped), final_state(straight))


def test_damaged_newest_checkpoint_falls_back_and_the_run_ends_the_same(tmp_path):
    settings, stream = config(tmp_path / "run", "checkpoint.keep=2"), io.StringIO()
    fit(settings, stream=io.StringIO(), **parts())
    expected = final_state(settings)
    newest, earlier = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"), reverse=True)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    fit(settings, resume=True, stream=stream, **parts())
    assert newest.name in stream.getvalue() and f"going on from {earlier.name}" in stream.getvalue()
    assert equal(final_state(settings), expected)
    for path in (newest, earlier):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no usable checkpoint") as caught:
        fit(settings, resume=True, stream=io.StringIO(), **parts())
    assert caught.value.exit_code == 4


def test_resume_refuses_other_settings_by_name(tmp_path):
    first = config(tmp_path / "run", "schedule.epochs=1")
    fit(first, stream=io.StringIO(), **parts())
    second = config(tmp_path / "run", "schedule.epochs=2", "loss.alpha=2")
    with pytest.raises(ConfigError, match=r"other values of loss.alpha, schedule.epochs; put them back"):
        fit(second, resume=True, stream=io.StringIO(), **parts())
    allowed = config(tmp_path / "run", "schedule.epochs=2", "checkpoint.allow_config_change=true")
    assert fit(allowed, resume=True, stream=io.StringIO(), **parts()).epochs == 2


def test_resume_refuses_weights_that_do_not_fit(tmp_path):
    settings = config(tmp_path / "run", "schedule.epochs=1")
    fit(settings, stream=io.StringIO(), **parts())
    other = parts()
    other["extractor"].head = nn.Linear(12, 8, bias=False)
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*head.bias"):
        fit(settings, resume=True, stream=io.StringIO(), **other)
    path = tmp_path / "half.pt"
    save_checkpoint(path, {"extractor": {}})
    with pytest.raises(CheckpointError, match="the checkpoint has no entry config, config_hash, criterion"):
        fit(settings, resume=path, stream=io.StringIO(), **parts())


def test_fresh_start_refuses_a_used_folder_and_resume_of_an_empty_one_is_fresh(tmp_path):
    settings = config(tmp_path / "run", "schedule.epochs=1")
    assert fit(settings, resume=True, stream=io.StringIO(), **parts()).steps == LENGTH
    with pytest.raises(ConfigError, match="already holds checkpoints; resume, or choose another folder"):
        fit(settings, stream=io.StringIO(), **parts())


class Poisoned(NoisyPoints):
    """A sample of NaN: every batch with it must be skipped."""

    def __init__(self, bad, **options):
        super().__init__(**options)
        self.bad = bad

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return (inputs * math.nan if index in self.bad else inputs), label


def test_bad_batches_are_skipped_counted_and_logged(tmp_path):
    settings, given = config(tmp_path / "run"), parts()
    train = Poisoned({0, 5})
    given["data"] = dataclasses.replace(given["data"], train=train)
    changed = []

    def watch(trainer, terms):
        state = [value.clone() for value in trainer.extractor.state_dict().values()]
        changed.append((terms.skipped, state))

    result = fit(settings, stream=io.StringIO(), on_step=watch, **given)
    skipped = [index for index, (reason, _) in enumerate(changed) if reason]
    assert 0 < len(skipped) < EPOCHS * LENGTH and result.skipped == {"loss": len(skipped)}
    for index, (reason, state) in enumerate(changed):
        assert all(bool(value.isfinite().all()) for value in state)
        if index:
            assert equal(state, changed[index - 1][1]) == bool(reason)
    records = [r for r in read_records(tmp_path / "run" / "log.jsonl") if r["kind"] == "skipped"]
    assert [record["step"] - 1 for record in records] == skipped
    assert all(len(record["labels"]) == 8 and record["reason"] == "loss" for record in records)
    epochs = [r for r in read_records(tmp_path / "run" / "log.jsonl") if r["kind"] == "epoch"]
    assert all(math.isfinite(value) for record in epochs for value in record.values() if value != "epoch")


@pytest.mark.parametrize(("policy", "steps"), [("skip", 3), ("stop", 1)])
def test_too_many_bad_steps_end_the_run_as_diverged(tmp_path, policy, steps):
    settings = config(tmp_path / "run", f"run.nonfinite_policy={policy}", "run.nonfinite_limit=3")
    given = parts()
    given["data"] = dataclasses.replace(given["data"], train=Poisoned(set(range(24))))
    with pytest.raises(DivergedError, match=f"{steps} steps in a row had a loss that is not finite") as caught:
        fit(settings, stream=io.StringIO(), **given)
    assert caught.value.exit_code == 3


def test_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    settings, stream = config(tmp_path / "run"), io.StringIO()
    saves = []

    def failing_save(folder, step, state, **options):
        saves.append(step)
        if step == LENGTH:
            raise OSError(28, "No space left on device")
        return original(folder, step, state, **options)

    original = CheckpointFolder.save
    monkeypatch.setattr(CheckpointFolder, "save", failing_save)
    result = fit(settings, stream=stream, **parts())
    assert result.epochs == EPOCHS and saves == [4, 8, 12]
    assert "checkpoint of step 4 not written" in stream.getvalue()
    assert any(r["kind"] == "warning" for r in read_records(tmp_path / "run" / "log.jsonl"))
    monkeypatch.setattr(CheckpointFolder, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match="the last checkpoint could not be written"):
        fit(config(tmp_path / "other"), stream=io.StringIO(), **parts())


def test_a_best_state_that_was_not_saved_is_not_the_best(tmp_path, monkeypatch):
    found, original = iter((0.5, 0.9, 0.6)), CheckpointFolder.save

    def full_at_the_second(folder, step, state, **options):
        if step == 2 * LENGTH:
            raise OSError(28, "No space left on device")
        return original(folder, step, state, **options)

    monkeypatch.setattr(CheckpointFolder, "save", full_at_the_second)
    monkeypatch.setattr("gcng.training.trainer.evaluate", lambda *_, **__: {"recall_at_1": next(found)})
    settings = config(tmp_path / "run", "evaluation.every=1", "checkpoint.best_metric=recall_at_1", "checkpoint.keep=9")
    result = fit(settings, stream=io.StringIO(), **parts())
    assert result.best == {"recall_at_1": 0.6}
    assert Path(result.best_checkpoint).name == f"step-{3 * LENGTH:09d}.pt"


def test_checkpoints_within_an_epoch(tmp_path):
    settings = config(tmp_path / "run", "checkpoint.every_steps=3", "checkpoint.keep=20")
    fit(settings, stream=io.StringIO(), **parts())
    steps = [int(path.stem[5:]) for path in sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))]
    assert steps == [3, 4, 6, 8, 9, 12]


def test_learning_rates_follow_the_published_schedules(tmp_path):
    settings = config(tmp_path / "run", "optimizer.embedding_ratio=2", "schedule.metric_decay_steps=2")
    trainer = Trainer(settings, **parts())
    rates = []
    report = RunReport(settings, stream=io.StringIO())
    trainer.on_step = lambda t, _: rates.append(
        (
            *(group["lr"] for group in t.optimizers.extractor.param_groups),
            t.optimizers.graph.param_groups[0]["lr"],
            t.optimizers.classifier.param_groups[0]["lr"],
        )
    )
    trainer.fit(report)
    report.close()
    for step, (backbone, head, graph, classifier) in enumerate(rates):
        epoch = step // LENGTH
        decay = 0.5 ** (epoch // 2)
        assert (backbone, head) == pytest.approx((0.01 * decay, 0.02 * decay))
        assert graph == pytest.approx(1.5e-4 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2)
        assert classifier == 1e-3
    decays = [o.param_groups[0]["weight_decay"] for o in (trainer.optimizers.graph, trainer.optimizers.classifier)]
    assert decays == [1e-4, 0.01]


def test_warm_up_trains_the_head_only_and_frozen_norms_keep_their_statistics(tmp_path):
    settings = config(tmp_path / "run", "schedule.warm_up_epochs=2", "model.freeze_batch_norm=true")
    trainer = Trainer(settings, **parts())
    start = {name: value.clone() for name, value in trainer.extractor.state_dict().items()}
    seen = []

    def watch(t, _):
        now = t.extractor.state_dict()
        seen.append({name for name in start if not torch.equal(now[name], start[name])})

    trainer.on_step = watch
    report = RunReport(settings, stream=io.StringIO())
    trainer.fit(report)
    report.close()
    assert seen[2 * LENGTH - 1] == {"head.weight", "head.bias"}
    assert seen[-1] == {name for name in start if "running" not in name and "num_batches" not in name}


def test_extractor_of_another_width_is_a_config_error(tmp_path):
    given = parts()
    given["extractor"].head = nn.Linear(12, 9)
    with pytest.raises(ConfigError, match=r"model.embedding_size, .* into \(1, 9\); expected \(1, 8\)"):
        Trainer(config(tmp_path / "run"), **given)


def test_frozen_parts_that_do_not_exist_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="model.freeze_patch_embedding: .*patch_embed"):
        Trainer(config(tmp_path / "run", "model.freeze_patch_embedding=true"), **parts())


def test_averages_follow_the_epochs(tmp_path):
    settings = config(tmp_path / "run")
    fit(settings, stream=io.StringIO(), **parts())
    epochs = [r for r in read_records(tmp_path / "run" / "log.jsonl") if r["kind"] == "epoch"]
    averages = final_state(settings)["criterion"]["schedule.average"]
    assert averages.tolist() == pytest.approx([epochs[-1]["n_pair"], epochs[-1]["generator"]], rel=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_runs_and_stays_finite(tmp_path, precision):
    settings = config(tmp_path / "run", f"run.precision={precision}", "schedule.epochs=2")
    result = fit(settings, stream=io.StringIO(), **parts())
    assert result.skipped.get("loss", 0) == 0
    state = final_state(settings)
    assert all(value.isfinite().all() for value in state["extractor"].values())
    assert bool(state["scaler"]) == (precision == "float16")


def test_evaluation_keeps_the_best_checkpoint(tmp_path):
    settings = config(tmp_path / "run", "evaluation.every=1", "evaluation.k=1,2", "checkpoint.keep=1")
    result = fit(settings, stream=io.StringIO(), **parts())
    records = [r for r in read_records(tmp_path / "run" / "log.jsonl") if r["kind"] == "evaluation"]
    values = [record["recall_at_1"] for record in records]
    assert len(values) == EPOCHS and result.best["recall_at_1"] == max(values)
    best = values.index(max(values)) + 1
    assert result.best_checkpoint.endswith(f"step-{best * LENGTH:09d}.pt")
    assert load_checkpoint(result.best_checkpoint)["progress"]["epoch"] == best
    # What is best may be decided anew on a resume.
    other = config(tmp_path / "run", "evaluation.every=1", "evaluation.k=1,2", "checkpoint.best_metric=r_precision")
    assert fit(other, resume=True, stream=io.StringIO(), **parts()).best == result.best


def test_a_best_metric_that_no_evaluation_gives_is_refused_before_the_first_step(tmp_path):
    wrong = ("checkpoint.best_metric=recall_at_5", "evaluation.k=1,10")
    with pytest.raises(
        ConfigError, match=r"best_metric must be one of recall_at_1, recall_at_10, .* got 'recall_at_5'"
    ):
        Trainer(config(tmp_path / "a", "evaluation.every=1", *wrong), **parts())
    Trainer(config(tmp_path / "b", "evaluation.every=0", *wrong), **parts())
    settings = config(tmp_path / "c", "evaluation.every=1", "evaluation.k=1,10", "schedule.epochs=1")
    result = fit(settings, stream=io.StringIO(), **parts())
    for name in set(result.best) - {"num_queries", "num_lone_queries"}:
        Trainer(
            config(tmp_path / "d", "evaluation.every=1", "evaluation.k=1,10", f"checkpoint.best_metric={name}"),
            **parts(),
        )


def test_evaluation_does_not_change_the_run(tmp_path):
    plain, evaluated = config(tmp_path / "a"), config(tmp_path / "b", "evaluation.every=1", "evaluation.k=1")
    for settings in (plain, evaluated):
        fit(settings, stream=io.StringIO(), **parts())
    ignored = ("config_hash", "progress")
    states = [{k: v for k, v in final_state(s).items() if k not in ignored} for s in (plain, evaluated)]
    assert equal(*states) and losses(plain) == losses(evaluated)


def test_dry_run_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    given = parts()
    result = dry_run(config(tmp_path / "never"), stream=io.StringIO(), **given)
    assert os.listdir(tmp_path) == []
    assert result["skipped"] == "" and result["checkpoint_bytes"] > 1000
    assert math.isfinite(result["terms"]["metric"]) and "recall_at_1" in result["metrics"]
