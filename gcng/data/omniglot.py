"""Omniglot from its official zip archives, without unpacking them."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from gcng.data.glyphs import GlyphDataset, check_split
from gcng.data.optional import require

ARCHIVES = {"train": "images_background", "test": "images_evaluation"}
SOURCE = "https://github.com/brendenlake/omniglot (folder python)"
_MEMBER = re.compile(r"(?:^|/)(images_background|images_evaluation)/([^/]+)/([^/]+)/([^/]+)\.png$")


def omniglot(
    root: str | Path,
    split: str = "train",
    *,
    size: int = 32,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> GlyphDataset:
    """Handwritten characters of 50 alphabets, 20 drawers each, from the official archives (MIT license).

    The official split: ``images_background.zip`` is train (964 characters), ``images_evaluation.zip`` test
    (659 others). Images of 105 x 105, black on white, become ``size`` x ``size``, white on black, by
    averaging boxes. A class is named ``alphabet/character``, a sample by its drawer.

    Args:
        root: folder of the two zip files. (One packed ``.npz`` file is read by `load_glyphs`.)
        split: ``"train"``, ``"test"`` or ``"all"``.
        size: pixels per side.
        transform: see `GlyphDataset`.

    Raises:
        FileNotFoundError: an archive is absent; says where to get it.
        ValueError: root is a packed file; an archive or an image in it is damaged, or it holds no characters; names
            the member.

    Source: Lake, Salakhutdinov, Tenenbaum, Science 350 (2015).
    """
    check_split("omniglot", split)
    if Path(root).suffix == ".npz":
        raise ValueError(
            f"omniglot: root must be the folder of the two zip files, got {root}; load_glyphs, or data.kind=glyphs, "
            "reads a packed file"
        )
    if not 1 <= size <= 105:
        raise ValueError(f"omniglot: size must be between 1 and 105, got {size}")
    images: list[np.ndarray] = []
    targets: list[int] = []
    classes: list[str] = []
    samples: list[str] = []
    for part in ("train", "test") if split == "all" else (split,):
        for name, drawer, image in _read_archive(Path(root), ARCHIVES[part], size):
            if not classes or classes[-1] != name:
                classes.append(name)
            images.append(image)
            targets.append(len(classes) - 1)
            samples.append(drawer)
    return GlyphDataset(np.stack(images), targets, classes, samples=samples, transform=transform)


def _read_archive(root: Path, name: str, size: int) -> list[tuple[str, str, np.ndarray]]:
    """(alphabet/character, drawer, image) of every image, sorted by class and drawer."""
    path = root / f"{name}.zip"
    if not path.is_file():
        raise FileNotFoundError(f"omniglot: no file {path}; get {path.name} from {SOURCE} and put it there")
    rows = []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                match = _MEMBER.search(member)
                if match is not None and not match[4].startswith("."):
                    drawer = match[4].rpartition("_")[2]
                    rows.append((f"{match[2]}/{match[3]}", drawer, _read_image(archive, member, path, size)))
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"omniglot: {path} is damaged or no zip file ({error}); fetch it again from {SOURCE}"
        ) from error
    if not rows:
        raise ValueError(
            f"omniglot: {path} holds no {name}/<alphabet>/<character>/<image>.png; fetch it from {SOURCE}"
        )
    return sorted(rows, key=lambda row: row[:2])


def _read_image(archive: zipfile.ZipFile, member: str, path: Path, size: int) -> np.ndarray:
    image_module = require("PIL.Image", install="pillow", purpose="gcng.data.omniglot")
    try:
        with archive.open(member) as file, image_module.open(file) as image:
            gray = image.convert("L")
    except (OSError, SyntaxError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"omniglot: cannot read {member} in {path} ({type(error).__name__}: {error}); fetch the archive "
            f"again from {SOURCE}"
        ) from error
    return 255 - np.asarray(gray.resize((size, size), image_module.Resampling.BOX))
