"""Kanji-16 and Hangul-16: their characters, the search for fonts, and the file that they are kept in.

The fonts themselves are not on every machine: rendering is tested with the fonts of matplotlib under other
    names.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gcng.data import font_sets, load_glyphs, render_hangul16, render_kanji16, save_glyphs
from gcng.data.rendering import GlyphGrid

LETTERS = [ord(c) for c in "ABCDEFGH"]


def test_jis_level_1_has_2965_kanji_in_jis_order() -> None:
    kanji = font_sets.jis_level_1()
    assert len(kanji) == len(set(kanji)) == 2965
    assert "".join(map(chr, kanji[:3])) == "亜唖娃"
    assert chr(kanji[-1]) == "腕"
    assert all(0x4E00 <= c <= 0x9FFF for c in kanji)


def test_hangul_has_11172_syllables() -> None:
    syllables = font_sets.hangul_syllables()
    assert len(syllables) == 11172
    assert (chr(syllables[0]), chr(syllables[-1])) == ("가", "힣")


@pytest.mark.parametrize("faces", [font_sets.KANJI_FACES, font_sets.HANGUL_FACES])
def test_the_sets_have_16_faces_with_a_package_each(faces: tuple) -> None:
    assert len(faces) == len({face.name for face in faces}) == 16
    assert all(re.fullmatch(r"fonts-[a-z0-9-]+", face.package) for face in faces)


def fake_fonts(root: Path, faces: tuple) -> None:
    """matplotlib's fonts under the names of the set, in folders of their own."""
    letters = pytest.importorskip("gcng.data.letters")
    pytest.importorskip("matplotlib", reason="the fonts come with matplotlib")
    sources = [face.path for face in letters.letter_faces()]
    for number, face in enumerate(faces):
        target = root / face.package / face.file.replace("*", "_v4.003")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources[number % len(sources)], target)


@pytest.mark.parametrize(
    ("render", "faces"),
    [(render_kanji16, font_sets.KANJI_FACES), (render_hangul16, font_sets.HANGUL_FACES)],
)
def test_a_set_is_rendered_saved_and_read(tmp_path: Path, render, faces: tuple) -> None:
    fake_fonts(tmp_path / "fonts", faces)
    grid = render([tmp_path / "fonts"], characters=[*LETTERS, 0x20, 0xE000])
    assert grid.characters == tuple(LETTERS)  # what some font does not draw is dropped
    assert grid.faces == tuple(face.name for face in faces)
    assert grid.images.shape == (8, 16, 32, 32)
    save_glyphs(grid, tmp_path / "out" / "set_4bit.npz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set_4bit.npz"]
    read = load_glyphs(tmp_path / "out" / "set_4bit.npz", "all")
    assert read.classes == [chr(c) for c in LETTERS]
    assert read.samples[:16] == list(grid.faces)
    assert np.array_equal(read.images.numpy().reshape(8, 16, 32, 32), (grid.images >> 4) * 17)


def test_missing_fonts_name_their_packages(tmp_path: Path) -> None:
    fake_fonts(tmp_path, font_sets.KANJI_FACES)
    shutil.rmtree(tmp_path / "fonts-seto")
    (tmp_path / "fonts-mplus" / "Mplus1-Black.otf").unlink()
    message = (
        r"2 of 16 .* are not in .*: Mplus1-Black.otf, setofont.ttf; .*apt-get install fonts-mplus fonts-seto$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        render_kanji16([tmp_path], characters=LETTERS)
    with pytest.raises(FileNotFoundError, match="render_hangul16: 16 of 16 font files are not in"):
        render_hangul16([tmp_path])


def test_names_are_found_in_any_case_and_the_newest_version_wins(tmp_path: Path) -> None:
    face = font_sets.PackagedFace("Orders", "KanjiStrokeOrders*.ttf", "fonts-kanjistrokeorders")
    for name in ("KanjiStrokeOrders_v4.003.ttf", "kanjistrokeorders_V4.004.TTF"):
        (tmp_path / name).touch()
    (found,) = font_sets.find_faces([face], [tmp_path], "test")
    assert found.path.name == "kanjistrokeorders_V4.004.TTF"


def test_an_odd_width_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="save_glyphs: images are 5 pixels wide; two share a byte, use an even size"
    ):
        save_glyphs(GlyphGrid(np.zeros((1, 1, 5, 5), np.uint8), (65,), ("x",)), tmp_path / "x.npz")


def test_an_error_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set_4bit.npz"
    path.write_bytes(b"old")

    def full(file, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        save_glyphs(GlyphGrid(np.zeros((1, 1, 4, 4), np.uint8), (65,), ("x",)), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
