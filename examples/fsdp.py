"""FSDP2 with a checkpoint for any number of ranks: torchrun --nproc-per-node 2 examples/fsdp.py FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ivon_kernels import IVON

torch.manual_seed(0)
device = torch.accelerator.current_accelerator() or torch.device("cpu")
dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
for module in (model[0], model[2], model):
    fully_shard(module)
optimizer = IVON(model.parameters(), lr=0.05, ess=1e4, seed=0)  # the same noise at any number of ranks

if (folder := Path(sys.argv[1])).exists():  # written at any number of ranks
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

x = torch.randn(512, 8, device=device).chunk(world)[rank]
for _ in range(100):
    optimizer.train()
    loss = (model(x) - x.mean(1, keepdim=True).sin()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, storage_writer=dcp.FileSystemWriter(folder, overwrite=True))
if rank == 0:
    print(f"{world} ranks, loss on the first one's share {loss.item():.4f}")
dist.destroy_process_group()
