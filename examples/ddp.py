"""DistributedDataParallel, changed in two lines: the optimizer and train().

torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ivon_kernels import IVON

gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
if gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpus else "gloo")
x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
sampler: DistributedSampler[TensorDataset] = DistributedSampler(data)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
replica = DistributedDataParallel(model)
optimizer = IVON(replica.parameters(), lr=0.2, ess=len(data))
for epoch in range(30):
    sampler.set_epoch(epoch)
    for inputs, labels in DataLoader(data, batch_size=32, sampler=sampler):
        optimizer.train()  # the same sample on every rank
        nn.functional.cross_entropy(replica(inputs.to(device)), labels.to(device)).backward()
        optimizer.step()  # the weights hold the mean again
        optimizer.zero_grad()
if dist.get_rank() == 0:
    with torch.no_grad():
        right = (model(x.to(device)).argmax(1).cpu() == data.tensors[1]).float().mean()
    print(f"{dist.get_world_size()} ranks, accuracy at the mean {right:.2f}")
dist.destroy_process_group()
