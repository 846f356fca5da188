"""What the ranks of tests/distributed/test_fsdp.py run, continued: saving, loading, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ivon_kernels import IVON
from ivon_kernels.integrations.state_dict import save_mean
from tests.support.fsdp_training import (
    OPTIONS,
    TwoStates,
    batch,
    build,
    everything,
    loss_of,
    shard,
    steps,
    weights,
    whole,
)


def save_checkpoint(folder: str, kind: str, count: int, backend: str) -> dict[str, Tensor]:
    model = build()
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    steps(model, optimizer, count)
    states = get_state_dict(model, optimizer)
    checkpoint.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    return everything(model, optimizer)


def load_checkpoint(folder: str, kind: str, start: int, count: int, backend: str) -> TwoStates:
    """Everything right after loading, and after `count` more steps."""
    model = build(seed=1)
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), backend=backend, **{**OPTIONS, "seed": 12, "lr": 0.9})
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    loaded = everything(model, optimizer)
    steps(model, optimizer, count, start=start)
    return loaded, everything(model, optimizer)


def full_state_dict(kind: str, backend: str) -> dict[str, Any]:
    """The unsharded state, gathered on rank 0."""
    model = build()
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    steps(model, optimizer, 3)
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def take_over(state: dict[str, Any], weights_of: dict[str, Tensor], kind: str, backend: str) -> dict[str, Tensor]:
    """Load a plain optimizer's state dict as it is, and train on."""
    model = build()
    model.load_state_dict(weights_of)
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    optimizer.load_state_dict(state)
    steps(model, optimizer, 2, start=3)
    return everything(model, optimizer)


def saved_under_a_sample(backend: str, when: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean, and what a save writes while the weights hold a sample, perhaps gathered in the middle of a step."""
    model = build()
    shard(model, "FSDP2")
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    save_mean(model, optimizer)
    steps(model, optimizer, 2)
    mean = weights(model)
    optimizer.train()
    loss = loss_of(model, batch(2))
    if when == "after backward":
        loss.backward()
    found = {name: whole(value) for name, value in get_model_state_dict(model).items()}
    assert all(torch.equal(found[name], whole(value)) for name, value in model.state_dict().items())
    assert optimizer.holds_sample and not torch.equal(weights(model)["first.weight"], mean["first.weight"])
    return mean, found


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """The messages of optimizers that cannot be."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole_tensor, strided = torch.zeros(4, 4, 4), _StridedShard(0, split_factor=2)
    placed = {
        "partial": DTensor.from_local(torch.zeros(4), mesh["a"], [Partial()], run_check=False),
        "inner": distribute_tensor(whole_tensor, mesh, [Shard(1), Shard(2)]),
        "strided": DTensor.from_local(torch.zeros(2, 4), mesh["a"], [strided], run_check=False),
    }
    found = {}
    for name, tensor in placed.items():
        found[name] = _message(lambda tensor=tensor: IVON([nn.Parameter(tensor)], **OPTIONS))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh["a"], [Shard(0)]))
    found["sync"] = _message(lambda: IVON([sharded], sync=True, **OPTIONS))

    model = build()
    early = IVON(model.named_parameters(), **OPTIONS)
    fully_shard(model, mesh=mesh["a"])
    early.train()
    loss_of(model, batch(0)).backward()
    found["early"] = _message(early.step)

    flat = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    found["FSDP1"] = _message(lambda: IVON(flat.parameters(), **OPTIONS))
    return found


def _message(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return "no error"
