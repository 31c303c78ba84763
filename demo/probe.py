"""What the generator makes of one fixed batch: how hard its negatives are, and how much its gates differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gcng.functional import synthesize_negatives
from gcng.losses import GCAHNGLoss

MIX_SEED = 20  # the numbers of (18) are the same at every look


@dataclass
class Probe:
    """Measurements at one moment of a training.

    Attributes:
        iteration: batches seen so far.
        kappa: (16), the share of the gated part of the distance.
        hardness: (P,) distance of each synthetic negative to its anchor over the anchor's distance to its
            positive, for every anchor and every other class of the batch. Below 1: nearer than the positive.
        real_hardness: the same for the real negatives, (anchor, sample of another class).
        gate_spread: standard deviation of a gate over the negatives of an anchor, root mean square over
            anchors and channels: what (26) rewards.
        gate_mean: mean gate.
        gate_quantiles: 5, 25, 50, 75 and 95% of all gates between samples of different classes.
    """

    iteration: int
    kappa: float
    hardness: Tensor
    real_hardness: Tensor
    gate_spread: float
    gate_mean: float
    gate_quantiles: list[float]

    def as_dict(self) -> dict:
        """Plain lists and numbers, the distributions rounded to 4 digits."""
        fields = dict(vars(self))
        for name in ("hardness", "real_hardness"):
            fields[name] = [round(value, 4) for value in fields[name].tolist()]
        return fields


@torch.no_grad()
def look_at_negatives(
    extractor: nn.Module, criterion: GCAHNGLoss, batch: tuple[Tensor, Tensor], iteration: int
) -> Probe:
    """Generate the negatives of a batch in evaluation mode and measure them; changes nothing.

    Args:
        batch: images and labels (N,), class after class, the same number of samples of each class.
        iteration: written into the result.
    """
    images, labels = batch
    modes = extractor.training, criterion.training
    extractor.eval(), criterion.eval()
    embeddings = extractor(images)
    n = len(labels)
    graph = criterion.graph(embeddings, labels)
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    gate = graph.gates(rows.reshape(-1), columns.reshape(-1)).view(n, n, -1)
    kappa = criterion.schedule.hardness(criterion.alpha).item()
    per_class = int((labels == labels[0]).sum())
    mix = torch.rand(per_class, per_class - 1, generator=torch.Generator().manual_seed(MIX_SEED))
    synthetic = synthesize_negatives(embeddings, labels, gate, kappa=kappa, mix=mix)
    extractor.train(modes[0]), criterion.train(modes[1])

    classes = labels[::per_class]  # by first appearance, as the columns of `synthetic`
    places = torch.arange(n).view(-1, per_class)
    positive = places.roll(-1, dims=1).reshape(-1)
    to_positive = (embeddings - embeddings[positive]).norm(dim=1, keepdim=True)
    other_class = labels[:, None] != classes[None, :]
    other = labels[:, None] != labels[None, :]
    to_synthetic = (embeddings[:, None] - synthetic).norm(dim=2) / to_positive
    to_real = torch.cdist(embeddings, embeddings) / to_positive
    chosen = gate[other]
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    return Probe(
        iteration,
        kappa,
        to_synthetic[other_class],
        to_real[other],
        gate.var(dim=1, correction=0).mean().sqrt().item(),
        chosen.mean().item(),
        torch.quantile(chosen.flatten()[:: max(1, chosen.numel() // 100_000)], quantiles).tolist(),
    )
