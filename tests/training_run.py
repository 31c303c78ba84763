"""A run of seconds for the tests of the trainer: noisy points, a small extractor, settings, what a run left."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset

from gcng.training import RunData, load_config, read_records
from gcng.training.checkpoint import CheckpointFolder

EPOCHS, LENGTH = 3, 4


class NoisyPoints(Dataset):
    """Points around class centers, with noise that is drawn anew each time a sample is read."""

    def __init__(self, classes=6, per_class=4, width=10, noise=0.3, first=0):
        generator = torch.Generator().manual_seed(7)
        self.centers = torch.randn(first + classes, width, generator=generator)[first:]
        self.targets = torch.arange(classes).repeat_interleave(per_class)
        self.classes = [str(first + number) for number in range(classes)]
        self.noise = noise

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        label = int(self.targets[index])
        return self.centers[label] + self.noise * torch.randn(self.centers.shape[1]), label


class Extractor(nn.Module):
    """Batch norm (buffers) and dropout (torch's global generator) make resume hard on purpose."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(12, 8)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))


def parts(**data):
    torch.manual_seed(3)
    train = NoisyPoints(**data)
    return {
        "extractor": Extractor(),
        "data": RunData(train, train, len(train.classes), NoisyPoints(classes=5, noise=0.0, first=6)),
    }


def config(output, *overrides):
    base = [
        f"run.output={output}",
        "data.num_classes_per_batch=4",
        "data.samples_per_class=2",
        f"data.batches_per_epoch={LENGTH}",
        "model.embedding_size=8",
        "optimizer.extractor_lr=0.01",
        f"schedule.epochs={EPOCHS}",
        "schedule.metric_decay_steps=1",
        "evaluation.every=0",
        "logging.every=1",
        "run.device=cpu",
    ]
    return load_config(overrides=[*base, *overrides])


def final_state(settings):
    state = CheckpointFolder(f"{settings.run.output}/checkpoints").load_newest().state
    return {name: value for name, value in state.items() if name != "config"}


def losses(settings, after=0):
    records = read_records(f"{settings.run.output}/log.jsonl")
    kept = [record for record in records if record["kind"] in ("step", "epoch") and record["step"] > after]
    return [{name: value for name, value in record.items() if name != "time"} for record in kept]
