"""What one optimizer step costs the processor, measured without a GPU: the backend's launches do nothing."""

from __future__ import annotations

import functools
import shutil
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

from benchmarks.gpu.workloads import tensors
from benchmarks.speed.contenders import IVON_ARGS
from benchmarks.speed.measure import _quantiles
from benchmarks.speed.workloads import WORKLOADS, Workload
from ivon_kernels import IVON, backends
from ivon_kernels.backends import Draw
from ivon_kernels.backends.cuda import CudaBackend

_SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "launch.cu"
TINY = tuple(workload for workload in WORKLOADS if workload.name.endswith("-tiny"))
_WARM_UP = 5
_SECONDS = 1.0  # for one row's steps, where so many repeats would take longer
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
    """`build` gives the calls before the forward pass and after the backward pass.

    `share` says which target the row is for: ``"step"`` for all that the optimizer does on the host, ``"path"`` for its
    native part alone (addresses of the gradients, arguments, launch), empty for none.
    """

    name: str
    build: Callable[[list[torch.nn.Parameter], str], Calls]
    context: Callable[[], AbstractContextManager[str]]
    share: str = ""


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
        return (lambda: None), torch.optim.AdamW(params, lr=1e-5, **options).step

    return build


def _no_context() -> AbstractContextManager[str]:
    return nullcontext("")


CONTENDERS = (
    HostContender("ivon_kernels cuda, stub launcher: read addresses, pack, launch", _path, stub_launcher, "path"),
    HostContender("ivon_kernels cuda, stub launcher, sample + step", _ours(False), stub_launcher, "step"),
    HostContender("ivon_kernels cuda, stub launcher, step with next sample", _ours(True), stub_launcher),
    HostContender("AdamW (foreach) on CPU tensors, its arithmetic included", _adamw(foreach=True), _no_context),
    HostContender("AdamW (fused) on CPU tensors, its arithmetic included", _adamw(fused=True), _no_context),
)


def _times(calls: Calls, params: list[torch.nn.Parameter], repeats: int, fresh: bool) -> dict[str, dict[str, float]]:
    """Microseconds of the first call, the second, and both.

    Args:
        calls: What is timed.
        params: With gradients.
        repeats: How many steps, if the time allows.
        fresh: New gradient tensors every time, as after ``zero_grad()`` and a backward pass; else the same ones.
    """
    grads = [param.grad for param in params]
    times: dict[str, list[float]] = {"train": [], "step": [], "both": []}
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
        middle = time.perf_counter()
        calls[1]()
        end = time.perf_counter()
        if number >= _WARM_UP:
            for name, seconds in zip(times, (middle - begin, end - middle, end - begin), strict=True):
                times[name].append(seconds * 1e6)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return {name: dict(zip(("p20", "p50", "p80"), _quantiles(values), strict=True)) for name, values in times.items()}


def _row(contender: HostContender, workload: Workload, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": contender.name, "share": contender.share, "tensors": len(workload.shapes)}
    try:
        with contender.context() as backend:
            params = tensors(workload, torch.float32, torch.device("cpu"))
            calls = contender.build(params, backend)
            return {
                **row,
                "error": None,
                "same": _times(calls, params, repeats, fresh=False),
                "fresh": _times(calls, params, repeats, fresh=True),
            }
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"}


def measure(*, repeats: int) -> dict[str, Any]:
    """The host's microseconds per step of 128 and 450 tensors of 16x64, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_row(contender, workload, repeats) for workload in TINY for contender in CONTENDERS]
    finally:
        torch.set_num_threads(threads)
    return {"repeats": repeats, "unit": "microseconds", "rows": rows}
