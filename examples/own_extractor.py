"""An extractor and data of your own in the trainer: checkpoints, log and resume come with it.

Any module from inputs to (N, D) will do. A child called ``head`` is what warm-up epochs train alone.
"""

import tempfile

import torch
from torch.utils.data import TensorDataset

from gcng.training import RunData, fit, load_config


class Spectrum(torch.nn.Module):
    """Signals (N, 64) to embeddings (N, 16), through the amplitudes of their spectrum."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(33, 64), torch.nn.GELU())
        self.head = torch.nn.Linear(64, 16)

    def forward(self, signals):
        return self.head(self.body(torch.fft.rfft(signals).abs()))


def tones(first):  # ten classes of tones in noise, eight of each
    labels = torch.arange(10).repeat_interleave(8)
    waves = torch.sin(torch.arange(64) * (first + labels)[:, None] * 0.1 + 6 * torch.rand(80, 1))
    return TensorDataset(waves + 0.3 * torch.randn(80, 64), labels)


torch.manual_seed(0)
train, test = tones(first=2), tones(first=12)  # other tones are searched than were trained on
with tempfile.TemporaryDirectory() as output:
    settings = {"run.output": output, "model.embedding_size": 16, "schedule.epochs": 4, "evaluation.k": [1]}
    config = load_config(overrides=settings | {"data.num_classes_per_batch": 8, "data.samples_per_class": 2})
    result = fit(config, extractor=Spectrum(), data=RunData(train, train, 10, test))
print(f"Recall@1 {result.best['recall_at_1']:.3f} after {result.steps} steps")
