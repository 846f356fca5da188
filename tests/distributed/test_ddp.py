"""DistributedDataParallel as it is: replicas share their noise, so a step is that of one process on the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from ivon_kernels import IVON, NonFiniteGradientError
from tests.support.helpers import OPTIONS, flat, relative_error, state
from tests.support.ranks import Ranks

# A gradient is a mean over 16 rows, which several ranks add up in another order: an error of 16 * 2^-24 = 1e-6 of the
# greatest terms at most, in each of 6 steps.
ROUNDING = 1e-5
STEPS = 6


class Net(nn.Module):
    """Two layers, and a third that only some forward passes use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.spare = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + (self.spare(hidden) if spare else 0.0)


def rows(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the 16 rows of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 6, generator=generator)
    return x[rank::world], x[rank::world].sum(1, keepdim=True).sin()


def loss_of(net: nn.Module, part: tuple[Tensor, Tensor], spare: bool = False) -> Tensor:
    return (net(part[0], spare) - part[1]).square().mean()


def build(net: nn.Module, **options: Any) -> IVON:
    return IVON([p for p in net.parameters() if p.requires_grad], seed=7, **{**OPTIONS, **options})


def ending(optimizer: IVON) -> dict[str, Tensor]:
    """Weights and state: what the ranks must agree on and what one process is compared with."""
    params = optimizer.param_groups[0]["params"]
    steps = torch.stack([optimizer.state[p]["step"] for p in params])
    return {"mean": flat(params), "step": steps, **{key: state(optimizer, key) for key in ("momentum", "hess")}}


def assert_equal(results: list[dict[str, Tensor]]) -> None:
    for result in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(result[key], value), f"the ranks differ in {key}"


