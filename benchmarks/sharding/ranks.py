"""Groups of processes with DTensor shards, each of which steps when it is told to: never two at a time."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

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
OPTIMIZERS = (IVON, ADAMW)
_BLOCK = 4  # steps of a turn; the first one, with the caches of the process before, is not counted
_SECONDS = 300.0
Shapes = Sequence[tuple[int, ...]]


class World:
    """The ranks of one process group.

    Args:
        size: How many ranks.
        shapes: The unsharded shapes of the parameters, each sharded over all ranks along its first dimension.

    Raises:
        UserError: If a rank fails, with its error.
    """

    def __init__(self, size: int, shapes: Shapes) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="sharding-")
        store = str(Path(self._folder.name) / "store")
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, store, list(shapes)), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        for rank in range(size):
            self._receive(rank)

    def turn(self, rank: int, optimizer: str) -> list[float]:
        """Milliseconds of each of a few steps of one rank, while all others wait."""
        self._ranks[rank][1].send(optimizer)
        return self._receive(rank)

    def _receive(self, rank: int) -> list[float]:
        process, connection = self._ranks[rank]
        try:
            answer = connection.recv() if connection.poll(_SECONDS) else f"no answer within {_SECONDS:.0f} s"
        except EOFError:
            answer = f"the process ended with exit code {process.exitcode}"
        if isinstance(answer, str):
            raise UserError(f"rank {rank} of {len(self._ranks)} failed: {answer}")
        times: list[float] = answer
        return times

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.terminate()
            process.join()
        self._folder.cleanup()


def _serve(connection: Connection, rank: int, size: int, store: str, shapes: Shapes) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        clock, steps = CpuClock(), {name: _build(name, shapes, size) for name in OPTIMIZERS}
        for step in steps.values():
            clock.wall_ms(step, _BLOCK)
        connection.send([])
        while True:
            connection.send(clock.wall_ms(steps[connection.recv()], _BLOCK)[1:])
    except (EOFError, BrokenPipeError):  # the parent has finished
        pass
    except Exception as error:  # of a rank: the parent raises it, with its text
        connection.send(reason(error))


def _build(name: str, shapes: Shapes, size: int) -> Step:
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
