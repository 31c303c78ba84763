"""The published procedure: metric phase, classifier, generator phase, three optimizers, clipped gradients."""

import torch

import gcng
from gcng.training import Optimizers, train_step

torch.manual_seed(0)
centers = torch.randn(20, 32)

extractor = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
criterion = gcng.losses.GCAHNGLoss(embedding_size=16, num_classes=20)
optimizers = Optimizers(
    extractor=torch.optim.AdamW(extractor.parameters(), lr=2e-3, weight_decay=1e-4),
    graph=torch.optim.AdamW(criterion.graph.parameters(), lr=3e-4, weight_decay=1e-4),
    classifier=torch.optim.AdamW(criterion.classifier.parameters(), lr=1e-3),
)

for epoch in range(3):
    for _ in range(10):
        labels = torch.randperm(20)[:10].repeat(2)
        inputs = centers[labels] + 0.5 * torch.randn(len(labels), 32)
        terms = train_step(extractor, criterion, inputs, labels, optimizers, clip_value=10.0)
    criterion.schedule.end_epoch()  # hardness follows the averages of the epoch before
    shown = {name: round(float(value), 3) for name, value in terms.named().items()}
    print(f"epoch {epoch + 1}: {shown}, J_m average {criterion.schedule.j_avg:.3f}")
