"""What the ranks of tests/distributed/test_fsdp.py run: functions of modules, which can be sent to other processes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ivon_kernels import IVON
from ivon_kernels.integrations.saving import save_posterior
from tests.support.cuda_emulator import emulated

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 11}
BATCH = 8
Trained = tuple[list[dict[str, Tensor]], dict[str, Tensor]]  # sampled weights of every step; weights and state
TwoStates = tuple[dict[str, Tensor], dict[str, Tensor]]


class Model(nn.Module):
    """Sizes that do not divide evenly: some ranks have shorter shards than others, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).tanh())
        return out


def build(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator)


def share(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = batch(step)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().mean()


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it, on every rank."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def everything(model: nn.Module, optimizer: IVON) -> dict[str, Tensor]:
    """Weights and state, unsharded, by name."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p)
        for key, value in optimizer.state[p].items():
            found[f"{name}.{key}"] = whole(value)
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def steps(
    model: nn.Module, optimizer: IVON, count: int, *, start: int = 0, same_data: bool = True, clip: float | None = None
) -> list[dict[str, Tensor]]:
    """A training loop; returns the sampled weights of every step.

    With `same_data` all ranks see the whole batch, so that averaging their gradients rounds nothing at 1, 2 or 4 ranks.
    """
    sampled = []
    for step in range(start, start + count):
        optimizer.train()
        sampled.append(weights(model))
        optimizer.zero_grad()
        loss_of(model, batch(step) if same_data else share(step)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return sampled


def shard(model: Model, kind: str) -> DeviceMesh | None:
    """Shard a model in one of the ways that the tests name."""
    if kind == "plain":
        return None
    world = dist.get_world_size()
    if kind == "tensor parallel":
        return _tensor_parallel(model, init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp")))
    hybrid = kind == "HSDP"
    mesh = init_device_mesh(
        "cpu", (2, world // 2) if hybrid else (world,), mesh_dim_names=("replicas", "shards") if hybrid else ("shards",)
    )
    if kind == "columns":  # FSDP2 wants an inner dimension to divide evenly
        fully_shard(model.last, mesh=mesh, shard_placement_fn=_by_columns)
    elif kind == "mixed":  # the norm stays an ordinary module
        fully_shard(model.first, mesh=mesh)
        fully_shard(model.last, mesh=mesh)
    else:
        for module in (model.first, model.last, model):
            fully_shard(module, mesh=mesh)
    return mesh


def _by_columns(param: nn.Parameter) -> Shard:
    return Shard(1 if param.ndim == 2 else 0)


def _tensor_parallel(model: Model, mesh: DeviceMesh) -> DeviceMesh:
    replicate = Replicate()
    plan = {
        "first": ColwiseParallel(output_layouts=replicate),
        "last": RowwiseParallel(input_layouts=replicate),
    }
    parallelize_module(model, mesh["tp"], plan)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # RowwiseParallel's bias
    if mesh["dp"].size() > 1:  # both on the rows of `first`: a strided placement
        fully_shard(model.first, mesh=mesh["dp"])
        fully_shard(model.last, mesh=mesh["dp"])
    return mesh


def plain(count: int, backend: str, clip: float | None = None) -> Trained:
    """What all others are compared with: one process, ordinary parameters."""
    model = build()
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    return steps(model, optimizer, count, clip=clip), everything(model, optimizer)


def trained(kind: str, count: int, backend: str, same_data: bool, clip: float | None) -> Trained:
    model = build()
    shard(model, kind)
    with emulated(backend):
        optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
        return steps(model, optimizer, count, same_data=same_data, clip=clip), everything(model, optimizer)


# --- moments at which FSDP2 keeps its gathered weights ----------------------------------------------------------------


def sample_after_evaluation(backend: str) -> list[bool]:
    """Whether the forward pass sees the sample, after FSDP2's root kept the weights that an evaluation gathered."""
    model = build()
    shard(model, "FSDP2")
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    x, _ = batch(0)
    seen = []
    for _ in range(2):
        with torch.no_grad():
            at_mean = model(x)
            optimizer.train()
            sampled = model(x)
            optimizer.eval()
            again = model(x)
            with optimizer.sampled_params(sample=0):
                evaluated = model(x)
        seen += [not torch.equal(sampled, at_mean), torch.equal(again, at_mean), not torch.equal(evaluated, sampled)]
        steps(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        before = model(x)
        state = optimizer.state_dict()
        state["state"][2]["mean"] = state["state"][2]["mean"] * 2  # norm.weight, which only the root gathers
        optimizer.load_state_dict(state)
        seen.append(not torch.equal(model(x), before))
    return seen


def accumulated(kind: str, micro: int, backend: str) -> dict[str, Tensor]:
    """Accumulation; FSDP2 communicates no gradients and keeps its gathered weights until the last micro-batch."""
    model = build()
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    for step in range(3):
        x, y = batch(step)
        for i, data in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            if kind != "plain":
                model.set_requires_gradient_sync(i == micro - 1)
                model.set_reshard_after_backward(i == micro - 1)
            optimizer.train()
            (loss_of(model, data) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return everything(model, optimizer)


def monte_carlo(kind: str, backend: str) -> dict[str, Tensor]:
    """Two samples a step, while FSDP2 is told to keep its gathered weights after backward."""
    model = build()
    shard(model, kind)
    if kind != "plain":
        model.set_reshard_after_backward(False)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    for step in range(3):
        for sample in range(2):
            with optimizer.sampled_params(train=True, sample=7 if sample else None):
                optimizer.zero_grad()
                loss_of(model, batch(step)).backward()
        optimizer.step()
    return everything(model, optimizer)


def scaled(kind: str, backend: str, bad_rank: int | None) -> tuple[dict[str, Tensor], int, float]:
    """A GradScaler; in the second step the gradient overflows, on one rank's part of the data if `bad_rank` says so."""
    model = build()
    shard(model, kind)
    with emulated(backend):
        optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(4):
            optimizer.train()
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(model, batch(step)))
            if step == 1 and bad_rank in (None, dist.get_rank() if dist.is_initialized() else None):
                loss = loss * float("inf")
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.eval()
        return everything(model, optimizer), optimizer.skipped_steps, scaler.get_scale()


def one_bad_shard(backend: str, nonfinite: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int, str]:
    """Only rank 0's shard of a gradient holds NaN: state before and after, skipped steps, the error."""
    model = build()
    shard(model, "FSDP2")
    with emulated(backend):
        optimizer = IVON(model.named_parameters(), backend=backend, nonfinite=nonfinite, **OPTIONS)  # type: ignore[arg-type]
        steps(model, optimizer, 1)
        before = everything(model, optimizer)
        optimizer.train()
        loss_of(model, batch(1)).backward()
        if dist.get_rank() == 0:
            model.first.weight.grad.to_local()[0, 0] = float("nan")
        message = ""
        try:
            optimizer.step()
            optimizer.eval()
        except RuntimeError as error:
            message = str(error)
        return before, everything(model, optimizer), optimizer.skipped_steps, message


def collectives_in_a_step(backend: str) -> int:
    """How many collectives of any kind train() and step() call."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = build()
    shard(model, "FSDP2")
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    steps(model, optimizer, 1)
    counted = 0
    with CommDebugMode() as outside:
        optimizer.train()
    counted += outside.get_total_counts()
    loss_of(model, batch(1)).backward()
    with CommDebugMode() as outside:
        optimizer.step()
    return counted + outside.get_total_counts()


def swapped(trained_before: int, first: str, backend: str) -> dict[str, Tensor]:
    """As Accelerate prepares for FSDP2: the optimizer is built first, and its parameters are exchanged for shards."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    model = build()
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    steps(model, optimizer, trained_before)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    params = optimizer.param_groups[0]["params"]
    for i, p in enumerate(params):
        params[i] = torch.empty(1)
        params[i].data_ptr = p.data_ptr()
    shard(model, "FSDP2")
    fsdp2_switch_optimizer_parameters(optimizer, {addresses[name]: p for name, p in model.named_parameters()})
    if first == "state dict":  # AcceleratedOptimizer loads its own
        optimizer.load_state_dict(optimizer.state_dict())
    elif first == "evaluation":
        mean = weights(model)
        with optimizer.sampled_params():
            assert not torch.equal(weights(model)["first.weight"], mean["first.weight"])
    steps(model, optimizer, 4 - trained_before, start=trained_before)
    return everything(model, optimizer)


def converted(kind: str, backend: str) -> dict[str, Tensor]:
    """A model that gets another dtype, and with it other memory, after the optimizer was built."""
    model = build()
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    optimizer.train()
    optimizer.eval()
    model.to(torch.bfloat16)  # later FSDP2 itself does not follow
    for step in range(3):
        optimizer.train()
        optimizer.zero_grad()
        x, y = batch(step)
        loss_of(model, (x.bfloat16(), y.bfloat16())).backward()
        optimizer.step()
    return everything(model, optimizer)


def partial_gradient(backend: str) -> tuple[Tensor, Tensor]:
    """A replicated parameter whose gradient is a sum that nobody has computed yet, and a plain one with the sum."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start = torch.arange(6.0)
    params = [nn.Parameter(distribute_tensor(start, mesh, [Replicate()])), nn.Parameter(start.clone())]
    for param in params:
        optimizer = IVON([param], backend=backend, **OPTIONS)
        optimizer.train()
        if isinstance(param, DTensor):
            mine = torch.full((6,), 1.0 + dist.get_rank())
            param.grad = DTensor.from_local(mine, mesh, [Partial()], run_check=False)
        else:
            param.grad = torch.full((6,), 3.0)  # of two ranks
        optimizer.step()
    return whole(params[0]), whole(params[1])


# --- the posterior ----------------------------------------------------------------------------------------------------


def posterior_of_shards(kind: str) -> tuple[dict[str, Tensor], ...]:
    """Mean, Hessian and a sample of the trained posterior, the weights that hold it, and the model's outputs."""
    model = build()
    shard(model, kind)
    optimizer = IVON(model.named_parameters(), **OPTIONS)
    steps(model, optimizer, 2, same_data=True)
    posterior = optimizer.posterior(model)
    with posterior.sampled(model, 5):
        held = {name: whole(param) for name, param in posterior.parameters_of(model).items()}
        with torch.no_grad():
            outputs = {"outputs": model(batch(0)[0])}
    outputs["at the mean"] = model(batch(0)[0]).detach()
    hess = {name: one.hess for name, one in posterior.items()}
    posterior.pruned(0.5).copy_mean_to(model)
    pruned = {name: whole(param) for name, param in posterior.parameters_of(model).items()}
    return posterior.mean, hess, posterior.draw(5), held, outputs, pruned


def saved_beside_the_model(folder: str) -> dict[str, Tensor]:
    """All ranks call it, the first one writes. Returns the mean."""
    model = build()
    shard(model, "FSDP2")
    optimizer = IVON(model.named_parameters(), **OPTIONS)
    steps(model, optimizer, 2)
    save_posterior(optimizer, model, folder, writes=dist.get_rank() == 0)
    dist.barrier()
    return everything(model, optimizer)
