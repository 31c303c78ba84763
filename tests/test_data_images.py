"""Class folders and image files: order, labels, and errors that name the file and a remedy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from gcng.data import (
    ClassBalancedBatchSampler,
    ClassFolder,
    ImageDataset,
    ResumableLoader,
    check_disjoint_classes,
    select_classes,
    training_transform,
)

image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")


def paint(path: Path, color: tuple[int, int, int] | int = (255, 0, 0), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.new(mode, (6, 4), color).save(path)
    return path


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    root = tmp_path / "flowers"
    paint(root / "tulip" / "b.png", (0, 255, 0))
    paint(root / "tulip" / "a.PNG", (255, 0, 0))
    paint(root / "aster" / "deep" / "c.bmp", (0, 0, 255))
    paint(root / "rose" / "d.png", 128, "L")
    (root / "tulip" / "notes.txt").write_text("no image")
    (root / "tulip" / ".hidden.png").write_bytes(b"")
    paint(root / ".cache" / "e.png")
    return root


def test_classes_are_sorted_folders(flowers: Path) -> None:
    dataset = ClassFolder(flowers)
    assert dataset.classes == ["aster", "rose", "tulip"]
    assert dataset.targets.tolist() == [0, 1, 2, 2]
    assert [path.name for path in dataset.paths] == ["c.bmp", "d.png", "a.PNG", "b.png"]
    image, label = dataset[3]
    assert label == 2
    assert image.shape == (3, 4, 6)
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [0.0, 1.0, 0.0]
    assert dataset[1][0].unique().tolist() == [pytest.approx(128 / 255)]  # gray becomes RGB


def test_modes_and_transforms(flowers: Path) -> None:
    gray = ClassFolder(flowers, mode="L")
    assert gray[0][0].shape == (1, 4, 6)
    sized = ClassFolder(flowers, transform=lambda image: torch.tensor(image.size))
    assert sized[0][0].tolist() == [6, 4]
    with pytest.raises(ValueError, match="ClassFolder: mode must be 'RGB' or 'L', got 'CMYK'"):
        ClassFolder(flowers, mode="CMYK")


def test_some_classes_in_a_given_order(flowers: Path) -> None:
    chosen = ClassFolder(flowers, classes=["tulip", "aster"])
    assert chosen.classes == ["tulip", "aster"]
    assert chosen.targets.tolist() == [0, 0, 1]
    selected = select_classes(ClassFolder(flowers), [2, 0])
    assert isinstance(selected, ImageDataset)
    assert selected.paths == chosen.paths
    assert selected.classes == chosen.classes
    with pytest.raises(ValueError, match="1 of 2 test classes are train classes too: tulip"):
        check_disjoint_classes(chosen, ClassFolder(flowers, classes=["rose", "tulip"]))
    with pytest.raises(FileNotFoundError, match="no folder .*lily; expected the images of one class there"):
        ClassFolder(flowers, classes=["lily"])


def test_a_missing_or_wrong_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"no folder {tmp_path / 'absent'}; expected one folder per class"
    ):
        ClassFolder(tmp_path / "absent")
    with pytest.raises(
        NotADirectoryError, match="a.png is a file; expected a folder with one folder per class"
    ):
        ClassFolder(paint(tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"has no class folders; expected .*/<class>/<image>"):
        ClassFolder(tmp_path)


def test_an_empty_class_is_named(flowers: Path) -> None:
    (flowers / "lily").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*lily has no images \(.bmp, .*remove it or restore"):
        ClassFolder(flowers)


def test_an_unreadable_image_is_named(flowers: Path) -> None:
    whole = (flowers / "tulip" / "b.png").read_bytes()
    for damaged in (b"", b"no image", whole[:50], whole[:40] + b"\0" * (len(whole) - 40)):
        (flowers / "tulip" / "b.png").write_bytes(damaged)
        dataset = ClassFolder(flowers)
        with pytest.raises(
            ValueError, match=r"ClassFolder: cannot read the image .*b.png \(.*fetch it again"
        ):
            dataset[3]
    with pytest.raises(ValueError, match=r"b.png .*\(1 of 4 images are bad\)"):
        dataset.verify()


def test_an_image_that_vanished_is_named(flowers: Path) -> None:
    dataset = ClassFolder(flowers)
    dataset.verify()
    os.remove(flowers / "rose" / "d.png")
    with pytest.raises(FileNotFoundError, match=r"ClassFolder: no image .*d.png; the data set is incomplete"):
        dataset[1]
    with pytest.raises(FileNotFoundError, match=r"\(1 of 4 images are bad\)"):
        dataset.verify()


def test_a_bomb_is_refused(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match="cannot read the image .*DecompressionBombError"):
        ClassFolder(flowers)[0]


def test_without_pillow_the_package_is_named(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ClassFolder(flowers)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"ClassFolder \(reading images\) needs .*: pip install pillow"
    ):
        dataset[0]


@pytest.mark.parametrize(
    ("paths", "targets", "classes", "message"),
    [
        ([], [], ["a"], "ImageDataset: no images"),
        (["x"], [0, 1], ["a", "b"], "1 paths but 2 targets"),
        (["x"], [1], ["a"], "targets run from 1 to 1, but there are 1 classes"),
        (["x"], [0], ["a", "b", "c"], r"class 'b' has no image \(2 empty classes of 3\)"),
    ],
)
def test_lists_that_do_not_fit_are_refused(paths: list, targets: list, classes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(paths, targets, classes)


def test_errors_name_the_line_that_lists_the_image(tmp_path: Path) -> None:
    dataset = ImageDataset([tmp_path / "x.png"], [0], ["a"], sources=["list.txt:7"])
    with pytest.raises(FileNotFoundError, match=r"no image .*x.png, listed in list.txt:7; "):
        dataset[0]


@pytest.fixture
def photos(tmp_path: Path) -> ClassFolder:
    """Three classes of four images whose pixels all differ."""
    generator = torch.Generator().manual_seed(0)
    for label in range(3):
        for number in range(4):
            pixels = torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8).numpy()
            path = tmp_path / f"class{label}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            image_module.fromarray(pixels).save(path)
    return ClassFolder(tmp_path, transform=training_transform(16))


def test_augmented_images_do_not_depend_on_workers_and_resume(photos: ClassFolder) -> None:
    def loader(workers: int) -> ResumableLoader:
        sampler = ClassBalancedBatchSampler(photos, 2, 3, seed=1, batches_per_epoch=4)
        return ResumableLoader(photos, sampler, num_workers=workers)

    straight = [images for images, _ in loader(0)]
    assert all(images.shape == (6, 3, 16, 16) for images in straight)
    with_workers = [images for images, _ in loader(2)]
    assert all(torch.equal(a, b) for a, b in zip(straight, with_workers, strict=True))
    broken_off = loader(2)
    running = iter(broken_off)
    next(running), next(running)
    resumed = loader(0)
    resumed.load_state_dict(broken_off.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(straight[2:], [images for images, _ in resumed], strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_data_loader_repeats_under_a_seed(photos: ClassFolder, workers: int) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append([images for images, _ in DataLoader(photos, batch_size=5, num_workers=workers)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len(torch.cat(runs[0]).flatten(1).unique(dim=0)) == 12
