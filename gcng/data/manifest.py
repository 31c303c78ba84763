"""A JSONL manifest of images: one JSON object per line with path, label and split."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcng.data.images import ImageDataset
from gcng.data.partitions import Listed, check_first_and_last, read_lines


class Manifest(ImageDataset):
    """Images listed in a JSONL file: ``{"path": "a/1.jpg", "label": "cat", "split": "train"}`` per line.

    Paths are relative to ``root``, by default the manifest's folder. Labels are all text or all integers;
    classes are numbered in their sorted order. ``split`` may be any text; lines without it belong to no split
    and are read with ``split=None`` only. Other keys are ignored, blank lines skipped.

    Args:
        path: the JSONL file.
        split: lines to read; None reads all.
        root: folder that relative paths start from; None is the manifest's folder.
        transform, mode: see `ImageDataset`.

    Raises:
        FileNotFoundError: the manifest or its first image is absent.
        ValueError: a line that is no such object, a path listed twice, or no line of the split; names the
            line.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        *,
        root: str | Path | None = None,
        transform: Callable[[Any], Any] | None = None,
        mode: str = "RGB",
    ) -> None:
        path = Path(path)
        base = path.parent if root is None else Path(root)
        lines = read_lines(
            path, "Manifest", remedy='expected JSON lines {"path": ..., "label": ..., "split": ...}'
        )
        records = [_record(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        _check_records(path, records, split)
        known = sorted({record["split"] for record in records if record["split"] is not None})
        if split is not None:
            records = [record for record in records if record["split"] == split]
        if not records:
            raise ValueError(
                f"Manifest: {path} has no line of the split {split!r}; its splits are "
                f"{', '.join(known) or '(none)'}"
                if split is not None
                else f"Manifest: {path} has no lines"
            )
        labels = sorted({record["label"] for record in records})
        rank = {label: number for number, label in enumerate(labels)}
        items = [
            Listed(base / record["path"], str(record["label"]), str(split), f"{path}:{record['line']}")
            for record in records
        ]
        check_first_and_last(items, "Manifest", base)
        super().__init__(
            [item.path for item in items],
            [rank[record["label"]] for record in records],
            [str(label) for label in labels],
            transform=transform,
            mode=mode,
            sources=[item.source for item in items],
        )
        self.root = base


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    place = f"Manifest: {path}:{number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: no valid JSON ({error.msg} at column {error.colno}); expected one object"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: got {type(value).__name__}, expected an object with path and label")
    for key in ("path", "label"):
        if key not in value:
            raise ValueError(f"{place}: no key {key!r}, only {', '.join(sorted(value)) or '(none)'}")
    if not isinstance(value["path"], str) or not value["path"]:
        raise ValueError(f"{place}: path must be text, got {value['path']!r}")
    if isinstance(value["label"], bool) or not isinstance(value["label"], str | int):
        raise ValueError(f"{place}: label must be text or an integer, got {value['label']!r}")
    if not isinstance(value.get("split"), str | None):
        raise ValueError(f"{place}: split must be text, got {value['split']!r}")
    return {"path": value["path"], "label": value["label"], "split": value.get("split"), "line": number}


def _check_records(path: Path, records: list[dict[str, Any]], split: str | None) -> None:
    first: dict[tuple[str, str | None], int] = {}
    for record in records:
        if type(record["label"]) is not type(records[0]["label"]):
            raise ValueError(
                f"Manifest: {path}:{record['line']}: label {record['label']!r} is "
                f"{type(record['label']).__name__}, but line {records[0]['line']} has "
                f"{type(records[0]['label']).__name__}; use one kind in the whole file"
            )
        # Whoever reads all splits as one dataset would have an image of two splits twice.
        key = (os.path.normpath(record["path"]), record["split"] if split is not None else None)
        if key in first:
            raise ValueError(
                f"Manifest: {path}:{record['line']}: {record['path']} is listed in line {first[key]} "
                "already; an image that comes twice would find itself in retrieval, so list it once"
            )
        first[key] = record["line"]
