"""The JSONL manifest: splits, paths, labels, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gcng.data import Manifest

image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")

ROWS = [
    {"path": "a/1.png", "label": "cat", "split": "train", "camera": 4},
    {"path": "a/2.png", "label": "ant", "split": "train"},
    {"path": "a/3.png", "label": "cat", "split": "train"},
    {"path": "b/4.png", "label": "dog", "split": "test"},
    {"path": "b/5.png", "label": "bee"},
]


def write(folder: Path, rows: list) -> Path:
    path = folder / "images.jsonl"
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("path"), str) and row["path"].endswith("png"):
            (folder / row["path"]).parent.mkdir(exist_ok=True)
            image_module.new("RGB", (4, 4)).save(folder / row["path"])
    return path


def test_splits_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    train = Manifest(path, "train")
    assert train.classes == ["ant", "cat"]
    assert train.targets.tolist() == [1, 0, 1]
    assert [str(p.relative_to(tmp_path)) for p in train.paths] == ["a/1.png", "a/2.png", "a/3.png"]
    assert train.sources == [f"{path}:1", f"{path}:3", f"{path}:5"]  # blank lines count
    assert train[2][0].shape == (3, 4, 4)
    assert Manifest(str(path), "test").classes == ["dog"]
    assert Manifest(path).classes == ["ant", "bee", "cat", "dog"]


def test_integer_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": n} for n in (10, 9, -1)]
    dataset = Manifest(write(tmp_path, rows))
    assert dataset.classes == ["-1", "9", "10"]
    assert dataset.targets.tolist() == [2, 1, 0]


def test_paths_may_start_from_another_folder_or_be_absolute(tmp_path: Path) -> None:
    images, lists = tmp_path / "images", tmp_path / "lists"
    images.mkdir()
    lists.mkdir()
    write(images, ROWS)
    rows = [ROWS[0], {"path": str(images / "b/4.png"), "label": "dog"}]
    path = lists / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    dataset = Manifest(path, root=images)
    assert dataset.paths == [images / "a/1.png", images / "b/4.png"]
    with pytest.raises(FileNotFoundError, match=r"no image .*lists/a/1.png, listed in .*m.jsonl:1"):
        Manifest(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"path": "x.png"', r":3: no valid JSON \(.* at column 17\); expected one object"),
        ("[1, 2]", ":3: got list, expected an object with path and label"),
        ({"label": "cat"}, ":3: no key 'path', only label"),
        ({"path": "x.png", "lable": "cat"}, ":3: no key 'label', only lable, path"),
        ({"path": 5, "label": "cat"}, ":3: path must be text, got 5"),
        ({"path": "", "label": "cat"}, ":3: path must be text, got ''"),
        ({"path": "x", "label": 1.5}, ":3: label must be text or an integer, got 1.5"),
        ({"path": "x", "label": True}, ":3: label must be text or an integer, got True"),
        ({"path": "x", "label": None}, ":3: label must be text or an integer, got None"),
        ({"path": "x", "label": "cat", "split": 1}, ":3: split must be text, got 1"),
        ({"path": "x", "label": 7}, ":3: label 7 is int, but line 1 has str; use one kind"),
        ({"path": "a/1.png", "label": "cat", "split": "train"}, ":3: a/1.png is listed in line 1 already"),
        ({"path": "./a//1.png", "label": "cat", "split": "test"}, ":3: ./a//1.png is listed in line 1 already"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path, [ROWS[0], row])
    with pytest.raises(ValueError, match=f"Manifest: {path}{message}"):
        Manifest(path)


def test_missing_files_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*images.jsonl; expected JSON lines"):
        Manifest(tmp_path / "images.jsonl")
    path = write(tmp_path, ROWS)
    with pytest.raises(ValueError, match="has no line of the split 'val'; its splits are test, train"):
        Manifest(path, "val")
    path.write_text("\n")
    with pytest.raises(ValueError, match="images.jsonl has no lines"):
        Manifest(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Manifest(path)
