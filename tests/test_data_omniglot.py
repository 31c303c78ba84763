"""Omniglot from its official archives, on small archives of the same layout."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gcng.data import check_disjoint_classes, omniglot

image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")


def drawing(row: int) -> bytes:
    """A 1-bit image of 105 x 105: white with one black bar."""
    pixels = np.full((105, 105), True)
    pixels[row : row + 10, 20:80] = False
    file = io.BytesIO()
    image_module.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_archive(
    root: Path, name: str, characters: list[str], drawers: int = 3, extra: dict | None = None
) -> Path:
    path = root / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/", b"")
        for number, character in enumerate(characters):
            for drawer in range(drawers, 0, -1):  # not in order
                member = f"{name}/{character}/{number:04}_{drawer:02}.png"
                archive.writestr(member, drawing(10 * number + drawer))
        for member, content in (extra or {}).items():
            archive.writestr(member, content)
    return path


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    junk = {
        "__MACOSX/images_background/Greek/character01/._0000_01.png": b"junk",
        "images_background/readme": b"",
    }
    write_archive(
        tmp_path,
        "images_background",
        ["Greek/character01", "Greek/character02", "Latin/character01"],
        extra=junk,
    )
    write_archive(tmp_path, "images_evaluation", ["Tibetan/character01", "Ge_ez/character01"])
    return tmp_path


def test_the_archives_are_the_split(archives: Path) -> None:
    train, test, everything = (omniglot(archives, split) for split in ("train", "test", "all"))
    assert train.classes == ["Greek/character01", "Greek/character02", "Latin/character01"]
    assert test.classes == ["Ge_ez/character01", "Tibetan/character01"]
    assert everything.classes == train.classes + test.classes
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert train.samples == ["01", "02", "03"] * 3
    assert everything.targets.tolist() == [label for label in range(5) for _ in range(3)]
    check_disjoint_classes(train, test)


def test_images_are_white_ink_on_black_and_keep_their_place(archives: Path) -> None:
    image = omniglot(archives).images[3, 0].numpy()  # second class, first drawer: rows 11 to 20 of 105
    assert image.shape == (32, 32)
    rows, columns = np.nonzero(image)
    assert (rows.min(), rows.max()) == (3, 6)
    assert (columns.min(), columns.max()) == (6, 24)
    assert image.max() == 255
    assert image[4, 10] == 255
    assert omniglot(archives, size=105).images[3, 0, 11, 20] == 255
    assert omniglot(archives, size=105).images[3, 0, 10, 20] == 0


def test_missing_archives_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="no file .*images_evaluation.zip; get .*://github.com/brendenlake/omniglot"
    ):
        omniglot(tmp_path, "test")


def test_damaged_archives_are_refused(archives: Path) -> None:
    path = archives / "images_background.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="images_background.zip is damaged or no zip file .*fetch it again"):
        omniglot(archives)
    start = whole.index(b"IDAT")
    path.write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])
    with pytest.raises(
        ValueError, match=r"cannot read images_background/Greek/.*.png in .*\(.*fetch the archive again"
    ):
        omniglot(archives)


def test_archives_of_another_kind_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as archive:
        archive.writestr("something/else.png", drawing(0))
    with pytest.raises(ValueError, match="holds no images_background/<alphabet>/<character>/<image>.png"):
        omniglot(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "omniglot: split must be one of train, test, all, got 'val'"),
        ({"size": 0}, "size must be between 1 and 105, got 0"),
        ({"size": 106}, "size must be between 1 and 105, got 106"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        omniglot(tmp_path, **options)


def test_a_packed_file_is_sent_to_its_own_loader() -> None:
    with pytest.raises(ValueError, match=r"got sets/omniglot_32.npz; load_glyphs, or data.kind=glyphs, reads"):
        omniglot("sets/omniglot_32.npz")
