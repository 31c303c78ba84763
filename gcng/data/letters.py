"""The matplotlib letters: 1,199 classes x 12 faces from the DejaVu fonts inside the matplotlib wheel."""

from __future__ import annotations

import logging
import os
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from gcng.data.atomic import write_atomically
from gcng.data.glyphs import GlyphDataset, check_split, grid_dataset, has_ink, permuted_split
from gcng.data.optional import require
from gcng.data.rendering import FontFace, GlyphGrid, merge_look_alikes, render_glyphs

FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
)
UPRIGHT = tuple(FACES.index(name) for name in ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif"))
# Letters and decimal digits. Modifier letters (Lm) are small raised copies of other letters and stay out.
CATEGORIES = ("Lu", "Ll", "Lt", "Lo", "Nd")
SIZE = 32
RECIPE = 1  # part of the cache's name; raise it when what is drawn changes

log = logging.getLogger("gcng.data")


def matplotlib_letters(
    split: str = "train",
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    cache: bool | str | Path = True,
) -> GlyphDataset:
    """Letters and digits of many scripts in the 12 DejaVu faces of the matplotlib wheel: nothing to download.

    1,199 classes of 12 images, 32 x 32: the letters and digits that all 12 faces (Sans, Mono and Serif in
    regular, bold, slanted and bold slanted) draw, look-alikes across scripts merged. Rendered at first
    use, which takes a few seconds, then read from a cache. These are rendered type, not photographs.

    Args:
        split: ``"train"`` (599 classes), ``"test"`` (600 others) or ``"all"``; the split of `split_classes`.
        transform: see `GlyphDataset`.
        cache: True keeps the images in ``$XDG_CACHE_HOME/gcng`` (``~/.cache/gcng``), a path in that folder,
            False nowhere. A cache that cannot be written or read costs a warning in the log, nothing else.

    Raises:
        ModuleNotFoundError: Pillow, matplotlib or fontTools is absent; names the package.

    Example:
        >>> train, test = matplotlib_letters("train"), matplotlib_letters("test")
        >>> train[0][0].shape
        torch.Size([1, 32, 32])
    """
    check_split("matplotlib_letters", split)
    grid = _load_or_render(None if cache is False else cache_folder() if cache is True else Path(cache))
    chosen = permuted_split(len(grid.characters), split)
    return grid_dataset(grid.images[chosen], [chr(grid.characters[i]) for i in chosen], grid.faces, transform)


def render_letters(characters: list[int] | None = None) -> GlyphGrid:
    """Render the letters, without cache; ``characters`` restricts what is drawn and merged."""
    faces = letter_faces()
    if characters is None:
        characters = letter_characters(faces)
    grid = render_glyphs(faces, characters, size=SIZE)
    return merge_look_alikes(grid.keep(np.nonzero(has_ink(grid.images))[0]), UPRIGHT)


def letter_faces() -> list[FontFace]:
    """The 12 faces; their files come with matplotlib."""
    matplotlib = require("matplotlib", install="matplotlib", purpose="gcng.data.matplotlib_letters")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [FontFace(name, folder / f"{name}.ttf") for name in FACES]
    missing = [face.path.name for face in faces if not face.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"gcng.data.matplotlib_letters: {folder} lacks {', '.join(missing)}; a distribution's matplotlib "
            "may leave its fonts out, the one from the package index has them: pip install --force-reinstall "
            "matplotlib"
        )
    return faces


def letter_characters(faces: list[FontFace]) -> list[int]:
    """Code points of the letters and digits that every face maps, ascending."""
    fonttools = require("fontTools.ttLib", install="fonttools", purpose="gcng.data.matplotlib_letters")
    common: set[int] | None = None
    for face in faces:
        with fonttools.TTFont(face.path, lazy=True) as font:
            mapped = set(font.getBestCmap())
        common = mapped if common is None else common & mapped
    return sorted(c for c in common or () if unicodedata.category(chr(c)) in CATEGORIES)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/gcng``, or ``~/.cache/gcng``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gcng"


def _load_or_render(folder: Path | None) -> GlyphGrid:
    if folder is None:
        return render_letters()
    path = folder / f"letters-{_fingerprint()}.npz"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    grid = render_letters()
    try:
        _write_cache(path, grid)
    except OSError as error:
        log.warning("cannot write the cache %s (%s); the letters stay in memory", path, error)
    return grid


def _fingerprint() -> str:
    """Whatever decides the pixels: the recipe, Pillow, its FreeType, and the fonts."""
    pillow = require("PIL", install="pillow", purpose="gcng.data.matplotlib_letters")
    features = require("PIL.features", install="pillow", purpose="gcng.data.matplotlib_letters")
    parts = [str(RECIPE), pillow.__version__, str(features.version("freetype2")), unicodedata.unidata_version]
    parts += [f"{face.path.name}:{face.path.stat().st_size}" for face in letter_faces()]
    return f"{zlib.crc32(' '.join(parts).encode()):08x}"


def _read_cache(path: Path) -> GlyphGrid | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, characters = archive["images"], archive["characters"]
        if images.dtype != np.uint8 or images.shape != (len(characters), len(FACES), SIZE, SIZE):
            raise ValueError(f"images is {images.dtype} {images.shape}")
    except (
        Exception
    ) as error:  # a damaged file raises a type of zipfile, zlib or numpy: all mean "render again"
        log.warning("ignoring the damaged cache %s (%s: %s)", path, type(error).__name__, error)
        return None
    return GlyphGrid(images, tuple(int(c) for c in characters), FACES)


def _write_cache(path: Path, grid: GlyphGrid) -> None:
    """Atomic: readers see the whole file or none, also when two processes render at once."""
    characters = np.array(grid.characters, np.int64)
    write_atomically(path, lambda file: np.savez_compressed(file, images=grid.images, characters=characters))
