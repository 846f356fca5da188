"""What one optimizer step costs the processor apart from the device: the cuda backend's launches do nothing.

It gathers and packs as always, on one thread and without a GPU. The first contender is the native path of a step alone:
reading the gradients' addresses, packing the arguments, launching. AdamW on CPU tensors does its arithmetic too; it is
there for scale.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.speed.contenders import ADAMW_ARGS, IVON_ARGS
from benchmarks.speed.record import Measurement
from benchmarks.speed.timing import quantiles
from benchmarks.speed.verify import reason
from benchmarks.speed.workloads import WORKLOADS, Workload
from ivon_kernels import IVON, backends
from ivon_kernels.backends import Draw
from ivon_kernels.backends.cuda import CudaBackend

_SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "launch.cu"
TINY = tuple(workload for workload in WORKLOADS if workload.name.endswith("-tiny"))
PART, SAME, FRESH = "host", "host", "host, fresh gradients"
_WARM_UP = 5
_SECONDS = 0.3  # for one contender's turn, where so many repeats would take longer
Calls = tuple[Callable[[], Any], Callable[[], Any]]


@functools.cache
def _emulator() -> tuple[tempfile.TemporaryDirectory[str], CudaBackend]:
    """The cuda backend on a library that takes CPU tensors: the same C++ without nvcc; and the folder it lives in."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found, which makes the cuda backend's library for CPU tensors")
    folder = tempfile.TemporaryDirectory()
    library = f"{folder.name}/libivon_cuda_emulated.so"
    flags = ("-std=c++17", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-DIVON_EMULATE", "-shared", "-fPIC")
    command = (compiler, "-x", "c++", *flags, str(_SOURCE), "-o", library)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{compiler} could not compile {_SOURCE.name}: {result.stderr[:300]}")
    backend = CudaBackend(library)
    if reason := backend.unavailable():
        raise RuntimeError(reason)
    return folder, backend


@contextmanager
def stub_launcher() -> Iterator[str]:
    """The cuda backend takes CPU tensors, gathers and packs as on a GPU, and launches nothing.

    Yields:
        The backend's name.

    Raises:
        RuntimeError: If no compiler makes such a library here.
    """
    _, backend = _emulator()
    backend.library.ivon_cuda_set_stub(1)
    try:
        with mock.patch.dict(backends._BACKENDS, {backend.name: backend}):
            yield backend.name
    finally:
        backend.library.ivon_cuda_set_stub(0)


@dataclass(frozen=True)
class HostContender:
    """`build` gives the calls before the forward pass and after the backward pass."""

    name: str
    build: Callable[[list[torch.nn.Parameter], str], Calls]
    context: Callable[[], AbstractContextManager[str]]


def _path(params: list[torch.nn.Parameter], backend: str) -> Calls:
    """What every step does in C: reads the gradients' addresses, packs the arguments, launches."""
    optimizer = IVON(params, **IVON_ARGS, seed=0, backend=backend)
    optimizer.train()
    ((launcher, slots),) = optimizer._active
    assert slots.pointers is not None
    pointers, draw = slots.pointers, Draw(0, 0)

    def step() -> None:
        pointers.read_grads()
        launcher.step(slots, draw, adopt=False, draw_next=False)

    return (lambda: None), step


def _ours(one_launch: bool) -> Callable[[list[torch.nn.Parameter], str], Calls]:
    def build(params: list[torch.nn.Parameter], backend: str) -> Calls:
        optimizer = IVON(params, **IVON_ARGS, seed=0, backend=backend, sample_in_step=one_launch)
        return optimizer.train, optimizer.step

    return build


def _adamw(**options: Any) -> Callable[[list[torch.nn.Parameter], str], Calls]:
    def build(params: list[torch.nn.Parameter], _: str) -> Calls:
        return (lambda: None), torch.optim.AdamW(params, **ADAMW_ARGS, **options).step

    return build


def _no_context() -> AbstractContextManager[str]:
    return nullcontext("")


PATH = "ivon_kernels cuda, stub launcher: read addresses, pack, launch"
WHOLE = "ivon_kernels cuda, stub launcher, sample + step"
CONTENDERS = (
    HostContender(PATH, _path, stub_launcher),
    HostContender(WHOLE, _ours(False), stub_launcher),
    HostContender("ivon_kernels cuda, stub launcher, step with next sample", _ours(True), stub_launcher),
    HostContender("AdamW (foreach) on CPU tensors, its arithmetic included", _adamw(foreach=True), _no_context),
    HostContender("AdamW (fused) on CPU tensors, its arithmetic included", _adamw(fused=True), _no_context),
)


def _times(calls: Calls, params: list[torch.nn.Parameter], repeats: int, fresh: bool) -> list[float]:
    """Microseconds of both calls together.

    Args:
        calls: What is timed.
        params: With gradients.
        repeats: How many steps, if the time allows.
        fresh: New gradient tensors every time, as after ``zero_grad()`` and a backward pass; else the same ones.
    """
    grads = [param.grad for param in params]
    times: list[float] = []
    stop = time.perf_counter() + _SECONDS
    for number in range(repeats + _WARM_UP):
        if number > _WARM_UP + 1 and time.perf_counter() > stop:
            break
        if fresh:
            for param, grad in zip(params, grads, strict=True):
                assert grad is not None
                param.grad = grad.clone()
        begin = time.perf_counter()
        calls[0]()
        calls[1]()
        if number >= _WARM_UP:
            times.append((time.perf_counter() - begin) * 1e6)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return times


def _turn(contender: HostContender, workload: Workload, repeats: int) -> dict[str, list[float]]:
    with contender.context() as backend:
        params = workload.parameters()
        calls = contender.build(params, backend)
        return {SAME: _times(calls, params, repeats, False), FRESH: _times(calls, params, repeats, True)}


def _measurements(contender: HostContender, workload: Workload, rounds: int, repeats: int) -> list[Measurement]:
    what = (PART, workload.name, "float32", contender.name, contender.context is stub_launcher)
    try:
        turns = [_turn(contender, workload, repeats) for _ in range(rounds)]
    except Exception as error:  # a row of the table, not the end of the suite
        return [Measurement(*what, SAME, "us", error=reason(error))]
    return [
        Measurement(
            *what,
            quantity,
            "us",
            *quantiles([value for turn in turns for value in turn[quantity]]),
            rounds=[statistics.median(turn[quantity]) for turn in turns],
        )
        for quantity in (SAME, FRESH)
    ]


def measure(*, rounds: int, repeats: int) -> list[Measurement]:
    """Microseconds per step of 128 and 450 tensors of 16x64, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            measurement
            for workload in TINY
            for contender in CONTENDERS
            for measurement in _measurements(contender, workload, rounds, repeats)
        ]
    finally:
        torch.set_num_threads(threads)
