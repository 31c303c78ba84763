"""What a run writes while it goes on: the JSON-lines log, the progress bar, TensorBoard scalars.

Owns the log format: one JSON object a line, with ``kind`` (``start``, ``step``, ``epoch``, ``evaluation``,
``skipped``, ``warning``, ``error``, ``checkpoint``, ``end``) and ``step``. No failure to write a record ends a run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from gcng.training.config import Config
from gcng.training.errors import ConfigError


class RecordLog:
    """Append-only JSON-lines file; every record is flushed, so a killed run keeps all but a cut last line.

    Args:
        path: File to append to; its folder is made. A cut last line is closed first, so that it spoils no
            record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        needs_newline = self.path.exists() and self.path.stat().st_size > 0 and not self._ends_with_newline()
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._failed = False
        if needs_newline:
            self._file.write("\n")

    def _ends_with_newline(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record. A full disk is reported on stderr once and costs records, not the run."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        line = json.dumps(json_ready(record), allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failed:
                print(f"gcng: log {self.path} cannot be written: {error}", file=sys.stderr)
            self._failed = True

    def close(self) -> None:
        """Close the file; writing is over."""
        try:
            self._file.close()
        except OSError:  # what is left in its buffer does not fit on the disk either
            self._failed = True


def json_ready(value: Any) -> Any:
    """Plain values with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return value


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a log, in order, each step once.

    Where a run was killed and resumed from an earlier checkpoint, the file holds the steps between the two twice; what
    came before a ``start`` and lies beyond its step is left out, as are lines that a kill cut short.
    """
    records: list[dict[str, Any]] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict):
                continue
            if record.get("kind") == "start":
                records = [earlier for earlier in records if earlier.get("step", 0) <= record.get("step", 0)]
            records.append(record)
    return records


class ProgressBar:
    """One line on a terminal that is rewritten a few times a second; silent where ``stream`` is none.

    Args:
        mode: ``on``, ``off``, or ``auto``: on where ``stream`` is a terminal.
        stream: Where to draw; stderr by default, so results on stdout stay clean.
    """

    interval = 0.2

    def __init__(self, mode: str = "auto", stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.enabled = mode == "on" or (mode == "auto" and self._stream.isatty())
        self._drawn = float("-inf")
        self._began: tuple[int, float] | None = None
        self._width = 0

    def is_due(self) -> bool:
        """Whether the next update would be drawn."""
        return self.enabled and time.monotonic() - self._drawn >= self.interval

    def update(self, label: str, done: int, total: int, values: Mapping[str, Any]) -> None:
        """Show ``done`` of ``total`` with a few named numbers, unless the last update was a moment ago."""
        if not self.is_due():
            return
        now = time.monotonic()
        if self._began is None or done <= self._began[0]:
            self._began = (done - 1, now)
        rate = (done - self._began[0]) / (now - self._began[1]) if now > self._began[1] else 0.0
        filled = 20 * done // max(total, 1)
        left = f" {(total - done) / rate:4.0f} s left" if rate else ""
        numbers = " ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        bar = "#" * filled + "." * (20 - filled)
        self._draw(f"{label} [{bar}] {done}/{total}{left}  {numbers}")
        self._drawn = now

    def message(self, text: str) -> None:
        """A line of its own, above the bar (also where the bar is off)."""
        self.clear()
        print(text, file=self._stream, flush=True)

    def clear(self) -> None:
        """Take the bar off the terminal."""
        if self._width:
            self._draw("")
            self._stream.write("\r")
            self._width = 0

    def _draw(self, line: str) -> None:
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)


class TensorBoardScalars:
    """TensorBoard scalars, where asked for.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "logging.tensorboard needs the tensorboard package: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Add each number as ``prefix/name`` at ``step``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class RunReport:
    """Everything that one run tells: log, bar and scalars, as the configuration asks for.

    Args:
        config: Gives the output folder, the intervals and the kinds of report.
        stream: Where bar and messages go; stderr by default.

    Raises:
        ConfigError: The output folder cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(self, config: Config, *, stream: TextIO | None = None) -> None:
        self._every = config.logging.every
        self._epochs = config.schedule.epochs
        self.bar = ProgressBar(config.logging.progress, stream)
        folder = Path(config.run.output)
        try:
            self.log = RecordLog(folder / "log.jsonl")
        except OSError as error:
            raise ConfigError(f"run.output: {folder} cannot be written: {error}") from None
        self._scalars: TensorBoardScalars | None = None
        if config.logging.tensorboard:
            try:
                self._scalars = TensorBoardScalars(folder / "tensorboard")
            except ModuleNotFoundError as error:
                raise ConfigError(str(error)) from None

    def step(self, terms: Any, *, step: int, epoch: int, done: int, total: int) -> None:
        """Report a step. Numbers are read from the device only where they are shown or written."""
        values = terms.named()
        shown = {name: values[name] for name in ("n_pair", "metric", "classifier", "generator") if name in values}
        self.bar.update(f"epoch {epoch + 1}/{self._epochs}", done, total, shown)
        if step % self._every == 0 and not terms.skipped:
            numbers = {name: float(value) for name, value in values.items()}
            self.event("step", step, epoch=epoch, **numbers)

    def evaluating(self, done: int, total: int) -> None:
        """Show how far the embedding of a data set is."""
        self.bar.update("embedding", done, total, {})

    def event(self, kind: str, step: int, **values: Any) -> None:
        """One log record; its numbers also become scalars."""
        self.log.write(kind, step, **values)
        if self._scalars is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            self._scalars.write(step, numbers, kind)

    def warning(self, step: int, text: str) -> None:
        """A line for the reader and a record."""
        self.bar.message(f"gcng: {text}")
        self.event("warning", step, text=text)

    def close(self) -> None:
        """Take the bar away and close the files."""
        self.bar.clear()
        self.log.close()
        if self._scalars is not None:
            self._scalars.close()
