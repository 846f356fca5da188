"""Accelerate: the usual loop plus one line, `optimizer.train()` before the forward pass."""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ivon_kernels import IVON

torch.manual_seed(0)
points = 1.2 * torch.randn(2000, 2)
labels = (points.square().sum(1) < 1).long()  # in the unit circle
model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
optimizer = IVON(model.parameters(), lr=1.0, ess=2000, hess_init=0.1, clip_radius=1.0)
data = DataLoader(TensorDataset(points, labels), batch_size=100, shuffle=True)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=200)

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
for _ in range(20):
    for x, y in data:
        with accelerator.accumulate(model):
            optimizer.train()  # a sample in the weights; the same one until the step
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()  # the mean in the weights again
            schedule.step()
            optimizer.zero_grad()
    optimizer.eval()
    with torch.no_grad():
        device = accelerator.device
        accuracy = (model(points.to(device)).argmax(1) == labels.to(device)).float().mean()
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)  # load_state continues bit for bit
accelerator.print(f"accuracy {accuracy:.3f}")
