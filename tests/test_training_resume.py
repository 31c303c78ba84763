"""What resume must survive beyond a plain stop: interrupts of an evaluation, other branches, other settings, faults."""

from __future__ import annotations

import io

import pytest

from gcng.training import ConfigError, Interrupted, fit
from gcng.training import trainer as trainer_module
from gcng.training.runs import states_equal as equal
from gcng.training.signals import StopOnSignal
from tests.training_run import EPOCHS, LENGTH, config, final_state, losses, one_thread, parts

__all__ = ["one_thread"]  # a fixture that every test here uses


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
