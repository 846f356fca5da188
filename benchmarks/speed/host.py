"""The part `host`: what a step costs the processor apart from the device. The cuda backend's launches do nothing.

It gathers and packs as always, on one thread and without a GPU. The first contender is the native path of a step alone:
reading the gradients' addresses, packing the arguments, launching. AdamW on CPU tensors does its arithmetic too; it is
there for scale.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import LARGE_STEPS, Build, Parameters, Step
from benchmarks.speed.measure import Row, Session, measurements, take_turns
from benchmarks.speed.peers import ONE_LAUNCH, adamw, ivon, keep_gradients
from benchmarks.speed.record import Measurement
from benchmarks.speed.workloads import WORKLOADS, Workload
from ivon_kernels import IVON, backends
from ivon_kernels.backends import Draw
from ivon_kernels.backends.cuda import CudaBackend

PART, SAME, FRESH = "host", "host", "host, fresh gradients"
TINY = tuple(workload for workload in WORKLOADS if workload.name.endswith("-tiny"))
_SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "launch.cu"
_FLAGS = ("-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-DIVON_EMULATE", "-shared", "-fPIC")
_WARM_UP = 5
_SECONDS = 0.3  # for one contender's turn, where so many repeats would take longer


@functools.cache
def _emulator(optimization: str) -> tuple[tempfile.TemporaryDirectory[str], CudaBackend]:
    """The cuda backend on a library that takes CPU tensors: the same C++ without nvcc; and the folder it lives in."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found, which makes the cuda backend's library for CPU tensors")
    folder = tempfile.TemporaryDirectory()
    library = f"{folder.name}/libivon_cuda_emulated.so"
    command = (compiler, "-x", "c++", optimization, *_FLAGS, str(_SOURCE), "-o", library)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{compiler} could not compile {_SOURCE.name}: {result.stderr[:300]}")
    backend = CudaBackend(library)
    if why := backend.unavailable():
        raise RuntimeError(why)
    return folder, backend


@contextlib.contextmanager
def stub_launcher(optimization: str) -> Iterator[None]:
    """The cuda backend takes CPU tensors, gathers and packs as on a GPU, and launches nothing."""
    _, backend = _emulator(optimization)
    backend.library.ivon_cuda_set_stub(1)
    try:
        with backends.override(backend.name, backend):
            yield
    finally:
        backend.library.ivon_cuda_set_stub(0)


def _path(optimizer: IVON, params: Parameters) -> Step:
    """What every step does in C: reads the gradients' addresses, packs the arguments, launches."""
    optimizer.train()
    (launch,) = optimizer._parameters.active.launches
    assert launch.addresses is not None
    addresses, draw = launch.addresses, Draw(0, 0)

    def step() -> None:
        addresses.read_grads()
        launch.backend.step(launch, draw, adopt=False, draw_next=False)

    return Step(step)


PATH = "ivon_kernels cuda, stub launcher: read addresses, pack, launch"
WHOLE = "ivon_kernels cuda, stub launcher, sample + step"
CONTENDERS: dict[str, Build] = {
    PATH: ivon("cuda", steps=_path),
    WHOLE: ivon("cuda"),
    "ivon_kernels cuda, stub launcher, step with next sample": ivon("cuda", ONE_LAUNCH),
    "AdamW (foreach) on CPU tensors, its arithmetic included": adamw("torch.optim:AdamW", foreach=True),
    "AdamW (fused) on CPU tensors, its arithmetic included": adamw("torch.optim:AdamW", fused=True),
}


def _times(step: Step, params: Parameters, repeats: int, fresh: bool) -> list[float]:
    """Microseconds of a step, `repeats` times if the time allows.

    With `fresh` there are new gradient tensors every time, as after ``zero_grad()`` and a backward pass; else the same.
    """
    put_back = keep_gradients(params)

    def renew() -> None:
        put_back()
        for param in params:
            assert param.grad is not None
            param.grad = param.grad.clone()

    clock, timed = CpuClock(), replace(step, before=renew if fresh else None)
    clock.wall_ms(timed, _WARM_UP)
    times: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while len(times) < repeats and (not times or time.perf_counter() < stop):
        times += clock.wall_ms(timed, 1)
    put_back()
    return [1e3 * milliseconds for milliseconds in times]


def _measure(workload: Workload, rounds: int, repeats: int, optimization: str) -> list[Measurement]:
    rows = [Row(name, ours="stub launcher" in name, quantities=(SAME,)) for name in CONTENDERS]

    def turn(number: int, done: int) -> dict[str, list[float]]:
        row = rows[number]
        with stub_launcher(optimization) if row.ours else contextlib.nullcontext():
            params = workload.parameters()
            step = CONTENDERS[row.name](params, LARGE_STEPS)
            return {SAME: _times(step, params, repeats, False), FRESH: _times(step, params, repeats, True)}

    take_turns(rows, turn, rounds)
    return measurements((PART, workload.name, "float32"), rows, "us")


def measure(*, rounds: int, repeats: int, optimization: str) -> list[Measurement]:
    """Microseconds per step of 128 and 450 tensors of 16x64, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [m for workload in TINY for m in _measure(workload, rounds, repeats, optimization)]
    finally:
        torch.set_num_threads(threads)


def run(session: Session) -> None:
    """Measures the host's share, without a device; the library of a dry run is compiled in a fifth of the time."""
    dry_run, rounds = session.record.dry_run, min(session.options.rounds, 5)
    with session.console.status("Host cost"):
        found = (
            measure(rounds=1, repeats=2, optimization="-O0")
            if dry_run
            else measure(rounds=rounds, repeats=1000, optimization="-O2")
        )
    session.record.replace_part(PART, found)
