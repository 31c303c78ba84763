"""What resume must survive beyond a plain stop: interrupts of an evaluation, other branches, other settings, faults."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest

from gcng.training import ConfigError, DivergedError, Interrupted, fit, read_records
from gcng.training import trainer as trainer_module
from gcng.training.errors import RunError
from gcng.training.runs import states_equal as equal
from gcng.training.signals import StopOnSignal
from tests.training_run import EPOCHS, LENGTH, NoisyPoints, config, final_state, losses, parts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stops(monkeypatch):
    """The StopOnSignal of every run, so that a test can ask for a stop where no step is running."""
    made = []

    class Recorded(StopOnSignal):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(trainer_module, "StopOnSignal", Recorded)
    return made


@pytest.mark.parametrize(("epoch", "workers"), [(1, 0), (2, 2), (EPOCHS, 0)])
def test_interrupt_of_an_evaluation_is_resumed_bitwise(tmp_path, monkeypatch, stops, epoch, workers):
    settings = ("evaluation.every=1", "evaluation.k=1", f"data.workers={workers}", "evaluation.batch_size=4")
    straight, stopped = config(tmp_path / "straight", *settings), config(tmp_path / "stopped", *settings)
    fit(straight, stream=io.StringIO(), **parts())
    evaluations = []

    def interrupted(*arguments, on_batch, **options):
        evaluations.append(arguments)

        def stop(done, total):
            if len(evaluations) == epoch:
                stops[-1].request()
            on_batch(done, total)

        return evaluate(*arguments, on_batch=stop, **options)

    evaluate = trainer_module.evaluate
    monkeypatch.setattr(trainer_module, "evaluate", interrupted)
    with pytest.raises(Interrupted, match=f"stopped after step {epoch * LENGTH}"):
        fit(stopped, stream=io.StringIO(), **parts())
    assert len(evaluations) == epoch
    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    result = fit(stopped, resume=True, stream=io.StringIO(), **parts())
    assert result.steps == EPOCHS * LENGTH
    assert equal(final_state(stopped), final_state(straight))
    assert losses(stopped) == losses(straight)


def test_going_back_to_an_earlier_step_needs_a_folder_of_its_own(tmp_path):
    settings = config(tmp_path / "run")
    fit(settings, stream=io.StringIO(), **parts())
    expected = final_state(settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    earlier = checkpoints / f"step-{LENGTH:09d}.pt"
    with pytest.raises(ConfigError, match=r"is of step 4, .*step-000000012.pt, step-000000008.pt.*another run.output"):
        fit(settings, resume=earlier, stream=io.StringIO(), **parts())
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    elsewhere = config(tmp_path / "other")
    fit(elsewhere, resume=earlier, stream=io.StringIO(), **parts())
    assert equal(final_state(elsewhere), expected)


RATES = (
    "schedule.epochs=4",
    "schedule.metric_decay_steps=2",
    "schedule.metric_gamma=0.1",
    "optimizer.extractor_lr=0.02",
    "optimizer.embedding_ratio=3",
    "optimizer.graph_lr=0.005",
    "optimizer.classifier_lr=0.004",
    "optimizer.weight_decay=0.03",
    "optimizer.classifier_weight_decay=0.05",
)


@pytest.mark.parametrize("policies", [(), ("schedule.extractor_policy=constant", "schedule.graph_policy=constant")])
def test_allowed_changes_of_rates_hold_from_the_resume_on(tmp_path, policies):
    """Each later step has the rates of a run that had the new settings from its first step."""
    begun = config(tmp_path / "begun", "schedule.epochs=2", "optimizer.embedding_ratio=2")
    fit(begun, stream=io.StringIO(), **parts())
    expected, seen = {}, {}

    def keep(rates):
        names = ("lr", "weight_decay", "betas")
        return lambda trainer, _: rates.update(
            {trainer.step: [[g[n] for n in names] for _, o in trainer._optimizers() for g in o.param_groups]}
        )

    fit(config(tmp_path / "fresh", *RATES, *policies), stream=io.StringIO(), on_step=keep(expected), **parts())
    changed = config(tmp_path / "begun", *RATES, *policies, "checkpoint.allow_config_change=true")
    fit(changed, resume=True, stream=io.StringIO(), on_step=keep(seen), **parts())
    assert sorted(seen) == list(range(2 * LENGTH + 1, 4 * LENGTH + 1))
    assert seen == {step: expected[step] for step in seen}


class Unreadable(NoisyPoints):
    """After a number of batches, counted in each process, samples are damaged; without an error, not finite."""

    def __init__(self, batches, error=None):
        super().__init__()
        # Eight samples a batch; the trainer looks at one for its shape, and at one for the extractor's.
        self.left, self.error = 2 + 8 * batches, error

    def __getitem__(self, index):
        self.left -= 1
        inputs, label = super().__getitem__(index)
        if self.left >= 0:
            return inputs, label
        if self.error is None:
            return inputs * math.nan, label
        raise self.error


def with_train(train):
    given = parts()
    given["data"] = dataclasses.replace(given["data"], train=train)
    return given


@pytest.mark.parametrize("error", [ValueError("a.jpg: broken data stream"), OSError(5, "Input/output error")])
@pytest.mark.parametrize(("workers", "step"), [(0, 6), (1, 3)])
def test_unreadable_sample_ends_the_run_with_one_line_and_a_checkpoint(tmp_path, workers, step, error):
    straight, broken = (config(tmp_path / name, f"data.workers={workers}") for name in ("straight", "broken"))
    fit(straight, stream=io.StringIO(), **parts())
    message = rf"step {step} failed: {type(error).__name__}.*{error.args[-1]}; .*--resume"
    with pytest.raises(RunError, match=message) as caught:
        fit(broken, stream=io.StringIO(), **with_train(Unreadable(step - 1, error)))
    assert type(caught.value) is RunError and caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert final_state(broken)["progress"]["step"] == step - 1
    assert [r["step"] for r in read_records(tmp_path / "broken" / "log.jsonl") if r["kind"] == "error"] == [step - 1]
    fit(broken, resume=True, stream=io.StringIO(), **parts())  # once the sample is readable
    assert equal(final_state(broken), final_state(straight))


def test_failed_evaluation_ends_the_run_with_one_line_and_a_checkpoint(tmp_path, monkeypatch):
    settings = ("evaluation.every=1", "evaluation.k=1", "checkpoint.keep=1")
    straight, broken = config(tmp_path / "straight", *settings), config(tmp_path / "broken", *settings)
    fit(straight, stream=io.StringIO(), **parts())

    def fails(*_, **__):
        raise ValueError("evaluate_retrieval: query has a NaN in row 3")

    monkeypatch.setattr(trainer_module, "evaluate", fails)
    with pytest.raises(RunError, match="the evaluation after step 4 failed: ValueError: evaluate_retrieval: query has"):
        fit(broken, stream=io.StringIO(), **parts())
    monkeypatch.undo()
    fit(broken, resume=True, stream=io.StringIO(), **parts())
    assert equal(final_state(broken), final_state(straight))


def test_error_in_the_first_step_leaves_no_checkpoint(tmp_path):
    settings = config(tmp_path / "run")
    with pytest.raises(RunError, match=r"step 1 failed: ValueError: damaged$"):
        fit(settings, stream=io.StringIO(), **with_train(Unreadable(0, ValueError("damaged"))))
    assert fit(settings, stream=io.StringIO(), **parts()).epochs == EPOCHS


def test_diverged_run_keeps_the_steps_before(tmp_path):
    settings = config(tmp_path / "run", "run.nonfinite_limit=2")
    with pytest.raises(DivergedError):
        fit(settings, stream=io.StringIO(), **with_train(Unreadable(5)))
    state = final_state(settings)
    assert state["progress"]["step"] == 7 and state["progress"]["skipped"] == {"loss": 2}
    assert fit(settings, resume=True, stream=io.StringIO(), **parts()).steps == EPOCHS * LENGTH


def test_resume_fetches_no_published_weights(tmp_path, monkeypatch):
    settings = config(tmp_path / "run", "model.pretrained=true", "schedule.epochs=1")
    asked = []

    def make_extractor(model, *, in_channels, pretrained):
        asked.append(model.pretrained if pretrained is None else pretrained)
        return parts()["extractor"]

    monkeypatch.setattr(trainer_module, "make_extractor", make_extractor)
    data = parts()["data"]
    fit(settings, resume=True, stream=io.StringIO(), data=data)  # nothing to resume from yet
    fit(settings, resume=True, stream=io.StringIO(), data=data)
    elsewhere = config(tmp_path / "other", "model.pretrained=true", "schedule.epochs=1")
    newest = tmp_path / "run" / "checkpoints" / f"step-{LENGTH:09d}.pt"
    fit(elsewhere, resume=newest, stream=io.StringIO(), data=data)
    assert asked == [True, False, False]
