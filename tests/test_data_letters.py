"""The letters of the matplotlib wheel: rendering, merging of look-alikes, and the cache."""

from __future__ import annotations

import logging
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from gcng.data import (
    FontFace,
    check_disjoint_classes,
    letters,
    matplotlib_letters,
    merge_look_alikes,
    render_glyphs,
)
from gcng.data.glyphs import has_ink
from gcng.data.rendering import GlyphGrid

pytest.importorskip("PIL", reason="rendering needs Pillow")
pytest.importorskip("matplotlib", reason="the fonts come with matplotlib")

LATIN, CYRILLIC_A, GREEK_ALPHA = [ord(c) for c in "ABCDEFGhijk"], 0x0410, 0x0391


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the full set, rendered once for this file."""
    folder = tmp_path_factory.mktemp("letters")
    matplotlib_letters("all", cache=folder)
    return folder


def test_the_full_set_has_1199_classes_of_12(cache: Path) -> None:
    everything = matplotlib_letters("all", cache=cache)
    assert len(everything.classes) == len(set(everything.classes)) == 1199
    assert everything.targets.bincount().tolist() == [12] * 1199
    assert everything.images.shape == (1199 * 12, 1, 32, 32)
    assert has_ink(everything.images.numpy().reshape(1199, 12, 32, 32)).all()
    assert {unicodedata.category(name) for name in everything.classes} <= {"Lu", "Ll", "Lt", "Lo", "Nd"}
    assert everything.samples[:12] == list(letters.FACES)


def test_train_and_test_are_disjoint_halves(cache: Path) -> None:
    train, test = matplotlib_letters("train", cache=cache), matplotlib_letters("test", cache=cache)
    assert (len(train.classes), len(test.classes)) == (599, 600)
    check_disjoint_classes(train, test)
    everything = matplotlib_letters("all", cache=cache)
    assert set(train.classes) | set(test.classes) == set(everything.classes)
    order = np.random.default_rng(100).permutation(1199)
    assert train.classes == [everything.classes[c] for c in order[:599]]


def test_rendering_is_deterministic() -> None:
    first, second = letters.render_letters(LATIN), letters.render_letters(LATIN)
    assert first.characters == tuple(LATIN)
    assert np.array_equal(first.images, second.images)
    assert first.images.dtype == np.uint8


def test_look_alikes_across_scripts_are_merged_into_the_lowest_code_point() -> None:
    grid = letters.render_letters([*LATIN, GREEK_ALPHA, CYRILLIC_A])
    assert grid.characters == tuple(LATIN)


def test_merging_needs_likeness_in_every_compared_face() -> None:
    images = np.zeros((3, 2, 4, 4), np.uint8)
    images[:, :, 0] = 255
    images[1, 1] = 0
    images[1, 1, :, 0] = 255  # the second character differs in the second face
    grid = GlyphGrid(images, (65, 66, 67), ("x", "y"))
    assert merge_look_alikes(grid, [0]).characters == (65,)
    assert merge_look_alikes(grid, [0, 1]).characters == (65, 66)
    assert merge_look_alikes(grid, [1]).characters == (65, 66)


def test_look_alikes_chain() -> None:
    row = np.arange(16, dtype=np.float64)
    images = np.stack([np.roll(np.where(row < 12, 255, 0), shift) for shift in (0, 1, 2)])
    grid = GlyphGrid(images.astype(np.uint8).reshape(3, 1, 4, 4), (1, 2, 3), ("x",))
    # Neighbors share 11 of 12 pixels, the ends 10: cosines 0.917 and 0.833.
    assert merge_look_alikes(grid, [0], threshold=0.9).characters == (1,)
    assert merge_look_alikes(grid, [0], threshold=0.92).characters == (1, 2, 3)


def test_empty_images_are_never_merged() -> None:
    grid = GlyphGrid(np.zeros((2, 1, 4, 4), np.uint8), (1, 2), ("x",))
    assert merge_look_alikes(grid, [0]).characters == (1, 2)


def test_glyphs_fill_the_box_and_stay_inside() -> None:
    face = letters.letter_faces()[0]
    grid = render_glyphs([face], [*range(65, 91)])
    extents = []
    for image in grid.images[:, 0]:
        rows, columns = np.nonzero(image)
        extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert 0.85 * 32 < np.percentile(extents, 95) <= 32
    wide = render_glyphs(
        [face], [*range(97, 123), 0x01C4]
    )  # the digraph is far wider than the sampled letters
    image = wide.images[-1, 0]
    assert image.any()
    assert not image[:, 0].any() or not image[:, -1].any()


def test_characters_that_the_font_does_not_draw_are_left_black() -> None:
    grid = render_glyphs(letters.letter_faces()[:1], [65, 0x200B, 0x20, 0xE000, 66])
    assert has_ink(grid.images).tolist() == [True, False, False, False, True]


def test_bad_fonts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no font file .*absent.ttf \(face Absent\)"):
        render_glyphs([FontFace("Absent", tmp_path / "absent.ttf")], [65])
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"cannot open .*bad.ttf, index 0, at size"):
        render_glyphs([FontFace("Bad", tmp_path / "bad.ttf")], [65])
    face = letters.letter_faces()[0]
    with pytest.raises(ValueError, match="draws none of 1 sampled characters; is it a font of this script"):
        render_glyphs([face], [0x20])
    with pytest.raises(ValueError, match="got 1 faces, 0 characters, size 32"):
        render_glyphs([face], [])


def test_the_cache_is_used_and_gives_the_same_images(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = list(cache.iterdir())
    assert [file.suffix for file in files] == [".npz"]
    first = matplotlib_letters("train", cache=cache)

    def refuse() -> GlyphGrid:
        raise RuntimeError("rendered although the cache holds it")

    monkeypatch.setattr(letters, "render_letters", refuse)
    assert torch.equal(matplotlib_letters("train", cache=cache).images, first.images)
    with pytest.raises(RuntimeError, match="rendered although"):
        matplotlib_letters("train", cache=False)


def test_the_default_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert letters.cache_folder() == tmp_path / "gcng"
    for value in ("", "relative"):  # the standard says that relative paths are to be ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert letters.cache_folder() == tmp_path / "home" / ".cache" / "gcng"


def few_letters() -> GlyphGrid:
    grid = letters.render_letters(LATIN)
    return GlyphGrid(grid.images, grid.characters, letters.FACES)


def test_a_damaged_cache_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = few_letters()
    monkeypatch.setattr(letters, "render_letters", lambda: grid)
    first = matplotlib_letters("all", cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-2000] + b"\0" * 2000):
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING, logger="gcng.data"):
            again = matplotlib_letters("all", cache=tmp_path)
        assert "ignoring the damaged cache" in caplog.text
        assert torch.equal(again.images, first.images)
        assert path.read_bytes() == whole or np.load(path)["images"].shape == grid.images.shape
    np.savez(path, images=grid.images[:, :3], characters=np.array(grid.characters))
    assert torch.equal(matplotlib_letters("all", cache=tmp_path).images, first.images)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = few_letters()
    monkeypatch.setattr(letters, "render_letters", lambda: grid)
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="gcng.data"):
        dataset = matplotlib_letters("all", cache=tmp_path / "file" / "cache")
    assert len(dataset.classes) == len(LATIN)
    assert "cannot write the cache" in caplog.text


def test_a_full_disk_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = few_letters()
    monkeypatch.setattr(letters, "render_letters", lambda: grid)

    def full(file: object, **arrays: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert len(matplotlib_letters("all", cache=tmp_path).classes) == len(LATIN)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, package in (("fontTools.ttLib", "fonttools"), ("matplotlib", "matplotlib")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.setitem(sys.modules, module.split(".")[0], None)
            with pytest.raises(
                ModuleNotFoundError, match=f"needs the package {package}, .*: pip install {package}"
            ):
                matplotlib_letters(cache=False)


def test_fonts_that_a_distribution_left_out_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import matplotlib

    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"lacks DejaVuSans.ttf, .*pip install --force-reinstall matplotlib"
    ):
        matplotlib_letters(cache=tmp_path / "cache")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(
        ValueError, match="matplotlib_letters: split must be one of train, test, all, got 'val'"
    ):
        matplotlib_letters("val")
