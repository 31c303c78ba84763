"""Glyph sets in memory, and the packed arrays that they are read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gcng.data import GlyphDataset, check_disjoint_classes, load_glyphs, select_classes, split_classes
from gcng.data.glyphs import grid_dataset, pack_nibbles, unpack_nibbles


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    """Random images with full ink somewhere in each."""
    images = np.random.default_rng(seed).integers(0, 200, shape, dtype=np.uint8)
    images[..., 0, 0] = 255
    return images


def write_omniglot(path: Path, **changes: object) -> np.ndarray:
    x = pictures(3, 5, 8, 8)
    arrays = {"x": x, "names": np.array(list("abcde")), "split": np.array([0, 0, 0, 1, 1])} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return x


def write_packed(path: Path, **changes: object) -> np.ndarray:
    grid = pictures(9, 2, 8, 8, seed=1)
    arrays = {
        "q": pack_nibbles(grid),
        "chars": np.arange(0x4E00, 0x4E09),
        "fonts": np.array(["Gothic", "Mincho"]),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return grid


def test_items_are_float_images_and_labels() -> None:
    images = pictures(4, 6, 6)
    dataset = GlyphDataset(images, [1, 0, 1, 0], ["a", "b"], samples=["w", "x", "y", "z"])
    image, label = dataset[2]
    assert (image.shape, image.dtype, label) == ((1, 6, 6), torch.float32, 1)
    assert torch.equal(image[0], torch.from_numpy(images[2]).float() / 255)
    assert image.max() == 1.0
    assert len(dataset) == 4
    assert dataset.targets.tolist() == [1, 0, 1, 0]


def test_reading_one_by_one_and_in_batches_agrees() -> None:
    dataset = GlyphDataset(pictures(7, 6, 6), range(7), list("abcdefg"))
    images, labels = dataset.batch([5, 0, 5])
    items = dataset.__getitems__([5, 0, 5])
    for place, index in enumerate([5, 0, 5]):
        assert torch.equal(images[place], dataset[index][0])
        assert torch.equal(items[place][0], dataset[index][0])
        assert labels[place] == items[place][1] == dataset[index][1]
    everything, all_labels = dataset.batch()
    assert everything.shape == (7, 1, 6, 6)
    assert all_labels.tolist() == list(range(7))
    loaded = torch.cat([batch for batch, _ in DataLoader(dataset, batch_size=3)])
    assert torch.equal(loaded, everything)


def test_the_transform_applies_to_items_and_batches_of_items() -> None:
    dataset = GlyphDataset(pictures(2, 6, 6), [0, 1], ["a", "b"], transform=lambda image: image * 0 + 7)
    assert dataset[0][0].unique().tolist() == [7.0]
    assert [image.unique().tolist() for image, _ in dataset.__getitems__([0, 1])] == [[7.0], [7.0]]
    assert dataset.batch()[0].max() == 1.0  # documented: without the transform


def test_a_selection_stays_in_one_array() -> None:
    dataset = grid_dataset(pictures(4, 3, 6, 6), list("abcd"), ["x", "y", "z"])
    chosen = select_classes(dataset, [3, 1])
    assert isinstance(chosen, GlyphDataset)
    assert chosen.classes == ["d", "b"]
    assert chosen.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert chosen.samples == ["x", "y", "z"] * 2
    assert torch.equal(chosen.images, torch.cat([dataset.images[9:12], dataset.images[3:6]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((2, 4, 4)), [0, 1], "ab"), TypeError, "images has dtype torch.float64; use uint8"),
        (
            (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], "ab"),
            ValueError,
            r"must be \(n, S, S\) or \(n, 1, S, S\), got",
        ),
        ((np.zeros((2, 4, 4), np.uint8), [0], "ab"), ValueError, "2 images but 1 targets"),
        (
            (np.zeros((2, 4, 4), np.uint8), [0, 2], "ab"),
            ValueError,
            "run from 0 to 2, but there are 2 classes",
        ),
        (
            (np.zeros((2, 4, 4), np.uint8), [-1, 0], "ab"),
            ValueError,
            "run from -1 to 0, but there are 2 classes",
        ),
        ((np.zeros((1, 4, 4), np.uint8), [0.0], "a"), TypeError, "targets must hold integers"),
    ],
)
def test_bad_arrays_are_refused(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        GlyphDataset(*arguments)


def test_sample_names_must_be_complete() -> None:
    with pytest.raises(ValueError, match="1 images but 2 sample names"):
        GlyphDataset(np.zeros((1, 4, 4), np.uint8), [0], ["a"], samples=["x", "y"])


def test_the_omniglot_layout(tmp_path: Path) -> None:
    x = write_omniglot(tmp_path / "omniglot_32.npz")
    train = load_glyphs(tmp_path / "omniglot_32.npz", "train")
    test = load_glyphs(str(tmp_path / "omniglot_32.npz"), "test")
    assert (train.classes, test.classes) == (["a", "b", "c"], ["d", "e"])
    assert test.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(test.images[:, 0].numpy().reshape(2, 3, 8, 8), x[:, 3:].transpose(1, 0, 2, 3))
    assert load_glyphs(tmp_path / "omniglot_32.npz", "all").classes == list("abcde")
    check_disjoint_classes(train, test)


def test_the_packed_layout_and_its_split(tmp_path: Path) -> None:
    grid = write_packed(tmp_path / "kanji16_4bit.npz")
    everything = load_glyphs(tmp_path / "kanji16_4bit.npz", "all")
    assert everything.classes == [chr(c) for c in range(0x4E00, 0x4E09)]
    assert everything.samples[:2] == ["Gothic", "Mincho"]
    assert np.array_equal(everything.images.numpy().reshape(9, 2, 8, 8), (grid >> 4) * 17)
    train, test = (load_glyphs(tmp_path / "kanji16_4bit.npz", split) for split in ("train", "test"))
    order = np.random.default_rng(100).permutation(9)
    assert train.classes == [chr(0x4E00 + c) for c in order[:4]]
    assert test.classes == [chr(0x4E00 + c) for c in order[4:]]
    assert torch.equal(train.images, everything.select_classes(split_classes(9)[0]).images)


def test_the_left_pixel_is_the_high_nibble() -> None:
    assert unpack_nibbles(np.array([[0xF1]], np.uint8)).tolist() == [[255, 17]]
    assert pack_nibbles(np.array([[255, 31]], np.uint8)).tolist() == [[0xF1]]


def test_classes_with_an_empty_glyph_are_dropped_before_the_split(tmp_path: Path) -> None:
    q = pack_nibbles(pictures(9, 2, 8, 8, seed=1))
    q[2, 1] = 0
    q[5, 0] = 0x77  # a hairline: nowhere half of the full grey
    write_packed(tmp_path / "x_4bit.npz", q=q)
    kept = [c for c in range(9) if c not in (2, 5)]
    assert load_glyphs(tmp_path / "x_4bit.npz", "all").classes == [chr(0x4E00 + c) for c in kept]
    order = np.random.default_rng(100).permutation(7)
    assert load_glyphs(tmp_path / "x_4bit.npz").classes == [chr(0x4E00 + kept[c]) for c in order[:3]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("omniglot_32.npz", r"images_background.zip and images_evaluation.zip .*gcng.data.omniglot"),
        ("kanji16_4bit.npz", r"save_glyphs\(gcng.data.render_kanji16\(\), path\)"),
        ("hangul16_4bit.npz", r"save_glyphs\(gcng.data.render_hangul16\(\), path\)"),
        ("mine.npz", r"check the path; gcng.data.matplotlib_letters\(\)"),
    ],
)
def test_a_missing_file_says_how_to_get_it(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_glyphs(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((3, 5, 8, 8))}, r"x is float64 \(3, 5, 8, 8\); expected uint8"),
        (
            {"x": np.zeros((3, 5, 8, 4), np.uint8)},
            r"x is uint8 \(3, 5, 8, 4\); expected uint8 \(samples, classes, S, S\)",
        ),
        ({"names": np.array(["a"])}, r"names has shape \(1,\), expected \(5,\)"),
        ({"split": None}, "has no array 'split', only names, x"),
        ({"split": np.array([0, 1, 2, 0, 1])}, "split holds values other than 0"),
        ({"x": None}, r"has the arrays names, split; expected x, names, split .* or q, chars, fonts"),
    ],
)
def test_bad_omniglot_arrays_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write_omniglot(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_glyphs(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": np.zeros((9, 2, 8, 8), np.uint8)},
            r"q is uint8 \(9, 2, 8, 8\); expected uint8 \(classes, fonts, S, S / 2\)",
        ),
        ({"chars": np.arange(8)}, r"chars has shape \(8,\), expected \(9,\)"),
        ({"fonts": None}, "has no array 'fonts'"),
    ],
)
def test_bad_packed_arrays_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write_packed(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_glyphs(tmp_path / "bad.npz")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kanji16_4bit.npz"
    write_packed(path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:300] + b"\xff" * 40 + whole[340:]):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"cannot read .*kanji16_4bit.npz as .npz .*fetch or build it again"
        ):
            load_glyphs(path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    write_omniglot(tmp_path / "bad.npz", names=np.array([Bomb()] * 5, dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_glyphs(tmp_path / "bad.npz")
    assert not (tmp_path / "exploded").exists()


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_glyphs: split must be one of train, test, all, got 'val'"):
        load_glyphs(tmp_path / "any.npz", "val")
