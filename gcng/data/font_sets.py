"""Kanji-16 and Hangul-16: glyph sets rendered from the free fonts of Debian's packages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from gcng.data.atomic import write_atomically
from gcng.data.glyphs import has_ink, pack_nibbles
from gcng.data.rendering import FontFace, GlyphGrid, render_glyphs

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")


@dataclass(frozen=True)
class PackagedFace:
    """One face of a set: its name there, a pattern of its file name, and the Debian package that has it."""

    name: str
    file: str
    package: str


KANJI_FACES = (
    PackagedFace("IPAexGothic", "ipaexg.ttf", "fonts-ipaexfont-gothic"),
    PackagedFace("IPAexMincho", "ipaexm.ttf", "fonts-ipaexfont-mincho"),
    PackagedFace("M PLUS 1 Black", "Mplus1-Black.otf", "fonts-mplus"),
    PackagedFace("M PLUS 1 ExtraLight", "Mplus1-ExtraLight.otf", "fonts-mplus"),
    PackagedFace("Unifont", "unifont.otf", "fonts-unifont"),
    PackagedFace("AoyagiKouzanFontT", "AoyagiKouzanT.ttf", "fonts-aoyagi-kouzan-t"),
    PackagedFace("AoyagiSosekiFont2", "aoyagi-soseki.ttf", "fonts-aoyagi-soseki"),
    PackagedFace("KouzanBrushFont", "kouzan-mouhitsu.ttf", "fonts-kouzan-mouhitsu"),
    PackagedFace("KouzanBrushFontGyousyo", "kouzan-mouhitsu-gyosho.ttf", "fonts-kouzan-mouhitsu"),
    PackagedFace("KanjiStrokeOrders", "KanjiStrokeOrders*.ttf", "fonts-kanjistrokeorders"),
    PackagedFace("kiloji", "kiloji.ttf", "fonts-kiloji"),
    PackagedFace("MisakiGothic", "misaki_gothic.ttf", "fonts-misaki"),
    PackagedFace("Reggae One Regular", "ReggaeOne-Regular.ttf", "fonts-reggae"),
    PackagedFace("SetoFont", "setofont.ttf", "fonts-seto"),
    PackagedFace("Train One Regular", "TrainOne-Regular.ttf", "fonts-train"),
    PackagedFace("WenQuanYi Zen Hei", "wqy-zenhei.ttc", "fonts-wqy-zenhei"),
)
HANGUL_FACES = (
    PackagedFace("NanumGothicBold", "NanumGothicBold.ttf", "fonts-nanum"),
    PackagedFace("NanumBarunpen Bold", "NanumBarunpenB.ttf", "fonts-nanum-extra"),
    PackagedFace("Nanum Pen Script", "NanumPen.ttf", "fonts-nanum-extra"),
    PackagedFace("Nanum Brush Script", "NanumBrush.ttf", "fonts-nanum-extra"),
    PackagedFace("Un Batang", "UnBatang.ttf", "fonts-unfonts-core"),
    PackagedFace("Un Dotum Bold", "UnDotumBold.ttf", "fonts-unfonts-core"),
    PackagedFace("Un Pilgi", "UnPilgi.ttf", "fonts-unfonts-core"),
    PackagedFace("Un Dinaru", "UnDinaru.ttf", "fonts-unfonts-core"),
    PackagedFace("Un Pen", "UnPen.ttf", "fonts-unfonts-extra"),
    PackagedFace("Un Shinmun", "UnShinmun.ttf", "fonts-unfonts-extra"),
    PackagedFace("Un Taza", "UnTaza.ttf", "fonts-unfonts-extra"),
    PackagedFace("Un Vada", "UnVada.ttf", "fonts-unfonts-extra"),
    PackagedFace("Un Yetgul", "UnYetgul.ttf", "fonts-unfonts-extra"),
    PackagedFace("Un Jamo Novel", "UnJamoNovel.ttf", "fonts-unfonts-extra"),
    PackagedFace("Guseul", "Guseul.ttf", "fonts-alee"),
    PackagedFace("Eunjin", "Eunjin.ttf", "fonts-alee"),
)


def jis_level_1() -> list[int]:
    """The 2,965 kanji of JIS X 0208 level 1 as code points, in JIS order (rows 16 to 47)."""
    characters = []
    for row in range(16, 48):
        for cell in range(1, 95):
            try:
                characters.append(ord(bytes([row + 0xA0, cell + 0xA0]).decode("euc_jp")))
            except UnicodeDecodeError:
                continue  # the last row is not full
    return characters


def hangul_syllables() -> list[int]:
    """The 11,172 Hangul syllables, U+AC00 to U+D7A3."""
    return list(range(0xAC00, 0xD7A4))


def render_kanji16(
    folders: Sequence[str | Path] | None = None, *, characters: Sequence[int] | None = None
) -> GlyphGrid:
    """Render Kanji-16: JIS level 1 in 16 free fonts, 32 x 32.

    Characters without ink in some font are dropped. Write the result with `save_glyphs`, read it with
    `load_glyphs`.

    Args:
        folders: where to look for the font files, subfolders included; None is the system's font folders.
        characters: code points; None is `jis_level_1`.

    Raises:
        FileNotFoundError: fonts are missing; lists the files and the Debian packages to install.
    """
    return _render(
        KANJI_FACES, jis_level_1() if characters is None else characters, folders, "render_kanji16"
    )


def render_hangul16(
    folders: Sequence[str | Path] | None = None, *, characters: Sequence[int] | None = None
) -> GlyphGrid:
    """Render Hangul-16: all Hangul syllables in 16 free fonts, 32 x 32. Else as `render_kanji16`."""
    return _render(
        HANGUL_FACES, hangul_syllables() if characters is None else characters, folders, "render_hangul16"
    )


def _render(
    faces: Sequence[PackagedFace], characters: Sequence[int], folders: Sequence[str | Path] | None, owner: str
) -> GlyphGrid:
    grid = render_glyphs(find_faces(faces, folders, owner), characters)
    return grid.keep(np.nonzero(has_ink(grid.images))[0])


def find_faces(
    faces: Sequence[PackagedFace], folders: Sequence[str | Path] | None, owner: str
) -> list[FontFace]:
    """Font files by name in ``folders`` and below, in any case; the last in sorted order wins."""
    searched = [Path(folder).expanduser() for folder in (FONT_FOLDERS if folders is None else folders)]
    files = sorted(
        Path(folder, name)
        for root in searched
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    )
    found: dict[str, Path] = {}
    for face in faces:
        for path in files:
            if fnmatchcase(path.name.lower(), face.file.lower()):
                found[face.name] = path
    missing = [face for face in faces if face.name not in found]
    if missing:
        packages = " ".join(sorted({face.package for face in missing}))
        raise FileNotFoundError(
            f"{owner}: {len(missing)} of {len(faces)} font files are not in {', '.join(map(str, searched))}: "
            f"{', '.join(face.file for face in missing)}; on Debian and Ubuntu: apt-get install {packages}"
        )
    return [FontFace(face.name, found[face.name]) for face in faces]


def save_glyphs(grid: GlyphGrid, path: str | Path) -> None:
    """Write a glyph grid in the packed layout that `load_glyphs` reads: q, chars, fonts; 4 bits per pixel.

    Atomic: an error or a kill leaves the old file. characters * faces * S**2 / 2 bytes, then compressed.
    """
    if grid.images.shape[-1] % 2:
        raise ValueError(
            f"save_glyphs: images are {grid.images.shape[-1]} pixels wide; two share a byte, use an even size"
        )
    arrays = {
        "q": pack_nibbles(grid.images),
        "chars": np.array(grid.characters, np.int64),
        "fonts": np.array(grid.faces),
    }
    write_atomically(Path(path), lambda file: np.savez_compressed(file, **arrays))
