"""Crash-safe checkpoint files.

Owns the file format and the folder of a run. A checkpoint is an ordinary ``torch.save`` archive whose zip
comment carries a checksum, so one file holds everything and ``torch.load(path, weights_only=True)`` still
opens it anywhere. It is written to a temporary file in the same folder, flushed to the disk, renamed, and the
folder is flushed too: a kill or a full disk at any moment leaves the earlier checkpoints whole.

Comment layout: ``gcng-checkpoint`` SPACE sha256 (64 hex digits) SPACE JSON. The digest covers every byte of
the archive before the two-byte comment length, and the JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcng._version import __version__
from gcng.training.errors import CheckpointError

FORMAT_VERSION = 1
_MAGIC = b"gcng-checkpoint"
_COMMENT_LENGTH = struct.Struct("<H")
_MAX_COMMENT = 0xFFFF
_END_RECORD = b"PK\x05\x06"
_NAME = re.compile(r"step-(\d{9})\.pt")


def save_checkpoint(path: str | Path, state: dict[str, Any], *, manifest: dict[str, Any] | None = None) -> None:
    """Write ``state`` to ``path`` atomically: afterwards ``path`` is either the old file or the whole new
    one.

    Args:
        path: Target; its folder must exist. The temporary file lies beside it.
        state: Nested dictionaries, lists and tuples of tensors, numbers, strings, booleans and None: what
            ``torch.load(weights_only=True)`` reads back.
        manifest: A few JSON values readable without loading (step, epoch ...).

    Raises:
        OSError: No space, no permission ... The earlier file at ``path``, if any, is untouched.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    content = {"format": FORMAT_VERSION, "gcng": __version__, "torch": torch.__version__, **(manifest or {})}
    note = json.dumps(content, sort_keys=True).encode()
    try:
        with open(partial, "w+b") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch wraps a failed write; its cause is the OSError
                raise OSError(f"writing {partial}: {error}") from error
            _append_comment(file, note)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _append_comment(file, note: bytes) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(size - _COMMENT_LENGTH.size)
    if size < 22 or file.read(_COMMENT_LENGTH.size) != b"\0\0":
        raise OSError(f"writing {file.name}: torch.save left an archive of {size} bytes with an unexpected end")
    digest = _digest(file, size - _COMMENT_LENGTH.size, note)
    comment = b" ".join([_MAGIC, digest.encode(), note])
    if len(comment) > _MAX_COMMENT:
        raise ValueError(f"save_checkpoint: manifest takes {len(note)} bytes, at most {_MAX_COMMENT - 100} fit")
    file.seek(size - _COMMENT_LENGTH.size)
    file.write(_COMMENT_LENGTH.pack(len(comment)) + comment)