def assert_close(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        assert relative_error(result[key], value) < ROUNDING, key


def plain(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    optimizer.train()
    loss_of(net, part).backward()


def in_blocks(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    with optimizer.sampled_params(train=True):
        loss_of(net, part).backward()


def two_samples(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    in_blocks(net, optimizer, step, part)
    optimizer.zero_grad()
    in_blocks(net, optimizer, step, part)


def accumulated(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    """Two micro-batches; only the second averages the gradients over the ranks."""
    halves = list(zip(part[0].chunk(2), part[1].chunk(2), strict=True))
    for number, half in enumerate(halves):
        optimizer.train()
        with net.no_sync() if isinstance(net, DDP) and number == 0 else contextlib.nullcontext():
            (loss_of(net, half) / 2).backward()


def clipped(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    plain(net, optimizer, step, part)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert norm > 0.1, "nothing to clip"


def spare_sometimes(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    """The spare layer is used in every second step."""
    optimizer.train()
    loss_of(net, part, spare=step % 2 == 1).backward()


def spare_on_one_rank(net: nn.Module, optimizer: IVON, step: int, part: tuple[Tensor, Tensor]) -> None:
    optimizer.train()
    loss_of(net, part, spare=dist.get_rank() == 1).backward()


Work = Callable[[nn.Module, IVON, int, tuple[Tensor, Tensor]], None]


def fit(net: nn.Module, optimizer: IVON, work: Work, start: int, stop: int) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if isinstance(net, DDP) else (0, 1)
    for step in range(start, stop):
        work(net, optimizer, step, rows(step, rank, world))
        optimizer.step()
        optimizer.zero_grad()


def net_for(work: Work) -> Net:
    net = Net()
    net.spare.requires_grad_(work in (spare_sometimes, spare_on_one_rank))
    return net


def trained(work: Work, options: dict[str, Any]) -> dict[str, Tensor]:
    """One rank's end under DDP."""
    replica = DDP(net_for(work), **options)
    optimizer = build(replica)
    fit(replica, optimizer, work, 0, STEPS)
    return ending(optimizer)


def alone(work: Work) -> dict[str, Tensor]:
    """The same on one process, which has the whole batch."""
    net = net_for(work)
    optimizer = build(net)
    fit(net, optimizer, work, 0, STEPS)
    return ending(optimizer)


@pytest.mark.parametrize(
    ("world_size", "work"),
    [
        (1, plain),
        pytest.param(4, plain, marks=pytest.mark.slow),
        *((2, work) for work in (plain, in_blocks, two_samples, accumulated, clipped)),
    ],
)
def test_equals_one_process_on_the_whole_batch(ranks: Ranks, world_size: int, work: Work) -> None:
    results = ranks.run(world_size, trained, work, {})
    assert_equal(results)
    assert_close(results[0], alone(work))


@pytest.mark.parametrize(
    ("options", "work"),
    [
        ({"gradient_as_bucket_view": True}, plain),
        ({"gradient_as_bucket_view": True}, accumulated),
        ({"gradient_as_bucket_view": True}, two_samples),
        ({"static_graph": True}, plain),
        ({"find_unused_parameters": True}, spare_sometimes),
        ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, spare_sometimes),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__,
)
def test_options_of_ddp(ranks: Ranks, options: dict[str, Any], work: Work) -> None:
    results = ranks.run(2, trained, work, options)
    assert_equal(results)
    assert_close(results[0], alone(work))


def test_a_parameter_used_on_one_rank_is_trained_on_all(ranks: Ranks) -> None:
    results = ranks.run(2, trained, spare_on_one_rank, {"find_unused_parameters": True})
    assert_equal(results)
    assert results[0]["step"].tolist() == [STEPS] * 6


def a_hundred_steps() -> dict[str, Tensor]:
    """Every rank has data of its own, and a global seed of its own that decides nothing."""
    torch.manual_seed(dist.get_rank())
    replica = DDP(net_for(plain))
    optimizer = build(replica)
    samples, losses = [], []
    for step in range(100):
        optimizer.train()
        samples.append(flat(optimizer.param_groups[0]["params"]))
        loss = loss_of(replica, rows(step, dist.get_rank(), dist.get_world_size()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {**ending(optimizer), "samples": torch.stack(samples), "losses": torch.stack(losses)}


def test_replicas_stay_bit_identical_for_100_steps(ranks: Ranks) -> None:
    results = ranks.run(4, a_hundred_steps)
    losses = [result.pop("losses") for result in results]
    assert not torch.equal(losses[0], losses[1]), "the ranks have the same data"
    assert_equal(results)


class Quadratic(nn.Module):
    """``c/2 |w|^2 + slope sum(w)``: where the ranks' slopes add up to 0, training starts at the optimum."""

    curvature = 4.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4096))

    def forward(self, slope: float) -> Tensor:
        return 0.5 * self.curvature * self.weight.square().sum() + slope * self.weight.sum()


def hessian(steps: int, micro_batches: int) -> Tensor:
    """Each rank's own gradient has a slope which only the average is free of, so its own estimate would be wrong."""
    replica = DDP(Quadratic())
    optimizer = IVON(replica.parameters(), 1e-6, 100.0, hess_init=Quadratic.curvature, beta2=0.98, weight_decay=1e-6)
    slope = 8.0 * (dist.get_rank() - (dist.get_world_size() - 1) / 2)
    for _ in range(steps):
        optimizer.train()
        for number in range(micro_batches):
            with replica.no_sync() if number < micro_batches - 1 else contextlib.nullcontext():
                (replica(slope) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(optimizer, "hess")


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (4, 1), (2, 3)])
def test_the_hessian_is_right(ranks: Ranks, world_size: int, micro_batches: int) -> None:
    """At the optimum an estimate is c eps^2, of mean c and variance 2 c^2, at any world size.

    After T steps the average with decay b = beta2 has the variance v = 2 c^2 (1 - b) / (1 + b) (1 - b^2T), and its mean
    over n elements the standard deviation sqrt(v / n). The update's quadratic term adds (1 - b)^2 / (2 c) times
    E (h - h^)^2 = 2 c^2 + O(v) in each step, in all (1 - b) (1 - b^T) c; a tenth of it covers O(v) = 0.01 * 2 c^2.
    """
    curvature, beta2, steps = Quadratic.curvature, 0.98, 60
    estimates = ranks.run(world_size, hessian, steps, micro_batches)
    assert all(torch.equal(estimate, estimates[0]) for estimate in estimates)
    settled = 1 - beta2**steps
    bias = settled * (1 - beta2) * curvature
    variance = 2 * curvature**2 * (1 - beta2) / (1 + beta2) * (1 - beta2 ** (2 * steps))
    deviation = (variance / estimates[0].numel()) ** 0.5
    assert abs(float(estimates[0].mean()) - curvature - bias) < 5 * deviation + 0.1 * bias


def with_scaler(overflow_on: int | None) -> tuple[dict[str, Tensor], float, int]:
    """Four steps under a GradScaler, the second with an overflow on one rank."""
    replica = DDP(net_for(plain))
    optimizer = build(replica)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.train()
        factor = float("inf") if step == 1 and dist.get_rank() == overflow_on else 1.0
        scaler.scale(factor * loss_of(replica, rows(step, dist.get_rank(), dist.get_world_size()))).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(replica.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    optimizer.eval()
    return ending(optimizer), scaler.get_scale(), optimizer.skipped_steps


def test_an_overflow_on_one_rank_is_skipped_on_all(ranks: Ranks) -> None:
    results = ranks.run(2, with_scaler, 1)
    assert_equal([result for result, _, _ in results])
    assert [(scale, skipped) for _, scale, skipped in results] == [(2.0**9, 1)] * 2
    assert results[0][0]["step"].tolist() == [3] * 4
    smooth = ranks.run(2, with_scaler, None)
    assert [(scale, skipped) for _, scale, skipped in smooth] == [(2.0**10, 0)] * 2


def with_a_nan(nonfinite: str) -> tuple[dict[str, Tensor], int, str]:
    replica = DDP(net_for(plain))
    optimizer = build(replica, nonfinite=nonfinite)
    refusal = ""
    for step in range(3):
        optimizer.train()
        factor = float("nan") if step == 1 and dist.get_rank() == 1 else 1.0
        (factor * loss_of(replica, rows(step, dist.get_rank(), dist.get_world_size()))).backward()
        try:
            optimizer.step()
        except NonFiniteGradientError as error:
            refusal = str(error)
        optimizer.zero_grad()
    optimizer.eval()
    return ending(optimizer), optimizer.skipped_steps, refusal


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_nan_on_one_rank_is_noticed_on_all(ranks: Ranks, nonfinite: str) -> None:
    results = ranks.run(2, with_a_nan, nonfinite)
    assert_equal([result for result, _, _ in results])
    assert results[0][0]["step"].tolist() == [2] * 4 and results[0][0]["hess"].isfinite().all()
    for _, skipped, refusal in results:
        assert skipped == (nonfinite == "skip") and ("holds inf or nan" in refusal) == (nonfinite == "raise")


def interrupted(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rank 0 saves in the middle of a step; all load, and go on. Beside it the run without interruption."""
    uninterrupted = DDP(net_for(plain))
    whole = build(uninterrupted)
    fit(uninterrupted, whole, accumulated, 0, 6)

    replica = DDP(net_for(plain))
    optimizer = build(replica)
    fit(replica, optimizer, accumulated, 0, 3)
    optimizer.train()
    if dist.get_rank() == 0:
        optimizer.eval()
        torch.save((replica.module.state_dict(), optimizer.state_dict()), f"{folder}/checkpoint.pt")
        optimizer.train()
    dist.barrier()

    weights, saved = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
    net = net_for(plain)
    net.load_state_dict(weights)
    resumed = DDP(net)
    optimizer = IVON([p for p in net.parameters() if p.requires_grad], 1.0, 1.0)
    optimizer.load_state_dict(saved)
    means = [entry["mean"] for entry in saved["state"].values()]
    assert torch.equal(flat(optimizer.param_groups[0]["params"]), flat(means))
    fit(resumed, optimizer, accumulated, 3, 6)
    return ending(optimizer), ending(whole)


def test_resumed_equals_uninterrupted(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(2, interrupted, str(tmp_path))
    assert_equal([*(resumed for resumed, _ in results), *(whole for _, whole in results)])


def evaluated(where: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Evaluates at the mean and at two samples between the steps, on rank 0 or everywhere."""
    replica = DDP(net_for(plain))
    optimizer = build(replica)
    seen = []
    for step in range(3):
        plain(replica, optimizer, step, rows(step, dist.get_rank(), dist.get_world_size()))
        if where == "everywhere" or (where == "rank 0" and dist.get_rank() == 0):
            with torch.no_grad():
                for sample in range(2):
                    with optimizer.sampled_params(sample=sample):
                        seen.append(replica.module(torch.ones(1, 6)))
                optimizer.eval()
                seen.append(replica.module(torch.ones(1, 6)))
                optimizer.train()
        optimizer.step()
        optimizer.zero_grad()
    return ending(optimizer), seen


def test_evaluation_may_differ_between_ranks(ranks: Ranks) -> None:
    nowhere, first, everywhere = (ranks.run(2, evaluated, where) for where in ("nowhere", "rank 0", "everywhere"))
    assert_equal([result for run in (nowhere, first, everywhere) for result, _ in run])
    assert len(first[0][1]) == 9 and not first[1][1]
    for run in (first[0], everywhere[1]):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run[1], everywhere[0][1], strict=True))
    assert len({float(value) for value in everywhere[0][1]}) == 9


class Collectives(TorchDispatchMode):
    """Notes every collective of torch.distributed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def communication(sync: bool, nonfinite: str) -> list[list[str]]:
    """Collectives of each of five steps, with those of DDP's backward pass."""
    replica = DDP(net_for(plain))
    optimizer = build(replica, sync=sync, nonfinite=nonfinite)
    seen = []
    for step in range(5):
        with Collectives() as collectives:
            with replica.no_sync() if sync else contextlib.nullcontext():
                (in_blocks if step % 2 else plain)(
                    replica, optimizer, step, rows(step, dist.get_rank(), dist.get_world_size())
                )
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
        seen.append(collectives.seen)
    return seen


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("sync", [False, True])
def test_a_step_adds_no_communication(ranks: Ranks, sync: bool, nonfinite: str) -> None:
    """DDP's own all-reduce, or, with independent noise, one in its place. The first step compares the seeds.

    DDP itself arranges its buckets anew in the second.
    """
    for first, _, *later in ranks.run(2, communication, sync, nonfinite):
        assert later == [["allreduce_"]] * 3
        assert "allgather_" in first
