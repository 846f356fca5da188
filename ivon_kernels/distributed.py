"""Data-parallel replicas: one seed for all of them, and the opt-in of independent noise with its own all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ivon_kernels.arena import Slot


def world() -> tuple[int, int]:
    """Rank and world size of the default process group; (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def agree_on_seed(seed: int | None) -> int:
    """The seed of all replicas: the given one, else rank 0's ``torch.initial_seed()``.

    Every rank of the default process group must call this (once per optimizer, in the same order).

    Raises:
        ValueError: On every rank, if the ranks were given different seeds: they would silently train different models.
    """
    if world()[1] > 1:
        seeds: list[tuple[int | None, int]] = [(None, 0)] * world()[1]
        dist.all_gather_object(seeds, (seed, torch.initial_seed()))
        given = {own for own, _ in seeds}
        if len(given) > 1:
            raise ValueError(
                f"the ranks have different seeds ({', '.join(str(own) for own, _ in seeds)}); give every rank the same "
                "seed: replicas share their noise, so that they stay equal (independent noise: sync=True)"
            )
        if seed is None:
            seed = seeds[0][1]
    return torch.initial_seed() if seed is None else seed


def check_not_averaged(slots: list[Slot]) -> None:
    """Refuse gradients that were averaged over the ranks before IVON sees them, as DistributedDataParallel does.

    Each rank has noise of its own, so equal gradients mean that somebody averaged them; the Hessian estimate would then
    be too small by the world size.

    Raises:
        RuntimeError: On every rank.
    """
    checksum = sum(float(slot.param.grad.double().sum()) for slot in slots if slot.param.grad is not None)
    checksums = [0.0] * world()[1]
    dist.all_gather_object(checksums, checksum)
    if checksum != 0.0 and len(set(checksums)) == 1:
        raise RuntimeError(
            "sync=True, but the gradients are the same on every rank, so something averages them already "
            "(DistributedDataParallel?): use sync=False with it, or run the backward pass under no_sync()"
        )


def share_samples(slots: list[Slot]) -> None:
    """Sum the MC sums of all ranks, in place; a parameter that had a gradient on any rank is summed on every one."""
    summed = torch.tensor([slot.summed for slot in slots], dtype=torch.int32, device=slots[0].param.device)
    dist.all_reduce(summed, dist.ReduceOp.MAX)
    for slot, flag in zip(slots, summed.tolist(), strict=True):
        slot.summed = bool(flag)
    for total in _totals(slots):
        dist.all_reduce(total)


def sums_finite(slots: list[Slot]) -> bool:
    """Whether all MC sums are finite."""
    return all(bool(torch.isfinite(total).all()) for total in _totals(slots))


def _totals(slots: list[Slot]) -> list[Tensor]:
    arenas = dict.fromkeys(slot.arena for slot in slots)  # in order, equal on every rank
    return [total for arena in arenas for total in (arena.grad_sum, arena.second_sum) if total is not None]