def _digest(file, size: int, note: bytes) -> str:
    """SHA-256 of the first ``size`` bytes of ``file``, then of ``note``."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0:
        block = file.read(min(size, 1 << 20))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    digest.update(note)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its folder is; platforms that cannot open a folder have no such step.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Verify the checksum of a checkpoint and return its manifest, loading nothing.

    Raises:
        CheckpointError: Missing, cut, changed, not ours, or written by a newer format. Names the file and
            cause.
    """
    try:
        with open(path, "rb") as file:
            return _verified_manifest(file, path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None


def _verified_manifest(file, path: str | Path) -> dict[str, Any]:
    size = file.seek(0, os.SEEK_END)
    tail_size = min(size, _MAX_COMMENT + 22)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    start = tail.rfind(_END_RECORD + b"\0\0")
    comment_at = start + 22
    if start < 0 or not tail[comment_at:].startswith(_MAGIC + b" "):
        raise CheckpointError(f"checkpoint {path} is not a whole gcng checkpoint (its end record is missing)")
    comment = tail[comment_at:]
    (length,) = _COMMENT_LENGTH.unpack(tail[comment_at - 2 : comment_at])
    note = comment[len(_MAGIC) + 66 :]
    expected = _digest(file, size - len(comment) - _COMMENT_LENGTH.size, note).encode()
    if length != len(comment) or comment != b" ".join([_MAGIC, expected, note]):
        raise CheckpointError(f"checkpoint {path} is damaged: its checksum does not match its content")
    manifest = json.loads(note)
    if manifest["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {manifest['format']} (gcng {manifest['gcng']}); this gcng reads "
            f"up to {FORMAT_VERSION}: upgrade gcng"
        )
    return manifest


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Verify a checkpoint, then load it onto the CPU.

    Nothing in the file can run code: only tensors and plain values are read (``weights_only=True``).

    Raises:
        CheckpointError: As :func:`read_manifest`, and for content other than tensors and plain values.
    """
    read_manifest(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, key and runtime errors here; all mean one thing
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error


def _file_name(step: int) -> str:
    return f"step-{step:09d}.pt"


@dataclass(frozen=True)
class Loaded:
    """A usable checkpoint and what was wrong with newer ones."""

    path: Path
    state: dict[str, Any]
    problems: tuple[str, ...]


def _is_alive(pid: str) -> bool:
    """Whether another process of this machine may still be writing; what is no process number was never ours."""
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, or not to be told
    return True


class CheckpointFolder:
    """The checkpoints of one run: ``step-000000012.pt`` files and ``best.json``, which names one of them.

    Args:
        folder: Made when the first checkpoint is saved.
        keep: Files to keep up to the one just written, newest first, beside the best one.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def files(self) -> list[Path]:
        """Checkpoint files, newest first. Unfinished temporary files are not among them."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)

    def files_beyond(self, step: int) -> list[Path]:
        """Files of later steps than ``step``, newest first."""
        return [path for path in self.files() if path.name > _file_name(step)]

    def best_file(self) -> Path | None:
        """The checkpoint with the best evaluation, or None."""
        try:
            name = str(json.loads((self.folder / "best.json").read_text())["file"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        path = self.folder / name
        return path if _NAME.fullmatch(name) and path.is_file() else None  # a bare name: never in another folder

    def save(self, step: int, state: dict[str, Any], *, manifest: dict[str, Any], is_best: bool = False) -> Path:
        """Write the checkpoint of ``step``, point ``best.json`` at it if asked to, remove old ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _file_name(step)
        save_checkpoint(path, state, manifest={"step": step, **manifest})
        if is_best:
            self._point_best_at(path, manifest)
        self._remove_old(path)
        return path

    def _point_best_at(self, path: Path, manifest: dict[str, Any]) -> None:
        partial = self.folder / f"best.json.tmp.{os.getpid()}"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                json.dump({"file": path.name, **manifest}, file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / "best.json")
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        _sync_folder(self.folder)

    def _remove_old(self, written: Path) -> None:
        best = self.best_file()
        # Files beyond the one just written are damaged, or of another branch: they neither count nor go.
        for path in [path for path in self.files() if path.name <= written.name][self.keep :]:
            if path != best:
                path.unlink(missing_ok=True)
        for path in self.folder.glob("*.tmp.*"):  # left by a process that was killed while it wrote
            if not _is_alive(path.suffix[1:]):
                path.unlink(missing_ok=True)

    def load_newest(self, check: Callable[[dict[str, Any]], None] = lambda state: None) -> Loaded:
        """Load the newest usable checkpoint; damaged newer ones are skipped and named in ``problems``.

        Args:
            check: Called with each candidate's state; a ``CheckpointError`` from it counts as damage.

        Raises:
            CheckpointError: None is usable. Lists what is wrong with each.
        """
        problems: list[str] = []
        for path in self.files():
            try:
                state = load_checkpoint(path)
                check(state)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                return Loaded(path, state, tuple(problems))
        detail = "; ".join(problems) if problems else f"{self.folder} holds none"
        raise CheckpointError(f"no usable checkpoint: {detail}")


@contextlib.contextmanager
def disk_errors_reported(report: Callable[[str], None]) -> Iterator[None]:
    """Turn an OSError inside the block into a call of ``report``: a full disk must not end a good run."""
    try:
        yield
    except OSError as error:
        report(f"checkpoint not written: {error}; earlier checkpoints are untouched")
