"""Text files that list images: reading their lines with errors that name file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listed:
    """One image of a list: its file, class and split, and ``"file:line"``."""

    path: Path
    label: str
    split: str
    source: str


def read_lines(path: Path, owner: str, *, remedy: str) -> list[str]:
    """All lines of a UTF-8 text file.

    Raises:
        FileNotFoundError: the file is absent; ``remedy`` says what should be there.
        ValueError: it is not text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: no file {path}; {remedy}")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{owner}: {path} is not UTF-8 text ({error}); fetch it again") from error


def split_fields(
    lines: Sequence[str], path: Path, owner: str, fields: Sequence[str], *, skip: int = 0
) -> Iterator[tuple[str, list[str]]]:
    """(``"file:line"``, fields) of every non-blank line after the first ``skip``.

    The last field takes the rest of the line, so that a file name may hold spaces.

    Raises:
        ValueError: a line has too few fields.
    """
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if not line.strip():
            continue
        parts = line.strip().split(maxsplit=len(fields) - 1)
        if len(parts) != len(fields):
            raise bad_line(owner, path, number, line, f"{len(fields)} fields, {' '.join(fields)}")
        yield f"{path}:{number}", parts


def bad_line(owner: str, path: Path, number: int, line: str, wanted: str) -> ValueError:
    """The error for a line of a list that cannot be used."""
    shown = line.strip() if len(line.strip()) <= 120 else line.strip()[:117] + "..."
    return ValueError(
        f"{owner}: {path}:{number}: got {shown!r}, expected {wanted}; the file is damaged or of another "
        "kind, fetch it again"
    )


def check_first_and_last(items: Sequence[Listed], owner: str, root: Path) -> None:
    """Find a wrong root early: the first and the last listed image must exist.

    All of them are not looked at, since that takes long on network disks; `ImageDataset.verify` does.
    """
    for item in (items[0], items[-1]):
        if not item.path.is_file():
            raise FileNotFoundError(
                f"{owner}: no image {item.path}, listed in {item.source}; {root} is not the root of the data "
                "set, or its images are not unpacked"
            )
