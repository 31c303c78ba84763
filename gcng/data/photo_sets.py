"""The four photo sets of deep metric learning in their standard layouts, split by class as the papers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gcng.data.images import ImageDataset, list_folders, list_images, require_folder
from gcng.data.optional import require
from gcng.data.partitions import Listed, bad_line, check_first_and_last, read_lines, split_fields

Transform = Callable[[Any], Any] | None
SPLITS = ("train", "test", "all")


class _ListedDataset(ImageDataset):
    """A dataset made from listed images; classes are numbered in the order of ``order``."""

    def __init__(
        self, items: Sequence[Listed], order: Sequence[str], root: Path, transform: Transform, mode: str
    ) -> None:
        owner = type(self).__name__
        if not items:
            raise ValueError(f"{owner}: {root} lists no image for this split; the lists are incomplete")
        check_first_and_last(items, owner, root)
        rank = {label: number for number, label in enumerate(order)}
        super().__init__(
            [item.path for item in items],
            [rank[item.label] for item in items],
            order,
            transform=transform,
            mode=mode,
            sources=[item.source for item in items],
        )
        self.root = root


class CUB200(_ListedDataset):
    """CUB-200-2011: the first 100 classes train, the last 100 test.

    Layouts: the official one (``images.txt``, ``image_class_labels.txt``, optionally ``classes.txt``, and
    ``images/``), or class folders in ``root/images`` or in ``root``, in the order of their sorted names.
    The official ``train_test_split.txt`` divides the images of every class and is not used.

    Args:
        root: the folder ``CUB_200_2011``.
        split: ``"train"``, ``"test"`` or ``"all"``.
        num_train_classes: classes for training, 100 in the literature.
        transform, mode: see `ImageDataset`.

    Raises:
        FileNotFoundError: the root, a list or the first image is absent.
        ValueError: a bad line, or no class left for the split.
    """

    download = "https://data.caltech.edu/records/65de6-vp158"

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        num_train_classes: int = 100,
        transform: Transform = None,
        mode: str = "RGB",
    ) -> None:
        owner = type(self).__name__
        _check_split(owner, split, SPLITS)
        root = require_folder(root, owner, f"CUB-200-2011, unpacked ({self.download})")
        if (root / "images.txt").is_file():
            items, order = self._read_lists(root, owner)
        else:
            items, order = _read_class_folders(
                [root / "images" if (root / "images").is_dir() else root], owner
            )
        order = _first_or_last(owner, root, order, split, num_train_classes)
        kept = set(order)
        super().__init__([item for item in items if item.label in kept], order, root, transform, mode)

    @staticmethod
    def _read_lists(root: Path, owner: str) -> tuple[list[Listed], list[str]]:
        labels_path, images_path = root / "image_class_labels.txt", root / "images.txt"
        remedy = f"unpack CUB-200-2011 again ({CUB200.download})"
        class_of: dict[str, str] = {}
        lines = read_lines(labels_path, owner, remedy=remedy)
        for source, (image_id, class_id) in split_fields(lines, labels_path, owner, ("image_id", "class_id")):
            if not class_id.isdigit():
                raise bad_line(
                    owner, labels_path, _line(source), f"{image_id} {class_id}", "a number as class_id"
                )
            class_of[image_id] = class_id
        items, names = [], {}
        lines = read_lines(images_path, owner, remedy=remedy)
        for source, (image_id, path) in split_fields(lines, images_path, owner, ("image_id", "image_name")):
            if image_id not in class_of:
                raise ValueError(
                    f"{owner}: {source}: image {image_id} ({path}) has no line in {labels_path}; {remedy}"
                )
            names.setdefault(class_of[image_id], Path(path).parts[0])
            items.append(Listed(root / "images" / path, class_of[image_id], "", source))
        order = sorted(names, key=int)
        named = {class_id: names[class_id] for class_id in order}
        if len(set(named.values())) != len(named):
            named = {class_id: class_id for class_id in order}
        items = [Listed(item.path, named[item.label], "", item.source) for item in items]
        return items, [named[class_id] for class_id in order]


class Cars196(_ListedDataset):
    """Cars196 (Stanford Cars): the first 98 classes train, the last 98 test.

    Layouts: the official one with ``cars_annos.mat`` and ``car_ims/`` (needs scipy), or class folders,
    without scipy: in ``root``, in ``root/images``, or spread over ``root/train`` and ``root/test`` (or ``cars_train``
    and ``cars_test``), which are then read together, since those divide the images of every class. Class
    folders count in the order of their sorted names, the official classes in their own.

    Args:
        root: the folder of the data set.
        split: ``"train"``, ``"test"`` or ``"all"``.
        num_train_classes: classes for training, 98 in the literature.
        transform, mode: see `ImageDataset`.

    Raises:
        FileNotFoundError: the root or the first image is absent.
        ModuleNotFoundError: ``cars_annos.mat`` is there and scipy is not.
        ValueError: a file of another kind, or no class left for the split.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        num_train_classes: int = 98,
        transform: Transform = None,
        mode: str = "RGB",
    ) -> None:
        owner = type(self).__name__
        _check_split(owner, split, SPLITS)
        root = require_folder(
            root, owner, "Cars196, as cars_annos.mat with car_ims/, or one folder per class"
        )
        if (root / "cars_annos.mat").is_file():
            items, order = self._read_annotations(root, owner)
        else:
            items, order = _read_class_folders(self._folder_roots(root), owner)
        order = _first_or_last(owner, root, order, split, num_train_classes)
        kept = set(order)
        super().__init__([item for item in items if item.label in kept], order, root, transform, mode)

    @staticmethod
    def _folder_roots(root: Path) -> list[Path]:
        for names in (("train", "test"), ("cars_train", "cars_test")):
            if all((root / name).is_dir() for name in names):
                return [root / name for name in names]
        return [root / "images" if (root / "images").is_dir() else root]

    @staticmethod
    def _read_annotations(root: Path, owner: str) -> tuple[list[Listed], list[str]]:
        path = root / "cars_annos.mat"
        scipy_io = require("scipy.io", install="scipy", purpose=f"{owner} (reading {path.name})")
        try:
            content = scipy_io.loadmat(path, squeeze_me=True, struct_as_record=False)
            names = [str(name) for name in content["class_names"].reshape(-1)]
            rows = [
                (str(row.relative_im_path), int(row.__dict__["class"]))
                for row in content["annotations"].reshape(-1)
            ]
        except Exception as error:  # scipy, zlib and numpy each have types of their own for a bad file
            raise ValueError(
                f"{owner}: cannot read {path} ({type(error).__name__}: {error}); expected the arrays "
                "annotations and class_names of the official file, fetch it again"
            ) from error
        items = []
        for number, (image, label) in enumerate(rows, start=1):
            if not 1 <= label <= len(names):
                raise ValueError(
                    f"{owner}: {path}: annotation {number} ({image}) has class {label}, expected 1 to "
                    f"{len(names)}"
                )
            items.append(Listed(root / image, names[label - 1], "", f"{path}, annotation {number}"))
        present = {item.label for item in items}
        return items, [name for name in names if name in present]


