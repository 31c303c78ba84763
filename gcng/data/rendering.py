"""Rendering of characters from font files into small gray images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gcng.data.optional import require

FILL = 0.92  # share of the box that the 95th percentile of max(width, height) fills
OVERSAMPLE = 2
# A noncharacter, which no font maps: drawn, it shows the replacement box of missing glyphs.
UNMAPPED = 0x10FFFF
SAMPLE_STEP = 3  # the size of a face is fitted on every third character


@dataclass(frozen=True)
class FontFace:
    """One face of a font file: where it is, its number in a collection, and its name in the data set."""

    name: str
    path: Path
    index: int = 0


@dataclass(frozen=True)
class GlyphGrid:
    """Rendered characters.

    Attributes:
        images: (characters, faces, S, S) uint8, white ink on black.
        characters: code points, in order.
        faces: names of the faces, in order.
    """

    images: np.ndarray
    characters: tuple[int, ...]
    faces: tuple[str, ...]

    def keep(self, places: np.ndarray) -> GlyphGrid:
        """The characters at ``places``."""
        return GlyphGrid(self.images[places], tuple(self.characters[int(i)] for i in places), self.faces)


def render_glyphs(faces: Sequence[FontFace], characters: Sequence[int], *, size: int = 32) -> GlyphGrid:
    """Render every character in every face, centered in a box of ``size`` x ``size`` pixels.

    Each face gets one font size: the largest at which the 95th percentile of max(width, height), over every
    third character, fills at most 0.92 of the box. A glyph that overflows the box is drawn smaller. Width and
    height are those of Pillow's text box, which holds the ink, the baseline and the advance; this box is
    centered. Drawn at twice the size with Pillow's basic layout and reduced. A glyph that the font does not
    draw (no ink, the replacement box, or an error of the font, such as broken hinting or a bitmap-only
    size) is left black: character maps lie.

    Args:
        faces: font files.
        characters: code points.
        size: pixels per side, even.

    Raises:
        FileNotFoundError: a font file is missing.
        ValueError: a font file cannot be opened, draws none of the sampled characters, or the arguments are
            empty.

    Memory: characters * faces * size**2 bytes. One core draws some thousand glyphs a second.
    """
    if not faces or not characters or size < 4:
        raise ValueError(
            f"render_glyphs: needs faces, characters and a size of at least 4, got {len(faces)} faces, "
            f"{len(characters)} characters, size {size}"
        )
    images = np.zeros((len(characters), len(faces), size, size), np.uint8)
    for place, face in enumerate(faces):
        opener = _FontOpener(face)
        fitted = _fitted_size(opener, characters[::SAMPLE_STEP], size)
        for row, character in enumerate(characters):
            glyph = _draw(opener, fitted, character, size)
            if glyph is not None:
                images[row, place] = glyph
    return GlyphGrid(images, tuple(int(c) for c in characters), tuple(face.name for face in faces))


class _FontOpener:
    """One face at any size; opened sizes are kept, since shrunken glyphs often share one."""

    def __init__(self, face: FontFace) -> None:
        self.face = face
        self.fonts: dict[int, Any] = {}
        self.replacements: dict[int, np.ndarray | None] = {}
        if not face.path.is_file():
            raise FileNotFoundError(f"render_glyphs: no font file {face.path} (face {face.name})")
        self.module = require("PIL.ImageFont", install="pillow", purpose="rendering glyphs")

    def at(self, size: int) -> Any:
        if size not in self.fonts:
            try:
                self.fonts[size] = self.module.truetype(
                    str(self.face.path), size, index=self.face.index, layout_engine=self.module.Layout.BASIC
                )
            except OSError as error:
                raise ValueError(
                    f"render_glyphs: cannot open {self.face.path}, index {self.face.index}, at size {size}: "
                    f"{error}"
                ) from error
        return self.fonts[size]

    def box(self, size: int, character: int) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of the ink; None where there is none."""
        font = self.at(size)
        try:
            left, top, right, bottom = font.getbbox(chr(character))
        except OSError:  # FreeType refuses single glyphs: broken hinting, bitmap-only sizes
            return None
        return (left, top, right, bottom) if right > left and bottom > top else None


