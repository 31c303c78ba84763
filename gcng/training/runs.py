"""Starting a run: fresh, resumed, or dry.

Owns what happens before the first step and after the last one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, TextIO

import torch

from gcng.training.checkpoint import CheckpointFolder
from gcng.training.config import Config
from gcng.training.config_io import as_nested, to_toml
from gcng.training.embedding import evaluate
from gcng.training.errors import CheckpointError, ConfigError
from gcng.training.records import RunReport
from gcng.training.trainer import RunResult, Trainer


def fit(config: Config, *, resume: bool | str | Path = False, stream: TextIO | None = None, **parts: Any) -> RunResult:
    """Run a configuration to its end.

    Args:
        config: See :func:`gcng.training.load_config`.
        resume: False starts fresh and refuses a folder that holds checkpoints; True continues from the newest
            usable checkpoint of ``config.run.output`` and starts fresh where there is none; a path continues
            from that file.
        stream: Where progress goes; stderr by default.
        **parts: ``extractor``, ``data``, ``criterion``, ``on_step`` of :class:`gcng.training.Trainer`.

    Returns:
        How it ended. The folder holds ``log.jsonl``, ``config.toml`` and ``checkpoints/``.

    Raises:
        ConfigError, CheckpointError, DivergedError, Interrupted: Each has the ``exit_code`` that ``gcng``
            leaves with.

    Example:
        >>> result = fit(load_config("letters.toml"))
        >>> result.best["recall_at_1"]
    """
    folder = Path(config.run.output)
    used = bool(CheckpointFolder(folder / "checkpoints").files())
    if resume is False and used:
        raise ConfigError(f"run.output: {folder} already holds checkpoints; resume, or choose another folder")
    report = RunReport(config, stream=stream)
    try:
        # Weights that a checkpoint is about to replace are not fetched: a resume works offline.
        pretrained = False if used or resume not in (False, True) else None
        trainer = Trainer(config, pretrained=pretrained, **parts)
        loaded = trainer.resume(None if resume is True else resume) if resume else None
        for problem in loaded.problems if loaded is not None else ():
            report.warning(trainer.step, f"{problem}; going on from {loaded.path.name}")
        try:
            text = to_toml(as_nested(config), "The whole configuration of this run.")
            (folder / "config.toml").write_text(text, encoding="utf-8")
        except OSError as error:
            report.warning(trainer.step, f"config.toml not written: {error}")
        report.event("start", trainer.step, epoch=trainer.epoch, resumed=loaded is not None, device=str(trainer.device))
        result = trainer.fit(report)
        report.event("end", trainer.step, **dataclasses.asdict(result))
    finally:
        report.close()
    return result


def dry_run(config: Config, *, stream: TextIO | None = None, **parts: Any) -> dict[str, Any]:
    """One step of everything, in a temporary folder that is removed: data, step, evaluation, save, load.

    Returns:
        The terms of the step, the metrics on a few batches of the test set, the size of a checkpoint in
        bytes.

    Raises:
        As :func:`fit`; also CheckpointError where what was loaded differs from what was saved.
    """
    with tempfile.TemporaryDirectory(prefix="gcng-dry-run-") as folder:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output=folder))
        report = RunReport(config, stream=stream)
        try:
            trainer = Trainer(config, **parts)
            trainer.frozen.begin_epoch(0)
            terms = trainer.train_batch(*next(iter(trainer.loader)))
            metrics = None
            if trainer.data.test is not None:
                limit = 2 * config.evaluation.batch_size
                metrics = evaluate(config, trainer.extractor, trainer.data, device=trainer.device, limit=limit)
            path = trainer.save()
            again = Trainer(config, pretrained=False, **parts)
            again.resume(path)
            if not states_equal(trainer.state_dict(), again.state_dict()):
                raise CheckpointError("the state that was loaded differs from the one that was saved")
            return {
                "skipped": terms.skipped,
                "terms": {name: float(value) for name, value in terms.named().items()},
                "metrics": metrics,
                "checkpoint_bytes": path.stat().st_size,
            }
        finally:
            report.close()


def states_equal(first: Any, second: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit (a NaN equals nothing)."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(states_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(states_equal, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first.cpu(), second.cpu())
    return first == second