class StanfordOnlineProducts(_ListedDataset):
    """Stanford Online Products: ``Ebay_train.txt`` and ``Ebay_test.txt`` (11,318 and 11,316 classes).

    Each list has the header ``image_id class_id super_class_id path``. A class is named by its class_id.

    Args:
        root: the folder ``Stanford_Online_Products``.
        split: ``"train"`` or ``"test"``.
        transform, mode: see `ImageDataset`.

    Raises:
        FileNotFoundError: the root, the list or its first image is absent.
        ValueError: a bad header or line.
    """

    download = "https://cvgl.stanford.edu/projects/lifted_struct/"
    header = ("image_id", "class_id", "super_class_id", "path")

    def __init__(
        self, root: str | Path, split: str = "train", *, transform: Transform = None, mode: str = "RGB"
    ) -> None:
        owner = type(self).__name__
        _check_split(owner, split, ("train", "test"))
        root = require_folder(root, owner, f"Stanford Online Products, unpacked ({self.download})")
        path = root / f"Ebay_{split}.txt"
        lines = read_lines(path, owner, remedy=f"unpack Stanford Online Products there ({self.download})")
        if not lines or tuple(lines[0].split()) != self.header:
            raise bad_line(owner, path, 1, lines[0] if lines else "", f"the header {' '.join(self.header)}")
        items = []
        for source, fields in split_fields(lines, path, owner, self.header, skip=1):
            if not fields[1].isdigit():
                raise bad_line(owner, path, _line(source), " ".join(fields), "a number as class_id")
            items.append(Listed(root / fields[3], fields[1], split, source))
        super().__init__(items, sorted({item.label for item in items}, key=int), root, transform, mode)


