"""How much memory IVON's state takes on the CPU, and how far a step rises above it."""

from __future__ import annotations

import contextlib

import torch

from benchmarks.memory import forget_peak, resident
from benchmarks.speed.ours import PLAIN, our_name, plain
from benchmarks.speed.record import Measurement
from benchmarks.speed.workloads import Workload
from ivon_kernels import IVON

STATE, GROWTH = "state", "growth of the resident set in a step"


def measure(part: str, workload: Workload) -> list[Measurement]:
    """Bytes of state per element, and, where Linux tells it, how far the resident set rises in a step, in bytes."""
    step = plain("cpu")(workload.parameters())
    for _ in range(3):
        step()
    what = (part, workload.name, "float32", our_name("cpu", PLAIN), True)
    state = _state_bytes(step.optimizer) / workload.elements
    found = [Measurement(*what, STATE, "bytes/element", state, state, state, [state])]
    with contextlib.suppress(OSError):
        forget_peak()
        before = resident("VmRSS")
        step()
        growth = float(max(resident("VmHWM") - before, 0))
        found.append(Measurement(*what, GROWTH, "bytes", growth, growth, growth, [growth]))
    return found


def _state_bytes(optimizer: IVON) -> int:
    storages: dict[int, int] = {}
    for slot in optimizer._slots.values():
        for tensor in vars(slot.arena).values():
            if isinstance(tensor, torch.Tensor):
                storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
