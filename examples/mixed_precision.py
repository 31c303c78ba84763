"""bfloat16 autocast with a GradScaler, on the CPU; device = "cuda" is the same program.

bfloat16 needs no scaling; float16 does. The scaler also leaves out a step that overflows.
"""

import torch

import gcng

device = "cpu"
torch.manual_seed(0)
centers = torch.randn(20, 32, device=device)

extractor = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)).to(device)
criterion = gcng.losses.GCAHNGLoss(embedding_size=16, num_classes=20).to(device)
optimizer = torch.optim.AdamW([*extractor.parameters(), *criterion.parameters()], lr=2e-3)
scaler = torch.amp.GradScaler(device)

for step in range(30):
    labels = torch.randperm(20)[:10].repeat(2)
    inputs = centers[labels] + 0.5 * torch.randn(len(labels), 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        embeddings = extractor(inputs)  # bfloat16
        loss = criterion(embeddings, labels)  # float32: losses and statistics always are
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {float(loss.detach()):.3f}, scale {scaler.get_scale():.0f}")
