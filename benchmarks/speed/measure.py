"""Timing side by side, memory, and scaling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.contenders import IVON_ARGS, Contender, Step
from benchmarks.speed.workloads import Workload, flat
from ivon_kernels import IVON

BLOCK = (
    5  # consecutive steps of a contender in a round; the first one, with the caches of the one before, is not counted
)


@dataclass(frozen=True)
class Timing:
    """Quantiles of one contender's step in milliseconds, and its ratio to the baseline round by round."""

    name: str
    p20: float
    p50: float
    p80: float
    ratio: float | None  # median over the rounds of (own median / baseline's median)
    error: str | None = None  # why it did not run


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], statistics.median(values), deciles[7]


def _prepare(contender: Contender, workload: Workload) -> tuple[Step | None, str]:
    """The contender's step, tried once, or why it fails: a row of the table, not the end of the suite."""
    try:
        step = contender.prepare(workload)
        step()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return step, ""


def compare(workload: Workload, contenders: Sequence[Contender], rounds: int, tick: Callable[[], None]) -> list[Timing]:
    """Times the contenders in turn, round after round, so that a drift of the machine meets all of them.

    Args:
        workload: The tensors; every contender has its own copy.
        contenders: The first one is the baseline of the ratios.
        rounds: How often each takes its turn of :data:`BLOCK` steps.
        tick: Called after every turn.
    """
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for contender in contenders:
        prepared, error = _prepare(contender, workload)
        if prepared is None:
            errors[contender.name] = error
        else:
            steps[contender.name] = prepared
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    turns = {contender.name: contender.turns for contender in contenders}
    for number in range(rounds):
        for name, step in steps.items():
            block = []
            for _ in range(BLOCK if number < turns[name] else 0):
                begin = time.perf_counter()
                step()
                block.append((time.perf_counter() - begin) * 1e3)
            if block:
                times[name].append(block[1:])
            tick()
    baseline = times.get(contenders[0].name)
    result = []
    for contender in contenders:
        if contender.name in errors:
            result.append(Timing(contender.name, 0.0, 0.0, 0.0, None, errors[contender.name]))
            continue
        own = times[contender.name]
        ratio = None
        if baseline is not None:
            medians = zip(own, baseline, strict=False)
            ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in medians)
        result.append(Timing(contender.name, *_quantiles([t for block in own for t in block]), ratio))
    return result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def memory(elements: int) -> dict[str, Any]:
    """State bytes per element, and how far the resident set rises above its level during sample + step.

    Returns:
        `state_bytes_per_element`, and `peak_growth_bytes` (None where /proc cannot reset the peak).
    """
    workload = flat(elements)
    params = workload.parameters()
    optimizer = IVON(params, **IVON_ARGS, seed=0, backend="cpu")
    for _ in range(3):
        optimizer.train()
        optimizer.step()
    storages: dict[int, int] = {}
    for slot in optimizer._slots.values():
        for tensor in vars(slot.arena).values():
            if isinstance(tensor, torch.Tensor):
                storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    growth: int | None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
        optimizer.train()
        optimizer.step()
        growth = max(_status("VmHWM") - before, 0)
    except OSError:
        growth = None
    return {
        "elements": elements,
        "state_bytes_per_element": sum(storages.values()) / elements,
        "peak_growth_bytes": growth,
    }


def scaling(sizes: Sequence[int], repeats: int, tick: Callable[[], None]) -> list[dict[str, float]]:
    """Median sample + step of one flat tensor against its size; `growth` is the time over that of a tenth of it."""
    result: list[dict[str, float]] = []
    for elements in sizes:
        params = flat(elements).parameters()
        optimizer = IVON(params, **IVON_ARGS, seed=0, backend="cpu")
        times = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            optimizer.train()
            optimizer.step()
            times.append((time.perf_counter() - begin) * 1e3)
        row = {"elements": float(elements), "ms": statistics.median(times[2:])}
        if result:
            row["growth"] = row["ms"] / result[-1]["ms"] * (10 * result[-1]["elements"] / elements)
        result.append(row)
        del params, optimizer
        tick()
    return result
