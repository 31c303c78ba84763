"""The ways a run can end other than well, and the exit code of each."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DIVERGED = 3
EXIT_CHECKPOINT = 4
EXIT_INTERRUPTED = 130


class RunError(Exception):
    """A run cannot start or go on. ``exit_code`` is what ``gcng`` leaves with."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """A configuration key, value or file is wrong; nothing was started."""

    exit_code = EXIT_CONFIG


class DivergedError(RunError, RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    exit_code = EXIT_DIVERGED


class CheckpointError(RunError, RuntimeError):
    """A checkpoint cannot be used, or the last one of a run could not be written."""

    exit_code = EXIT_CHECKPOINT


class Interrupted(RunError):
    """A signal ended the run after the running step; the state was saved first."""

    exit_code = EXIT_INTERRUPTED
