"""The thin trainer: epochs around :func:`gcng.training.train_step`, evaluation, checkpoints, resume.

Owns the order of things in a run and its state. What a step computes is in ``step``, what is written in
``records`` and ``checkpoint``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from gcng.models import check_extractor
from gcng.training.checkpoint import CheckpointFolder, Loaded, load_checkpoint
from gcng.training.config import Config
from gcng.training.config_io import as_nested, changed_keys, check_best_metric, config_hash
from gcng.training.datasets import RunData, build_data, make_criterion, make_extractor, make_loader
from gcng.training.embedding import evaluate
from gcng.training.errors import CheckpointError, ConfigError, DivergedError, Interrupted, RunError
from gcng.training.optimization import FrozenParts, build_optimizers, build_schedulers, choose_device
from gcng.training.progress import Progress
from gcng.training.random_state import capture_random_state, restore_random_state
from gcng.training.records import RunReport
from gcng.training.signals import StopOnSignal, children_spared
from gcng.training.step import Optimizers, StepTerms, train_step

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        epochs: Epochs done. steps: Iterations done, skipped ones included. skipped: Reason to count.
        best: Metric values of the best evaluation, or None. last: Those of the last one.
        checkpoint: Newest checkpoint. best_checkpoint: The one of ``best``. seconds: Wall time of this call.
    """

    epochs: int
    steps: int
    skipped: dict[str, int]
    best: dict[str, float] | None
    last: dict[str, float] | None
    checkpoint: str | None
    best_checkpoint: str | None
    seconds: float


