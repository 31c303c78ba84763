"""The standard layouts of CUB-200-2011, Cars196, Stanford Online Products and In-Shop, on small folders."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gcng.data import CUB200, Cars196, InShop, StanfordOnlineProducts, check_disjoint_classes, dataset_labels

image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")


def paint(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.new("RGB", (4, 4), (value, 0, 0)).save(path)


def relative(dataset) -> list[str]:
    return [str(path.relative_to(dataset.root)) for path in dataset.paths]


# CUB-200-2011 ---------------------------------------------------------------------------------------------

BIRDS = ["001.Albatross", "002.Auk", "003.Bunting", "010.Crow"]


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """Four classes of two images; the ids in the lists are not in the order of the folders."""
    root = tmp_path / "CUB_200_2011"
    names = [f"{bird}/{bird[4:]}_{number}.png" for number in (1, 2) for bird in BIRDS]
    for value, name in enumerate(names):
        paint(root / "images" / name, value)
    (root / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    labels = "".join(f"{i} {BIRDS.index(name.split('/')[0]) + 1}\n" for i, name in enumerate(names, 1))
    (root / "image_class_labels.txt").write_text(labels)
    return root


@pytest.mark.parametrize("layout", ["official", "images", "folders"])
def test_cub_splits_by_class_in_every_layout(cub: Path, layout: str) -> None:
    root = cub
    if layout != "official":
        (cub / "images.txt").unlink()
        root = cub if layout == "images" else cub / "images"
    train = CUB200(root, "train", num_train_classes=2)
    test = CUB200(root, "test", num_train_classes=2)
    assert (train.classes, test.classes) == (BIRDS[:2], BIRDS[2:])
    assert sorted(test.targets.tolist()) == [0, 0, 1, 1]
    for path, label in zip(test.paths, test.targets.tolist(), strict=True):
        assert path.parent.name == test.classes[label]
    assert len(CUB200(root, "all").classes) == 4
    check_disjoint_classes(train, test)
    assert train[0][0].shape == (3, 4, 4)


def test_cub_needs_more_classes_than_it_trains_on(cub: Path) -> None:
    with pytest.raises(
        ValueError, match="has 4 classes, so 100 train classes leave nothing .*incomplete, or set num"
    ):
        CUB200(cub)


def test_cub_names_bad_lines(cub: Path) -> None:
    whole = (cub / "images.txt").read_text()
    (cub / "images.txt").write_text(whole + "9\n")
    with pytest.raises(
        ValueError, match=r"CUB200: .*images.txt:9: got '9', expected 2 fields, image_id image_name;"
    ):
        CUB200(cub, "all")
    (cub / "images.txt").write_text(whole + "9 001.Albatross/x.png\n")
    with pytest.raises(
        ValueError, match=r"images.txt:9: image 9 \(001.Albatross/x.png\) has no line in .*labels.txt"
    ):
        CUB200(cub, "all")
    (cub / "images.txt").write_text(whole)
    labels = (cub / "image_class_labels.txt").read_text()
    (cub / "image_class_labels.txt").write_text(labels.replace("3 3\n", "3 three\n", 1))
    with pytest.raises(ValueError, match=r"labels.txt:3: got '3 three', expected a number as class_id"):
        CUB200(cub, "all")
    (cub / "image_class_labels.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no file .*image_class_labels.txt; unpack CUB-200-2011 again"
    ):
        CUB200(cub, "all")


def test_cub_names_a_wrong_root(tmp_path: Path, cub: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"CUB200: no folder .*absent; expected CUB-200-2011, unpacked \(https"
    ):
        CUB200(tmp_path / "absent")
    (cub / "images" / BIRDS[0] / "Albatross_1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no image .*Albatross_1.png, listed in .*images.txt:1; .*not unpacked"
    ):
        CUB200(cub, "all")
    with pytest.raises(ValueError, match="CUB200: split must be one of train, test, all, got 'val'"):
        CUB200(cub, "val")


# Cars196 --------------------------------------------------------------------------------------------------

CARS = ["AM General Hummer", "Acura TL", "BMW M3", "Volvo 240"]


def write_cars(root: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        for number, car in enumerate(CARS):
            paint(root / folder / car / f"{folder or 'x'}{number}.png")


@pytest.mark.parametrize("folders", [("",), ("images",), ("train", "test"), ("cars_train", "cars_test")])
def test_cars_class_folders(tmp_path: Path, folders: tuple[str, ...]) -> None:
    write_cars(tmp_path, folders)
    train, test = (Cars196(tmp_path, split, num_train_classes=2) for split in ("train", "test"))
    assert (train.classes, test.classes) == (CARS[:2], CARS[2:])
    # Folders that divide the images of every class are read together.
    assert len(train) == len(test) == 2 * len(folders)
    check_disjoint_classes(train, test)


def write_annotations(root: Path, classes: list[int]) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="cars_annos.mat needs scipy")
    fields = [("relative_im_path", object), ("bbox_x1", object), ("class", object), ("test", object)]
    rows = np.zeros((1, len(classes)), dtype=fields)
    for number, label in enumerate(classes):
        name = f"car_ims/{number:06}.png"
        paint(root / name)
        rows[0, number] = (name, 1, label, number % 2)
    names = np.array([CARS], dtype=object)
    scipy_io.savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": names})


def test_cars_annotations(tmp_path: Path) -> None:
    write_annotations(tmp_path, [1, 1, 2, 3, 4, 4])
    train, test = (Cars196(tmp_path, split, num_train_classes=2) for split in ("train", "test"))
    assert (train.classes, test.classes) == (CARS[:2], CARS[2:])
    assert relative(train) == ["car_ims/000000.png", "car_ims/000001.png", "car_ims/000002.png"]
    assert train.targets.tolist() == [0, 0, 1]
    assert test.targets.tolist() == [0, 1, 1]


def test_cars_annotations_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_annotations(tmp_path, [1, 5])
    with pytest.raises(ValueError, match=r"annotation 2 \(car_ims/000001.png\) has class 5, expected 1 to 4"):
        Cars196(tmp_path, "all")
    (tmp_path / "cars_annos.mat").write_bytes(b"no matrix")
    with pytest.raises(
        ValueError, match=r"cannot read .*cars_annos.mat .*expected the arrays annotations and class_n"
    ):
        Cars196(tmp_path, "all")


def test_cars_annotations_need_scipy_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cars_annos.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"Cars196 \(reading cars_annos.mat\) needs .*: pip install scipy"
    ):
        Cars196(tmp_path)


def test_cars_names_an_empty_class_and_an_empty_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither the official lists nor class folders"):
        Cars196(tmp_path, "all")
    write_cars(tmp_path, ("",))
    (tmp_path / "Lada Niva").mkdir()
    with pytest.raises(ValueError, match="class folder .*Lada Niva has no images"):
        Cars196(tmp_path, "all")


# Stanford Online Products ---------------------------------------------------------------------------------

SOP_TRAIN = [
    (1, 1, 1, "bicycle_final/1_0.png"),
    (2, 1, 1, "bicycle_final/1_1.png"),
    (3, 10, 2, "cabinet_final/10_0.png"),
]
SOP_TEST = [(4, 11, 1, "bicycle_final/11_0.png"), (5, 9, 2, "cabinet_final/9_0.png")]


@pytest.fixture
def sop(tmp_path: Path) -> Path:
    for split, rows in (("train", SOP_TRAIN), ("test", SOP_TEST)):
        lines = ["image_id class_id super_class_id path", *(" ".join(map(str, row)) for row in rows)]
        (tmp_path / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
        for row in rows:
            paint(tmp_path / row[3])
    return tmp_path


def test_sop_reads_its_lists(sop: Path) -> None:
    train, test = StanfordOnlineProducts(sop), StanfordOnlineProducts(sop, "test")
    assert train.classes == ["1", "10"]
    assert train.targets.tolist() == [0, 0, 1]
    assert test.classes == ["9", "11"]  # by number
    assert test.targets.tolist() == [1, 0]
    assert relative(test) == ["bicycle_final/11_0.png", "cabinet_final/9_0.png"]
    check_disjoint_classes(train, test)


@pytest.mark.parametrize(
    ("line", "number", "text", "message"),
    [
        (0, 1, "image_id class_id path", "expected the header image_id class_id super_class_id path"),
        (2, 3, "2 1 1", "got '2 1 1', expected 4 fields, image_id class_id super_class_id path"),
        (3, 4, "3 ten 2 cabinet_final/10_0.png", "expected a number as class_id"),
    ],
)
def test_sop_names_bad_lines(sop: Path, line: int, number: int, text: str, message: str) -> None:
    lines = (sop / "Ebay_train.txt").read_text().splitlines()
    lines[line] = text
    (sop / "Ebay_train.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"Ebay_train.txt:{number}: .*{message}"):
        StanfordOnlineProducts(sop)


def test_sop_names_missing_files(sop: Path) -> None:
    (sop / "Ebay_test.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no file .*Ebay_test.txt; unpack Stanford Online Products there \(http"
    ):
        StanfordOnlineProducts(sop, "test")
    (sop / "cabinet_final" / "10_0.png").unlink()
    with pytest.raises(FileNotFoundError, match="no image .*10_0.png, listed in .*Ebay_train.txt:4"):
        StanfordOnlineProducts(sop)
    with pytest.raises(ValueError, match="split must be one of train, test, got 'all'"):
        StanfordOnlineProducts(sop, "all")


def test_sop_with_a_header_only_is_refused(sop: Path) -> None:
    (sop / "Ebay_train.txt").write_text("image_id class_id super_class_id path\n\n")
    with pytest.raises(ValueError, match="lists no image for this split"):
        StanfordOnlineProducts(sop)
    (sop / "Ebay_train.txt").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="Ebay_train.txt is not UTF-8 text"):
        StanfordOnlineProducts(sop)


# In-Shop --------------------------------------------------------------------------------------------------

PARTITION = [
    ("img/WOMEN/a_1.png", "id_1", "train"),
    ("img/WOMEN/a_2.png", "id_1", "train"),
    ("img/MEN/b_1.png", "id_2", "train"),
    ("img/MEN/c_1.png", "id_4", "query"),
    ("img/MEN/c_2.png", "id_4", "gallery"),
    ("img/MEN/d_1.png", "id_3", "gallery"),
    ("img/MEN/e_1.png", "id_5", "query"),
]


def write_partition(
    root: Path, rows: list[tuple[str, ...]], announced: int | None = None, folder: str = "Eval"
) -> None:
    count = len(rows) if announced is None else announced
    lines = [str(count), "image_name item_id evaluation_status", *("   ".join(row) for row in rows)]
    (root / folder).mkdir(exist_ok=True)
    (root / folder / "list_eval_partition.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(("folder", "base"), [("Eval", ""), (".", ""), ("Eval", "Img")])
def test_inshop_reads_its_partition(tmp_path: Path, folder: str, base: str) -> None:
    write_partition(tmp_path, PARTITION, folder=folder)
    for name, _, _ in PARTITION:
        paint(tmp_path / base / name)
    train, query, gallery = (InShop(tmp_path, split) for split in ("train", "query", "gallery"))
    assert train.classes == ["id_1", "id_2"]
    assert train.targets.tolist() == [0, 0, 1]
    # Query and gallery share their labels; an item may be in one of them only.
    assert query.classes == gallery.classes == ["id_3", "id_4", "id_5"]
    assert query.targets.tolist() == [1, 2]
    assert dataset_labels(gallery).tolist() == [1, 0]
    assert query[0][0].shape == (3, 4, 4)
    check_disjoint_classes(train, query)


@pytest.mark.parametrize(
    ("rows", "announced", "message"),
    [
        (
            [*PARTITION, ("img/x.png", "id_9")],
            None,
            r":10: got 'img/x.png   id_9', expected 3 fields, image_name item_id",
        ),
        (
            [*PARTITION, ("img/x.png", "id_9", "test")],
            None,
            r":10: .*expected the status train, query or gallery",
        ),
        (PARTITION, 9, "announces 9 images in its first line and lists 7; the file is cut off"),
    ],
)
def test_inshop_names_bad_lines(tmp_path: Path, rows: list, announced: int | None, message: str) -> None:
    write_partition(tmp_path, rows, announced)
    with pytest.raises(ValueError, match=message):
        InShop(tmp_path)


def test_inshop_names_bad_headers_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*list_eval_partition.txt; fetch the Eval folder"):
        InShop(tmp_path)
    path = tmp_path / "list_eval_partition.txt"
    path.write_text("image_name item_id evaluation_status\n")
    with pytest.raises(ValueError, match=r"partition.txt:1: .*expected the number of images"):
        InShop(tmp_path)
    path.write_text("3\nimg/x.png id_1 train\n")
    with pytest.raises(
        ValueError, match=r"partition.txt:2: .*expected the header image_name item_id evaluation_status"
    ):
        InShop(tmp_path)
    write_partition(tmp_path, PARTITION, folder=".")
    with pytest.raises(
        FileNotFoundError, match=r"no image .*a_1.png, listed in .*:3; .* not the root of the data set"
    ):
        InShop(tmp_path)
    with pytest.raises(ValueError, match="InShop: split must be one of train, query, gallery, got 'test'"):
        InShop(tmp_path, "test")