def _extent(box: tuple[int, int, int, int]) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _fitted_size(opener: _FontOpener, sample: Sequence[int], size: int) -> int:
    """Largest font size, at the oversampled scale, whose 95th percentile of extents fits; by bisection."""
    canvas = OVERSAMPLE * size

    def fits(font_size: int) -> bool:
        boxes = [opener.box(font_size, character) for character in sample]
        extents = [_extent(box) for box in boxes if box is not None]
        if not extents:
            raise ValueError(
                f"render_glyphs: {opener.face.path} (face {opener.face.name}) draws none of {len(sample)} "
                "sampled characters; is it a font of this script?"
            )
        return float(np.percentile(extents, 95)) <= FILL * canvas

    low, high = 1, 4 * canvas
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _draw(opener: _FontOpener, font_size: int, character: int, size: int) -> np.ndarray | None:
    """One glyph, (size, size) uint8; None where the font has no glyph, or one without ink."""
    canvas = OVERSAMPLE * size
    box = opener.box(font_size, character)
    while box is not None and _extent(box) > canvas and font_size > 1:
        font_size = max(1, min(font_size - 1, font_size * canvas // _extent(box)))
        box = opener.box(font_size, character)
    if box is None:
        return None
    glyph = _draw_boxed(opener.at(font_size), box, character, size)
    if glyph is None or character == UNMAPPED:
        return glyph
    if font_size not in opener.replacements:
        opener.replacements[font_size] = _draw(opener, font_size, UNMAPPED, size)
    replacement = opener.replacements[font_size]
    return None if replacement is not None and np.array_equal(glyph, replacement) else glyph


def _draw_boxed(font: Any, box: tuple[int, int, int, int], character: int, size: int) -> np.ndarray | None:
    """One glyph whose text box is known, centered; None on an error of the font."""
    image_module = require("PIL.Image", install="pillow", purpose="rendering glyphs")
    draw_module = require("PIL.ImageDraw", install="pillow", purpose="rendering glyphs")
    canvas = OVERSAMPLE * size
    left, top, right, bottom = box
    image = image_module.new("L", (canvas, canvas), 0)
    corner = (round((canvas - (right - left)) / 2) - left, round((canvas - (bottom - top)) / 2) - top)
    try:
        draw_module.Draw(image).text(corner, chr(character), fill=255, font=font)
    except OSError:
        return None
    return np.asarray(image.reduce(OVERSAMPLE))


def merge_look_alikes(grid: GlyphGrid, compare: Sequence[int], threshold: float = 0.97) -> GlyphGrid:
    """Keep one character of every group that looks alike, the one with the lowest code point.

    Two characters look alike when the cosine of their images exceeds ``threshold`` in every face of
    ``compare`` at once; groups are the connected components. Without this, Latin A, Greek Alpha and
    Cyrillic A are three classes that no model can tell apart, and queries without an answer cap Recall@1.

    Args:
        grid: the rendered characters; one that is empty in a compared face is never merged.
        compare: indices of the faces to compare in.
        threshold: cosine above which images look alike.
    """
    count = len(grid.characters)
    lowest = np.full((count, count), np.inf)
    for face in compare:
        flat = grid.images[:, face].reshape(count, -1).astype(np.float64)
        norm = np.linalg.norm(flat, axis=1, keepdims=True)
        flat /= np.maximum(norm, 1.0)
        np.minimum(lowest, flat @ flat.T, out=lowest)
    group = np.arange(count)
    for first, second in np.argwhere(np.triu(lowest > threshold, 1)):
        a, b = group[first], group[second]
        if a != b:
            group[group == max(a, b)] = min(a, b)
    return grid.keep(np.unique(group))