class InShop(_ListedDataset):
    """In-Shop Clothes Retrieval (DeepFashion): the splits train, query and gallery.

    Reads ``Eval/list_eval_partition.txt`` (or the file in ``root``): the number of images, the header
    ``image_name item_id evaluation_status``, then a line per image. Image names are relative to ``root``, or
    to ``root/Img``. Query and gallery have the same classes in the same order, the items of both together,
    so their labels can be compared; so an item may be missing in one of them.

    Args:
        root: the folder of the benchmark.
        split: ``"train"``, ``"query"`` or ``"gallery"``.
        transform, mode: see `ImageDataset`.

    Raises:
        FileNotFoundError: the root, the list or its first image is absent.
        ValueError: a bad line, a status that is none of the three, or another number of lines than announced.
    """

    header = ("image_name", "item_id", "evaluation_status")
    statuses = ("train", "query", "gallery")

    def __init__(
        self, root: str | Path, split: str = "train", *, transform: Transform = None, mode: str = "RGB"
    ) -> None:
        owner = type(self).__name__
        _check_split(owner, split, self.statuses)
        root = require_folder(root, owner, "Eval/list_eval_partition.txt and img/ of the In-Shop benchmark")
        path = root / "Eval" / "list_eval_partition.txt"
        if not path.is_file() and (root / path.name).is_file():
            path = root / path.name
        items = self._read_partition(path, root, owner)
        side = {"train"} if split == "train" else {"query", "gallery"}
        order = sorted({item.label for item in items if item.split in side})
        super().__init__([item for item in items if item.split == split], order, root, transform, mode)

    def _check_classes(self, name: str) -> None:
        """Query and gallery share their classes, so that one of them may lack some."""

    def _read_partition(self, path: Path, root: Path, owner: str) -> list[Listed]:
        lines = read_lines(path, owner, remedy="fetch the Eval folder of the In-Shop benchmark (DeepFashion)")
        if not lines or not lines[0].strip().isdigit():
            raise bad_line(owner, path, 1, lines[0] if lines else "", "the number of images")
        if len(lines) < 2 or tuple(lines[1].split()) != self.header:
            wanted = f"the header {' '.join(self.header)}"
            raise bad_line(owner, path, 2, lines[1] if len(lines) > 1 else "", wanted)
        base = root / "Img" if (root / "Img").is_dir() and not (root / "img").is_dir() else root
        items = []
        for source, (image, item_id, status) in split_fields(lines, path, owner, self.header, skip=2):
            if status not in self.statuses:
                raise bad_line(
                    owner,
                    path,
                    _line(source),
                    f"{image} {item_id} {status}",
                    "the status train, query or gallery",
                )
            items.append(Listed(base / image, item_id, status, source))
        if len(items) != int(lines[0]):
            raise ValueError(
                f"{owner}: {path} announces {int(lines[0])} images in its first line and lists {len(items)}; "
                "the file is cut off, fetch it again"
            )
        return items


def _check_split(owner: str, split: str, allowed: Sequence[str]) -> None:
    if split not in allowed:
        raise ValueError(f"{owner}: split must be one of {', '.join(allowed)}, got {split!r}")


def _line(source: str) -> int:
    return int(source.rpartition(":")[2])


def _read_class_folders(roots: Sequence[Path], owner: str) -> tuple[list[Listed], list[str]]:
    order = sorted({name for root in roots for name in list_folders(root)})
    if not order:
        raise ValueError(
            f"{owner}: {roots[0]} has neither the official lists nor class folders; see help({owner})"
        )
    items = []
    for name in order:
        found = [path for root in roots if (root / name).is_dir() for path in list_images(root / name)]
        if not found:
            raise ValueError(
                f"{owner}: the class folder {roots[0] / name} has no images; restore or remove it"
            )
        items += [Listed(path, name, "", f"the folder {path.parent}") for path in found]
    return items, order


def _first_or_last(owner: str, root: Path, order: list[str], split: str, num_train_classes: int) -> list[str]:
    if split == "all":
        return order
    if not 0 < num_train_classes < len(order):
        raise ValueError(
            f"{owner}: {root} has {len(order)} classes, so {num_train_classes} train classes leave nothing "
            "for one of the splits; the data set is incomplete, or set num_train_classes"
        )
    return order[:num_train_classes] if split == "train" else order[num_train_classes:]
