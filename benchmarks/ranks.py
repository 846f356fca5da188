"""The ranks of the benchmark of sharding: processes with DTensor shards that step when they are told to.

A module of its own, so that none of them imports what the benchmark draws with.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ivon_kernels
from benchmarks import UserError
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import Step, reason

IVON, ADAMW = "IVON: train() + step()", "AdamW (fused)"
_BLOCK = 4  # steps of a turn; the first one, with the caches of the process before, is not counted
_PATIENCE = timedelta(minutes=5)
_steps: dict[str, Step] = {}  # of this process, where it is a rank


@contextlib.contextmanager
def world(size: int, shapes: Sequence[tuple[int, ...]]) -> Iterator[list[ProcessPoolExecutor]]:
    """The ranks of one process group, each a process of its own that steps when it is told to.

    Every parameter is sharded over all ranks along its first dimension; `shapes` are those before.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sharding-") as folder, contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in range(size)]
        joined = [rank.submit(_join, index, size, f"{folder}/store", shapes) for index, rank in enumerate(ranks)]
        for index, future in enumerate(joined):
            answer(future, index, size)
        yield ranks


def answer(future: Future[Any], rank: int, size: int) -> Any:
    """What a rank returned, or UserError with its error."""
    try:
        return future.result()
    except Exception as error:  # of a rank, whatever it is
        raise UserError(f"rank {rank} of {size} failed: {reason(error)}") from error


def _join(rank: int, size: int, store: str, shapes: Sequence[tuple[int, ...]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=_PATIENCE)
    _steps.update({name: _build(name, shapes, size) for name in (IVON, ADAMW)})
    for name in (IVON, ADAMW):
        turn_of(name)


def turn_of(optimizer: str) -> list[float]:
    """Milliseconds of each of a few steps of this rank, while all others wait."""
    return CpuClock().wall_ms(_steps[optimizer], _BLOCK)[1:]


def _build(name: str, shapes: Sequence[tuple[int, ...]], size: int) -> Step:
    """An optimizer's step on parameters and gradients of its own."""
    mesh = init_device_mesh("cpu", (size,))
    params = []
    for shape in shapes:
        param = nn.Parameter(distribute_tensor(torch.rand(shape), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.rand(shape) * 0.01, mesh, [Shard(0)])
        params.append(param)
    if name == ADAMW:
        return Step(torch.optim.AdamW(params, lr=1e-4, fused=True).step)
    optimizer = ivon_kernels.IVON(params, lr=1e-4, ess=1e6, seed=0, backend="cpu")
    return Step(optimizer.step, begin=optimizer.train)
