"""Timing side by side: every contender in turn, round after round, so that a drift of the device meets all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.clock import CpuClock
from benchmarks.gpu.contenders import GpuContender
from benchmarks.gpu.workloads import tensors
from benchmarks.speed.measure import Timing, _quantiles
from benchmarks.speed.workloads import Workload

KINDS = ("kernel", "wall", "host")
_WALL_BLOCKS = 3


@dataclass(frozen=True)
class Row:
    """One contender on one workload. Times in milliseconds of one optimizer step, ratios to the first contender's."""

    name: str
    backend: str | None
    mode: str | None
    bytes_per_element: int
    kernel: Timing | None = None  # on the device
    wall: Timing | None = None  # per step of many, host included
    host: Timing | None = None  # until the call returns
    bandwidth: float | None = None  # bytes that must move / kernel time, in GB/s
    copy_share: float | None = None  # bandwidth / that of the copy
    peak_bytes_per_element: float | None = None
    error: str | None = None  # why it was not measured


@dataclass(frozen=True)
class Comparison:
    """All contenders on one workload."""

    workload: str
    title: str
    dtype: str
    tensors: int
    elements: int
    copy_bandwidth: float  # GB/s, read and written bytes, device to device, median over the rounds
    rounds: int
    rows: list[Row]


@dataclass
class _Record:
    """A contender's times, one list for each round."""

    times: dict[str, list[list[float]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    peak: int = 0
    error: str | None = None


def copy_bandwidth(clock: CpuClock, repeats: int = 5) -> float:
    """GB/s of a large device-to-device copy, counting bytes read and bytes written."""
    source = torch.empty(clock.copy_bytes // 4, device=clock.device).uniform_(-1, 1)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    times = [clock.kernel_ms(copy, 0.1) for _ in range(repeats)]
    return 2 * clock.copy_bytes / statistics.median(times) / 1e6


def _turn(
    contender: GpuContender, workload: Workload, dtype: torch.dtype, clock: CpuClock, budget_ms: float, record: _Record
) -> None:
    """One turn of one contender, from fresh tensors to memory given back."""
    before = clock.allocated()
    step = contender.build(tensors(workload, dtype, clock.device))
    for _ in range(clock.warm_up):
        step()
    clock.synchronize()
    clock.reset_peak()
    begin = time.perf_counter()
    step()
    clock.synchronize()
    once = (time.perf_counter() - begin) * 1e3
    count = max(clock.least, min(100, int(budget_ms / len(KINDS) / once)))
    host = [clock.host_ms(step) for _ in range(count)]
    kernel = [clock.kernel_ms(step, statistics.median(host)) for _ in range(count)]
    wall = []
    for _ in range(_WALL_BLOCKS):
        clock.synchronize()
        begin = time.perf_counter()
        for _ in range(-(-count // _WALL_BLOCKS)):
            step()
        clock.synchronize()
        wall.append((time.perf_counter() - begin) * 1e3 / -(-count // _WALL_BLOCKS))
    record.peak = max(record.peak, clock.peak() - before)
    for kind, times in zip(KINDS, (kernel, wall, host), strict=True):
        record.times[kind].append(times)


def _try_turn(
    contender: GpuContender, workload: Workload, dtype: torch.dtype, clock: CpuClock, budget_ms: float, record: _Record
) -> None:
    try:
        _turn(contender, workload, dtype, clock, budget_ms, record)
    except Exception as error:  # a row of the table, not the end of the suite
        record.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compare(
    workload: Workload,
    dtype_name: str,
    contenders: Sequence[GpuContender],
    clock: CpuClock,
    *,
    rounds: int,
    turn_ms: float,
    refused: dict[str, str],
    enough_time: Callable[[], bool],
    tick: Callable[[], None],
) -> Comparison:
    """Measures one workload.

    Args:
        workload: The tensors; every contender gets fresh ones every turn.
        dtype_name: Of parameters and gradients; a key of :data:`~benchmarks.gpu.workloads.DTYPES`.
        contenders: The first one is the baseline of the ratios.
        clock: The device.
        rounds: Turns of each contender, if the time allows; at least one.
        turn_ms: About how long a turn measures.
        refused: Contenders that must not be timed, with the reason.
        enough_time: Asked before every round but the first.
        tick: Called after every turn.
    """
    dtype = getattr(torch, dtype_name)
    records = {c.name: _Record(error=c.missing() or refused.get(c.name)) for c in contenders}
    copies: list[float] = []
    while len(copies) < rounds and (not copies or enough_time()):
        copies.append(copy_bandwidth(clock))
        for contender in contenders:
            record = records[contender.name]
            if record.error is None:
                _try_turn(contender, workload, dtype, clock, turn_ms, record)
            gc.collect()
            clock.release()
            tick()
    copied = statistics.median(copies)
    baseline = records[contenders[0].name]
    rows = [_row(c, records[c.name], baseline, dtype, workload.elements, copied) for c in contenders]
    return Comparison(
        workload.name, workload.title, dtype_name, len(workload.shapes), workload.elements, copied, len(copies), rows
    )


def timing(name: str, own: list[list[float]], baseline: list[list[float]] | None) -> Timing:
    """Quantiles over all rounds, and the median over the rounds of own median / baseline's median."""
    ratio = None
    if baseline:
        pairs = zip(own, baseline, strict=False)
        ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
    return Timing(name, *_quantiles([value for part in own for value in part]), ratio)


def _row(
    contender: GpuContender, record: _Record, baseline: _Record, dtype: torch.dtype, elements: int, copied: float
) -> Row:
    moved = contender.bytes_per_element(dtype)
    if record.error is not None:
        return Row(contender.name, contender.backend, contender.mode, moved, error=record.error)
    base = baseline.times if baseline.error is None else {}
    kernel, wall, host = (timing(contender.name, record.times[kind], base.get(kind)) for kind in KINDS)
    bandwidth = moved * elements / kernel.p50 / 1e6
    return Row(
        contender.name,
        contender.backend,
        contender.mode,
        moved,
        kernel,
        wall,
        host,
        bandwidth,
        bandwidth / copied,
        record.peak / elements,
    )
