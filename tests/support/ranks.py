"""A pool of processes that tests run as the ranks of a gloo process group: see the fixture `ranks`."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.support import shake

T = TypeVar("T")

MAX_RANKS = 4
# Imported once, in the process that all workers are forked from. None of them starts threads.
PRELOADED = ["pytest", "torch.distributed", "torch._dynamo", "ivon_kernels"]
COLLECTIVE_SECONDS = 30.0  # for one collective: a rank whose peers are stuck gives up after it
GRACE_SECONDS = 10.0  # for the other ranks, after one has failed


class RankError(RuntimeError):
    """Ranks failed; the message has their tracebacks, the first failure first."""


class Ranks:
    """Processes that are started once, when they are first needed, and end with this process."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls = 0

    def run(self, world_size: int, function: Callable[..., T], *args: Any, seconds: float = 120.0) -> list[T]:
        """Call ``function(*args)`` on every rank of a new gloo process group.

        Each call starts with the same global seed on every rank and one thread. As in pytest, warnings are errors.

        Args:
            world_size: How many ranks, up to 4.
            function: Of a module: it is sent by name. An exception that the test expects it catches and returns.
            *args: Pickled, as is the result; tensors are copied.
            seconds: How long all ranks together may take before they are killed.

        Returns:
            The results, by rank.

        Raises:
            RankError: If a rank raised, died or did not end in time.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size must be from 1 to {MAX_RANKS}, got {world_size}")
        self._calls += 1
        store = str(Path(self._folder.name) / str(self._calls))
        tasks = [pickle.dumps((rank, world_size, store, function, args)) for rank in range(world_size)]
        self._start(world_size)
        for (_, connection), task in zip(self._workers, tasks, strict=False):
            connection.send_bytes(task)
        answers: dict[int, Any] = {}
        failures: list[str] = []
        try:
            self._collect(world_size, time.monotonic() + seconds, answers, failures)
        finally:
            if len(answers) < world_size:  # some still work on this call, or are dead
                self._stop()
        if failures:
            raise RankError("\n\n".join(failures))
        return [answers[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._folder.cleanup()

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies closes the pipe
            self._workers.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()

    def _collect(self, world_size: int, deadline: float, answers: dict[int, Any], failures: list[str]) -> None:
        """Wait for the ranks' answers; after a failure the others get a short grace."""
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank in waiting.values())
                failures.append(f"rank {late} did not answer in time and was killed")
                return
            for connection in [own for own in waiting if own in ready]:
                rank = waiting.pop(connection)
                try:
                    done, result = pickle.loads(connection.recv_bytes())
                except EOFError:
                    done, result = False, "the process died\n"
                else:
                    answers[rank] = result
                if not done:
                    failures.append(f"rank {rank} of {world_size}:\n{result}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _serve(connection: Connection) -> None:
    """A worker's life: one task after the other until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_die_with_parent, daemon=True).start()
    shake.start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send_bytes(_answer(connection.recv_bytes()))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(task: bytes) -> bytes:
    try:
        arguments = pickle.loads(task)
        gc.freeze()  # so that the collection after the call passes over what the function's module has imported
        return pickle.dumps((True, _call(*arguments)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _call(rank: int, world_size: int, store: str, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    try:
        dist.barrier()  # nobody goes on, perhaps to leave the group, while a peer is still connecting
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*args)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while a peer still hears from it
        return result
    finally:
        gc.collect()  # what still refers to the group, e.g. DDP models in cycles
        if dist.is_initialized():
            dist.destroy_process_group()  # closes the connections, so that peers that wait for this rank fail at once
