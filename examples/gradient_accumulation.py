"""Gradient accumulation: the gradients of several batches, one optimizer step.

Each batch has a graph of its own, so four batches of 20 are four graphs and not one batch of 80.
"""

import torch

import gcng

BATCHES = 4
torch.manual_seed(0)
centers = torch.randn(20, 32)

extractor = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
criterion = gcng.losses.GCAHNGLoss(embedding_size=16, num_classes=20)
optimizer = torch.optim.AdamW([*extractor.parameters(), *criterion.parameters()], lr=2e-3)

for step in range(10):
    optimizer.zero_grad()
    total = 0.0
    for _ in range(BATCHES):
        labels = torch.randperm(20)[:10].repeat(2)
        inputs = centers[labels] + 0.5 * torch.randn(len(labels), 32)
        loss = criterion(extractor(inputs), labels) / BATCHES  # the mean over the batches
        loss.backward()  # adds to .grad
        total += float(loss.detach())
    optimizer.step()
    print(f"step {step + 1}: loss {total:.3f}")