class Trainer:
    """One run: everything that is trained, and where it stands.

    Args:
        config: The whole configuration.
        extractor: Any module from inputs to (N, D); None builds ``config.model``.
        data: Data sets; None builds ``config.data``.
        criterion: None builds ``config.loss``.
        on_step: Called after each step with (trainer, terms); for logging of one's own.
        pretrained: Replaces ``config.model.pretrained`` where given: False where a checkpoint follows.

    Raises:
        ConfigError: Something the configuration asks for does not exist or does not fit.

    Attributes:
        epoch, step: The epoch that runs or comes next, and iterations done.
    """

    def __init__(
        self,
        config: Config,
        *,
        extractor: nn.Module | None = None,
        data: RunData | None = None,
        criterion: nn.Module | None = None,
        on_step: Callable[[Trainer, StepTerms], None] | None = None,
        pretrained: bool | None = None,
    ) -> None:
        self.config = config
        if config.evaluation.every and (data is None or data.test is not None):
            check_best_metric(config)
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.data = build_data(config.data) if data is None else data
        self.in_channels = self.data.in_channels()
        if extractor is None:
            extractor = make_extractor(config.model, in_channels=self.in_channels, pretrained=pretrained)
        if criterion is None:
            criterion = make_criterion(config, self.data.num_classes)
        self.extractor, self.criterion = extractor.to(self.device), criterion.to(self.device)
        self._check_extractor()
        self.criterion.train()
        self.optimizers = build_optimizers(config, self.extractor, self.criterion)
        self.schedulers = build_schedulers(config, self.optimizers)
        self.frozen = FrozenParts(config, self.extractor)
        self.loader = make_loader(config, self.data)
        self.generator = torch.Generator().manual_seed(config.run.seed)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.run.precision == "float16")
        self.checkpoints = CheckpointFolder(Path(config.run.output) / "checkpoints", keep=config.checkpoint.keep)
        self.on_step = on_step
        self.progress = Progress()

    def _check_extractor(self) -> None:
        try:
            inputs = self.data.sample().nan_to_num()[None]  # a bad sample is no fault of the extractor
            check_extractor(self.extractor, inputs.to(self.device), self.config.model.embedding_size)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"model.embedding_size, model.backbone: {error}") from error

    @property
    def step(self) -> int:
        """Iterations done, skipped ones included."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        """The epoch that runs or comes next."""
        return self.progress.epoch

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on: tensors and plain values."""
        return {
            "config": as_nested(self.config),
            "config_hash": config_hash(self.config),
            "in_channels": self.in_channels,
            "num_classes": self.data.num_classes,
            "extractor": self.extractor.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "generator": self.generator.get_state(),
            "random": capture_random_state(),
            "progress": self.progress.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit on a CPU.

        Raises:
            CheckpointError: Entries are missing or do not fit the model; names them.
            ConfigError: A key that changes results differs; names all such keys.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise CheckpointError(f"the checkpoint has no entry {', '.join(missing)}")
        changed = changed_keys(state["config"], self.config)
        if changed and not self.config.checkpoint.allow_config_change:
            raise ConfigError(
                f"the run was saved with other values of {', '.join(changed)}; put them back, choose another "
                "run.output, or set checkpoint.allow_config_change=true"
            )
        try:
            self.extractor.load_state_dict(state["extractor"])
            self.criterion.load_state_dict(state["criterion"])
            for name, optimizer in self._optimizers():
                optimizer.load_state_dict(state["optimizers"][name])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.loader.load_state_dict(state["loader"])
            self.progress.load_state_dict(state["progress"])
            if changed:
                self._rebuild_rates()
            else:
                for name, scheduler in self.schedulers.items():
                    scheduler.load_state_dict(state["schedulers"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            message = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint does not fit this run: {message}") from error
        self.generator.set_state(state["generator"])
        restore_random_state(state["random"])

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return _named(self.optimizers)

    def _rebuild_rates(self) -> None:
        """Rates, decays and schedules as the configuration has them now, at the epoch that was reached."""
        wanted = build_optimizers(self.config, self.extractor, self.criterion)
        for (_, optimizer), (_, fresh) in zip(self._optimizers(), _named(wanted), strict=True):
            for group, options in zip(optimizer.param_groups, fresh.param_groups, strict=True):
                group.pop("initial_lr", None)  # or the new schedules would start from the saved one
                group.update({name: value for name, value in options.items() if name != "params"})
        self.schedulers = build_schedulers(self.config, self.optimizers)
        for _ in range(self.epoch):
            self._step_schedules()

    def _step_schedules(self) -> None:
        with warnings.catch_warnings():
            # Right after a resume, or where all steps were skipped, no optimizer has stepped in this process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers.values():
                scheduler.step()

    def save(self, *, is_best: bool = False) -> Path:
        """Write a checkpoint of this moment into the run's folder. OSError where the disk refuses."""
        manifest = {"epoch": self.epoch, "config_hash": config_hash(self.config)}
        if is_best:
            manifest["metrics"] = self.progress.best
        return self.checkpoints.save(self.step, self.state_dict(), manifest=manifest, is_best=is_best)

    def resume(self, path: str | Path | None = None) -> Loaded | None:
        """Continue from a checkpoint file, or from the newest usable one of the run's folder.

        Returns:
            What was loaded, with the problems of newer files; None where ``path`` is None and the folder is
            empty.

        Raises:
            CheckpointError: ``path`` is unusable, or files exist and none is usable.
            ConfigError: The folder holds steps beyond ``path``, from which the next resume would go on.
        """
        if path is not None:
            loaded = Loaded(Path(path), load_checkpoint(path), ())
        elif self.checkpoints.files():
            loaded = self.checkpoints.load_newest()
        else:
            return None
        self.load_state_dict(loaded.state)
        beyond = self.checkpoints.files_beyond(self.step) if path is not None else []
        if beyond:
            names = ", ".join(file.name for file in beyond)
            raise ConfigError(
                f"{path} is of step {self.step}, and {self.checkpoints.folder} holds later ones ({names}) that the "
                "next --resume would go on from; choose another run.output, or move them away"
            )
        return loaded

    def fit(self, report: RunReport) -> RunResult:
        """Train to the last epoch from wherever the run stands.

        The first SIGINT or SIGTERM ends it after the running step with a checkpoint, the second at once.

        Raises:
            Interrupted: After a signal; the state is saved.
            DivergedError: Too many skipped steps in a row; the parameters were not touched by them.
            CheckpointError: The last checkpoint of the run could not be written.
            RunError: A sample, an evaluation or a step failed. The state before it is saved, as it is where the
                run diverged, if this call has changed it.
        """
        began = time.monotonic()
        with StopOnSignal() as stop, self._saved_on_errors(report):
            while self.epoch < self.config.schedule.epochs:
                # The loader is one epoch ahead where a checkpoint was written during the evaluation.
                if self.loader.epoch == self.epoch:
                    self._train_epoch(report, stop)
                self._end_epoch(report, stop)
        newest, best = self.checkpoints.files(), self.checkpoints.best_file()
        return RunResult(
            epochs=self.epoch,
            steps=self.step,
            skipped=dict(self.progress.skipped),
            best=self.progress.best,
            last=self.progress.last,
            checkpoint=str(newest[0]) if newest else None,
            best_checkpoint=None if best is None else str(best),
            seconds=round(time.monotonic() - began, 3),
        )

    @contextlib.contextmanager
    def _saved_on_errors(self, report: RunReport) -> Iterator[None]:
        """Save what this call has trained before an error leaves it; errors of data and steps become RunErrors."""
        applied = self.progress.applied
        try:
            yield
        except CheckpointError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            trained = self.progress.applied > applied
            if trained:
                self._save_or_warn(report)
            if isinstance(error, RunError):
                raise
            in_epoch = self.loader.epoch == self.epoch
            what = f"step {self.step + 1}" if in_epoch else f"the evaluation after step {self.step}"
            text = f"{what} failed: {_last_line(error)}"
            report.event("error", self.step, text=text)
            advice = "; the state before it is saved, continue with --resume" if trained else ""
            raise RunError(text + advice) from error

    def _train_epoch(self, report: RunReport, stop: StopOnSignal) -> None:
        self.frozen.begin_epoch(self.epoch)
        every, length = self.config.checkpoint.every_steps, len(self.loader)
        for inputs, labels in self._batches():
            terms = self.train_batch(inputs, labels)
            done = self.loader.position
            report.step(terms, step=self.step, epoch=self.epoch, done=done, total=length)
            if terms.skipped:
                self._check_skipped(report, terms, labels)
            if self.on_step is not None:
                self.on_step(self, terms)
            if stop.requested:
                self._stop(report)
            if every and self.step % every == 0 and done < length:  # the end of an epoch is saved anyway
                self._save_or_warn(report)

    def _batches(self) -> Iterator[tuple[Any, torch.Tensor]]:
        batches = iter(self.loader)
        with children_spared():  # the loader's processes start with its first batch
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches

    def train_batch(self, inputs: Any, labels: torch.Tensor) -> StepTerms:
        """One iteration on a batch as the loader gives it; counts it and keeps the epoch's sums."""
        terms = train_step(
            self.extractor,
            self.criterion,
            inputs.to(self.device, non_blocking=True),
            labels,
            self.optimizers,
            clip_value=self.config.optimizer.clip_value,
            clip_norm=self.config.optimizer.clip_norm,
            generator=self.generator,
            scaler=self.scaler,
            autocast=_DTYPES[self.config.run.precision],
        )
        self.progress.count(terms)
        return terms

    def _check_skipped(self, report: RunReport, terms: StepTerms, labels: torch.Tensor) -> None:
        """Write down which batch was not finite, and end the run where the policy says so."""
        report.event(
            "skipped",
            self.step,
            reason=terms.skipped,
            epoch=self.epoch,
            batch=self.loader.position - 1,
            labels=labels.tolist(),
        )
        limit = 1 if self.config.run.nonfinite_policy == "stop" else self.config.run.nonfinite_limit
        if self.progress.skipped_in_a_row >= limit:
            raise DivergedError(
                f"{self.progress.skipped_in_a_row} steps in a row had a {terms.skipped} that is not finite (step "
                f"{self.step}, epoch {self.epoch}); parameters are those from before them. Lower the "
                "learning rates, or look at the batches that the log names"
            )

    def _end_epoch(self, report: RunReport, stop: StopOnSignal) -> None:
        # Evaluation comes first and changes nothing, so an interrupt in it leaves the state of the last step; the
        # loader already stands at the next epoch then.
        number, epochs, every = self.epoch + 1, self.config.schedule.epochs, self.config.evaluation.every
        metrics = None
        if every and self.data.test is not None and (number % every == 0 or number == epochs):
            metrics = self._evaluate(report, stop)
        self.criterion.schedule.end_epoch()
        self._step_schedules()
        best_before = self.progress.best
        is_best = metrics is not None and self.progress.evaluated(metrics, self.config.checkpoint.best_metric)
        report.event("epoch", self.step, epoch=self.epoch, **self.progress.end_epoch())
        if stop.requested:
            self._stop(report, is_best=is_best)
        if number == epochs:
            self._save_last(report, is_best=is_best)
        elif not self._save_or_warn(report, is_best=is_best):
            self.progress.best = best_before  # the best that a checkpoint holds

    def _evaluate(self, report: RunReport, stop: StopOnSignal) -> dict[str, float]:
        def watch(done: int, total: int) -> None:
            report.evaluating(done, total)
            if stop.requested:
                raise Interrupted

        try:
            metrics = evaluate(self.config, self.extractor, self.data, device=self.device, on_batch=watch)
        except Interrupted:  # save out here: in there the random state is the evaluation's own
            self._stop(report)
        report.event("evaluation", self.step, epoch=self.epoch, **metrics)
        return metrics

    def _stop(self, report: RunReport, *, is_best: bool = False) -> NoReturn:
        self._save_last(report, is_best=is_best)
        raise Interrupted(f"stopped after step {self.step}; continue with --resume")

    def _save_or_warn(self, report: RunReport, *, is_best: bool = False) -> bool:
        # A full disk in the middle of a run costs a checkpoint, not the run: the earlier ones are whole.
        try:
            report.event("checkpoint", self.step, file=self.save(is_best=is_best).name)
        except OSError as error:
            report.warning(self.step, f"checkpoint of step {self.step} not written: {error}; earlier ones are whole")
            return False
        return True

    def _save_last(self, report: RunReport, *, is_best: bool = False) -> None:
        try:
            report.event("checkpoint", self.step, file=self.save(is_best=is_best).name)
        except OSError as error:
            raise CheckpointError(
                f"the last checkpoint could not be written: {error}; earlier ones are whole"
            ) from error


def _named(used: Optimizers) -> list[tuple[str, torch.optim.Optimizer]]:
    return [("extractor", used.extractor), ("graph", used.graph), ("classifier", used.classifier)]


def _last_line(error: Exception) -> str:
    """What an error says, without the traceback that a loader process puts before it."""
    lines = str(error).strip().splitlines()
    if "Traceback" in str(error):
        return lines[-1]
    return f"{type(error).__name__}: {' '.join(lines)}"
