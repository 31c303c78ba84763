"""The command ``gcng``: results on stdout, messages on stderr, exit codes of ``gcng.training.errors``.

Owns the dispatch. Each command's work is in a module of its own, imported when the command runs, so that
help costs no torch import.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from gcng._version import __version__
from gcng.cli.arguments import COMMANDS, add_commands
from gcng.training.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError, RunError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after ``gcng``; None takes those of the process.

    Returns:
        0 done, 1 a sample or a step failed, 2 wrong arguments or configuration, 3 diverged, 4 checkpoint
        unusable, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="gcng",
        description="Train, evaluate and inspect models with globally correlation-aware hard negatives.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gcng {__version__}")
    add_commands(parser)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words, overrides = split_overrides(words)
        known = parser.parse_args(words)
        if overrides and not COMMANDS[known.command].takes_overrides:
            parser.error(f"gcng {known.command} takes no settings, got --{overrides[0]}")
    except ConfigError as error:
        print(f"gcng: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except SystemExit as leave:  # argparse has printed help, or what is wrong
        return int(leave.code or 0)
    known.overrides = overrides + list(getattr(known, "set", None) or [])
    return _run(known)


def _run(known: argparse.Namespace) -> int:
    command = COMMANDS[known.command]
    try:
        return importlib.import_module(f"gcng.cli.{command.module}").run(known)
    except RunError as error:
        print(f"gcng {known.command}: {error}", file=sys.stderr)
        return error.exit_code
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if not command.reports_input_errors:
            raise
        print(f"gcng {known.command}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except MemoryError as error:  # a memory budget that is too small; the message names its terms
        print(f"gcng {known.command}: {str(error) or 'out of memory'}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print(f"gcng {known.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--loss.alpha 4`` and ``--loss.alpha=4`` out of the words of a command line.

    Returns:
        The other words, and the settings as ``loss.alpha=4``.

    Raises:
        ConfigError: A setting without a value.
    """
    others: list[str] = []
    overrides: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        name, separator, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            others.append(word)
            continue
        if not separator:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{word} needs a value: {word} VALUE")
            value = remaining.pop(0)
        overrides.append(f"{name}={value}")
    return others, overrides
