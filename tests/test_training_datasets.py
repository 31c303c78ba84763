"""Configuration to data sets, extractor, criterion and loader."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from gcng.models import SmallConvNet, find_head
from gcng.training import ConfigError, load_config
from gcng.training.datasets import (
    AugmentedBatches,
    RunData,
    UnitLength,
    build_data,
    make_criterion,
    make_extractor,
    make_loader,
)
from gcng.training.embedding import embed_dataset

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def write_images(folder, classes, per_class=2, size=20):
    draw = np.random.default_rng(0)
    paths = []
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(per_class):
            path = folder / label / f"{number}.png"
            Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
            paths.append((path, label))
    return paths


def settings(**data):
    return load_config(overrides={f"data.{name}": value for name, value in data.items()})


def test_class_folders(tmp_path):
    write_images(tmp_path / "train", ["a", "b", "c"])
    write_images(tmp_path / "test", ["d", "e"])
    data = build_data(settings(kind="class_folders", root=str(tmp_path), image_size=16).data)
    assert data.num_classes == 3 and data.in_channels() == 3 and data.gallery is None
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 16, 16)
    torch.manual_seed(0)
    first, second = data.train[0][0], data.train[0][0]
    assert not torch.equal(first, second)  # augmented
    assert torch.equal(data.train_plain[0][0], data.train_plain[0][0])
    assert data.train_plain.paths == data.train.paths


def test_manifest_of_classes_that_overlap_is_refused(tmp_path):
    images = write_images(tmp_path, ["a", "b", "c"])
    lines = [{"path": str(path.relative_to(tmp_path)), "label": label} for path, label in images]
    for split in ("test", "train"):
        for line in lines:
            line["split"] = "train" if line["label"] != "c" else split
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
        config = settings(kind="manifest", root=str(tmp_path / "m.jsonl"), image_size=16).data
        if split == "test":
            assert build_data(config).num_classes == 2
        else:
            with pytest.raises(ConfigError, match="data.kind manifest, .*has no line of the split 'test'"):
                build_data(config)
    for line in lines[::2]:
        line["split"] = "test"
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match="3 of 3 test classes are train classes too"):
        build_data(config)


def test_inshop_has_queries_and_a_gallery(tmp_path):
    rows = []
    for path, label in write_images(tmp_path / "img", ["id_1", "id_2", "id_3"], per_class=3):
        number = path.stem
        part = "train" if label != "id_3" else "query" if number == "0" else "gallery"
        rows.append(f"img/{label}/{path.name} {label} {part}")
    (tmp_path / "Eval").mkdir()
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text(header + "\n".join(rows) + "\n")
    data = build_data(settings(kind="inshop", root=str(tmp_path), image_size=16).data)
    assert (data.num_classes, len(data.train), len(data.test), len(data.gallery)) == (2, 6, 1, 2)


def test_missing_data_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="data.root must be given for data.kind omniglot"):
        build_data(settings(kind="omniglot").data)
    for kind in ("class_folders", "manifest", "cub200", "cars196", "sop", "inshop", "glyphs", "omniglot"):
        with pytest.raises(ConfigError, match=f"data.kind {kind}, data.root .*absent"):
            build_data(settings(kind=kind, root=str(tmp_path / "absent")).data)


class Glyphs:
    """What AugmentedBatches needs of a data set."""

    targets = torch.arange(12) // 3
    classes = ("a", "b", "c", "d")

    def __len__(self):
        return 12

    def batch(self, indices):
        return torch.as_tensor(indices, dtype=torch.float32)[:, None], self.targets[indices]


def run_data(noise=1.0):
    glyphs = Glyphs()
    return RunData(AugmentedBatches(glyphs, lambda x: x + noise * torch.randn(x.shape)), glyphs, 4)


def test_batches_are_the_same_for_any_number_of_workers():
    batches = []
    for workers in (0, 2):
        overrides = {"data.num_classes_per_batch": 2, "data.samples_per_class": 2, "data.workers": workers}
        loader = make_loader(load_config(overrides=overrides), run_data())
        batches.append([inputs for _ in range(2) for inputs, _ in loader])
    assert len(batches[0]) == 6 and all(map(torch.equal, *batches))
    assert not torch.equal(batches[0][0], batches[0][0].round())  # the augmentation was at work


def test_batches_that_cannot_be_made_are_a_config_error():
    with pytest.raises(ConfigError, match="data.num_classes_per_batch, .*exceeds the 4"):
        make_loader(load_config(), run_data())


def test_shipped_extractor_and_unit_length():
    config = load_config(overrides={"model.embedding_size": 8, "model.normalize": True})
    extractor = make_extractor(config.model, in_channels=3)
    assert isinstance(extractor, UnitLength) and isinstance(extractor.extractor, SmallConvNet)
    assert find_head(extractor) is extractor.extractor.head
    norms = extractor(torch.randn(4, 3, 16, 16)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))


def my_extractor(embedding_size):
    """An extractor by import path."""
    return nn.Linear(5, embedding_size)


def test_extractor_by_import_path_and_unknown_ones():
    path = f"{__name__}:my_extractor"
    config = load_config(overrides={"model.embedding_size": 8, "model.backbone": path})
    assert make_extractor(config.model, in_channels=1).out_features == 8
    wrong = load_config(overrides={"model.backbone": f"{__name__}:absent"})
    with pytest.raises(ConfigError, match="model.backbone .*has no 'absent'"):
        make_extractor(wrong.model, in_channels=1)


def test_criterion_takes_every_setting():
    overrides = {
        "model.embedding_size": 8,
        "loss.num_layers": 2,
        "loss.num_heads": 4,
        "loss.alpha": 1.5,
        "loss.beta": 2.5,
        "loss.softmax_factor": 3.5,
        "loss.similarity_weight": 4.5,
        "loss.diversity_weight": 5.5,
        "loss.l2_reg": 0.25,
        "loss.dropout": 0.5,
        "loss.singletons": "error",
        "loss.official_sim_mask": True,
        "loss.memory_budget": "1GiB",
    }
    criterion = make_criterion(load_config(overrides=overrides), 7)
    for key, value in overrides.items():
        name = key.partition(".")[2]
        holder = criterion if hasattr(criterion, name) else criterion.graph
        assert getattr(holder, name) == (2**30 if name == "memory_budget" else value), key
    assert criterion.classifier.out_features == 7
    assert make_criterion(load_config(), 7).graph.memory_budget is None


def test_embedding_a_data_set_leaves_modes_and_random_state_alone():
    extractor = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5))
    extractor[0].eval()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    seen = []
    embeddings, labels = embed_dataset(
        extractor, run_data().train, batch_size=5, on_batch=lambda done, total: seen.append((done, total))
    )
    assert torch.equal(torch.rand(1), expected)
    assert embeddings.shape == (12, 4) and labels.tolist() == Glyphs.targets.tolist()
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert extractor.training and extractor[1].training and not extractor[0].training
    again, _ = embed_dataset(extractor, run_data().train, batch_size=5, limit=7)
    assert torch.equal(again, embeddings[:7])
