"""The loss dropped into a plain loop: one backward, one optimizer."""

import torch

import gcng

torch.manual_seed(0)
centers = torch.randn(20, 32)  # 20 classes of noisy points

extractor = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
criterion = gcng.losses.GCAHNGLoss(embedding_size=16, num_classes=20)
optimizer = torch.optim.AdamW([*extractor.parameters(), *criterion.parameters()], lr=2e-3)

for step in range(30):
    labels = torch.randperm(20)[:10].repeat(2)  # 10 classes, two samples each, in any order
    inputs = centers[labels] + 0.5 * torch.randn(len(labels), 32)
    loss = criterion(extractor(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        terms = {name: round(float(value), 3) for name, value in criterion.last_terms.items()}
        print(f"step {step + 1}: loss {float(loss.detach()):.3f} {terms}")
