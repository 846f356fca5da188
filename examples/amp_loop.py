"""Automatic mixed precision in float16: autocast and a GradScaler, on a GPU or the CPU."""

import torch
from torch import nn

from ivon_kernels import IVON

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
points = 1.2 * torch.randn(2000, 2, device=device)
labels = (points.square().sum(1) < 1).long()  # in the unit circle
model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)).to(device)
optimizer = IVON(model.parameters(), lr=1.0, ess=2000, hess_init=0.1, clip_radius=1.0)
scaler = torch.amp.GradScaler(device)

for step in range(120):
    batch = torch.arange(100, device=device) + 100 * step % 2000
    optimizer.train()  # a sample in the weights
    with torch.autocast(device, torch.float16):
        loss = nn.functional.cross_entropy(model(points[batch]).float(), labels[batch])
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # IVON unscales the gradients itself; an overflow skips the step and redraws nothing
    scaler.update()
    optimizer.zero_grad()

optimizer.eval()
with torch.no_grad():
    loss = nn.functional.cross_entropy(model(points), labels)
print(f"loss {loss:.3f} at the mean, {optimizer.skipped_steps} steps skipped")
