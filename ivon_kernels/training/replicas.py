"""Data-parallel replicas: one seed for all of them, and the opt-in of independent noise with its own all-reduce.

Every rank of the default process group is a replica: it trains the same parameters. That holds for
``DistributedDataParallel(process_group=...)`` too, whatever the group.

By default all replicas draw the same noise, and a step communicates nothing: the average of their gradients is the
gradient of one sample on the whole batch. With ``sync=True`` each draws its own, so that W ranks give W samples: the
step adds up g^ and g^ * noise in one all-reduce (of each arena, that is for each device and state dtype), on whose tail
travels what the ranks have to agree on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ivon_kernels.backends.state import Arena, ParamState

AVERAGED = (
    "sync=True, but the gradients are the same on every rank, so something averages them already "
    "(DistributedDataParallel?): use sync=False with it, or run the backward pass under no_sync()"
)


def world() -> tuple[int, int]:
    """Rank and world size of the default process group; (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def agree_on_seed(seed: int, given: bool, steps: int) -> int:
    """The seed of all replicas: the given one, else rank 0's.

    Every rank of the default process group must call this, in the same order. The optimizer does so when it is built
    and, because the group may be younger and a state dict may have been loaded since, at its first training sample.

    Args:
        seed: This rank's.
        given: Whether somebody chose it.
        steps: Finished steps, which decide the noise too.

    Raises:
        ValueError: On every rank, if the replicas would draw different noise and silently train different models.
    """
    size = world()[1]
    if size == 1:
        return seed
    replicas: list[tuple[int, bool, int]] = [(0, False, 0)] * size
    dist.all_gather_object(replicas, (seed, given, steps))
    seeds = [one[0] for one in replicas]
    counts = [one[2] for one in replicas]
    if len(set(seeds)) > 1 and any(one[1] for one in replicas):
        raise ValueError(
            f"the ranks have different seeds ({', '.join(map(str, seeds))}); give every rank the same seed: replicas "
            "share their noise, so that they stay equal (independent noise: sync=True)"
        )
    if len(set(counts)) > 1:
        raise ValueError(
            f"the ranks have finished different numbers of steps ({', '.join(map(str, counts))}): load the same "
            "checkpoint on every rank"
        )
    return seeds[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank of the default process group, all of which have to ask."""
    votes = torch.tensor(int(flag), dtype=torch.int64, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def smallest_of_all_ranks(value: Tensor) -> None:
    """The smallest value of all ranks of the default process group, in place and without waiting for the device."""
    dist.all_reduce(value, dist.ReduceOp.MIN)


class Shared(NamedTuple):
    """What the ranks know of each other after `share_samples`."""

    samples: int  # drawn on all ranks together
    bad: bool  # on some rank the step must not be taken
    averaged: bool  # ranks with noise of their own have the same gradient: somebody averages gradients


def share_samples(states: list[ParamState], samples: int, bad: bool) -> Shared:
    """Add up the MC sums of all ranks, in place; a parameter that had a gradient on any rank is summed on every one.

    Args:
        states: Equal on every rank, with their sums complete.
        samples: How many samples this rank's sums have.
        bad: Whether this rank must not take the step.
    """
    rank, size = world()
    # Samples, bad ranks, checksums of the first and of the last rank.
    facts = torch.zeros(4, dtype=torch.float64, device="cpu")
    for arena in dict.fromkeys(state.arena for state in states):  # in order, equal on every rank
        facts += _share_arena(arena, [state for state in states if state.arena is arena], samples, bad, rank, size)
        samples, bad = 0, False  # told once
    first, last = facts[2:].tolist()
    return Shared(int(facts[0]), bool(facts[1]), averaged=first == last != 0.0)


def _share_arena(arena: Arena, states: list[ParamState], samples: int, bad: bool, rank: int, size: int) -> Tensor:
    """One all-reduce. Its tail: which parameters have sums, then the four facts."""
    grad_sum = arena.clear_sums()[0] if arena.grad_sum is None else arena.grad_sum
    assert arena.sums is not None
    tail = [0.0] * arena.tail.numel()
    for state in states:
        tail[state.position] = float(state.summed)
    # The tail travels with the sums in the arena's dtype: small whole numbers, which float32 adds exactly.
    tail[-4:] = [float(samples), float(bad), 0.0, 0.0]
    if rank in (0, size - 1):
        checksum = float(grad_sum.sum(dtype=torch.float64).float())
        tail[-2 if rank == 0 else -1] = checksum if abs(checksum) < torch.inf else 0.0
    arena.tail.copy_(torch.tensor(tail, dtype=arena.tail.dtype, device="cpu"))
    dist.all_reduce(arena.sums)
    told = arena.tail.tolist()
    for state in states:
        state.mark_summed(told[state.position] > 0.0)
    return torch.tensor(told[-4:], dtype=torch.float64, device="cpu")
