"""The backends and the choice among them. A backend asked for by name never falls back to another."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator

import torch

from ivon_kernels.backends.base import Backend, Draw, Guard, Launch
from ivon_kernels.backends.cpu import CpuBackend
from ivon_kernels.backends.cuda import CudaBackend
from ivon_kernels.backends.device import DeviceBackend
from ivon_kernels.backends.reference import ReferenceBackend
from ivon_kernels.backends.state import ParamState
from ivon_kernels.backends.triton import TritonBackend
from ivon_kernels.hyperparameters import GroupScalars

__all__ = [
    "Backend",
    "DeviceBackend",
    "Draw",
    "Guard",
    "Launch",
    "available_backends",
    "choose",
    "launches_of",
    "override",
]

# Fastest first: on a GPU cuda before triton at every size, because its launch costs the host least and the kernels do
# the same work (docs/gpu-kernels.md has what is known). `reference` takes whatever the others do not.
_BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
}


def available_backends() -> dict[str, str | None]:
    """Every backend with None if it can be used in this process, or the reason why not."""
    return {name: backend.unavailable() for name, backend in _BACKENDS.items()}


@contextlib.contextmanager
def override(name: str, backend: Backend | None) -> Iterator[None]:
    """Within the block another backend goes by a name: an emulator, a recorder, a backend that is being written.

    It holds for the whole process. An optimizer looks for its backend again whenever its launches are built anew, so
    that all of its life belongs inside the block.

    Args:
        name: The name of the backend that is replaced. A new name comes last in the order of choice.
        backend: What goes by that name, or None for a process that has no such backend.
    """
    before = dict(_BACKENDS)
    if backend is None:
        _BACKENDS.pop(name, None)
    else:
        _BACKENDS[name] = backend
    try:
        yield
    finally:
        _BACKENDS.clear()
        _BACKENDS.update(before)


@functools.cache
def _warn_of_slow_steps(reason: str) -> None:
    # Measured with one thread of a Xeon: 130 to 180 times, a LoRA model's 240 tensors as well as a small network's 6.
    warnings.warn(
        f"IVON runs in plain PyTorch here, where a CPU step takes about 150 times as long as with the compiled CPU "
        f"library: {reason}",
        stacklevel=2,
    )


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for parameters of one device and dtype.

    Where None takes `reference` for want of the compiled CPU library, a warning says so, once.

    Args:
        name: A backend's name, or None for the fastest that takes them.
        device: The parameters' device.
        dtype: The parameters' dtype.

    Raises:
        ValueError: If there is no backend `name`, or it does not take such parameters.
        RuntimeError: If backend `name` is not available here.
    """
    if name is None:
        chosen = next(
            backend
            for backend in _BACKENDS.values()
            if backend.unavailable() is None
            and backend.unsupported(device, dtype) is None
            and not (backend.on_device and device.type == "cpu")  # an interpreter or emulator: asked for by name
        )
        compiled = _BACKENDS.get("cpu")
        if chosen.name == "reference" and compiled is not None and compiled.unsupported(device, dtype) is None:
            _warn_of_slow_steps(str(compiled.unavailable()))
        return chosen
    if name not in _BACKENDS:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(_BACKENDS)}, or None for the fastest")
    backend = _BACKENDS[name]
    if reason := backend.unavailable():
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if reason := backend.unsupported(device, dtype):
        raise ValueError(f"backend {name!r} cannot be used: {reason}; backend=None picks one that can")
    return backend


def launches_of(states: Iterable[ParamState], scalars: GroupScalars, name: str | None) -> list[Launch]:
    """One launch for each backend and device that the parameters need, in the parameters' order.

    Args:
        states: The parameters' states.
        scalars: Of their groups.
        name: As for :func:`choose`, and with the same errors.
    """
    chosen: dict[tuple[torch.device, torch.dtype], Backend] = {}
    parts: dict[tuple[Backend, torch.device], list[ParamState]] = {}
    for state in states:
        device, dtype = kind = state.mean.device, state.param.dtype
        if kind not in chosen:
            chosen[kind] = choose(name, device, dtype)
        parts.setdefault((chosen[kind], device), []).append(state)
    return [Launch(backend, part, scalars) for (backend, _), part in parts.items()]
