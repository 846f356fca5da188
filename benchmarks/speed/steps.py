"""The part `steps`: every contender on every workload, and what IVON's state takes on the CPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.memory import PeakMemory, forget_peak, resident
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import LARGE_STEPS, STEP, Contender
from benchmarks.speed.measure import Budget, Found, Row, measurements, take_turns
from benchmarks.speed.peers import PLAIN, ivon, our_name
from benchmarks.speed.record import Measurement
from benchmarks.speed.verify import Verifier, wrong
from benchmarks.speed.workloads import DTYPES, Workload

PART = "steps"
STATE, GROWTH = "state", "growth of the resident set in a step"
_MOST_CALLS = 100  # of a contender in a turn


@dataclass(frozen=True)
class Comparer:
    """Verifies and measures the contenders of a device on one workload after the other."""

    clock: CpuClock
    contenders: Sequence[Contender]  # one of them is the baseline of the ratios
    rounds: int  # turns of each contender, if the time allows; at least one
    turn_ms: float  # about how long a turn measures
    skip: Callable[[Contender, Workload], str | None] = lambda contender, workload: None  # why one shall not run
    tick: Callable[[], None] = lambda: None  # called after every turn, and for those that did not come about

    def __call__(self, workload: Workload, dtype_name: str, budget: Budget) -> Found:
        """One row for each quantity of each contender, or one that says why there is none."""
        try:
            return self._compare(workload, dtype_name, budget)
        finally:
            gc.unfreeze()  # what _clean froze

    def _compare(self, workload: Workload, dtype_name: str, budget: Budget) -> Found:
        clock, dtype = self.clock, DTYPES[dtype_name]
        verifier = Verifier(workload, dtype, clock.device, clock.reference_elements)
        rows = verifier.rows(self.contenders, lambda contender: self._unable(contender, workload), self._clean)
        del verifier
        self._clean()
        copied = clock.copy_gbps()

        def turn(number: int, done: int) -> dict[str, list[float]]:
            try:
                return self._turn(self.contenders[number], rows[number], workload, dtype)
            finally:
                self._clean()

        moved = {id(row): c.bytes_per_element(dtype) for c, row in zip(self.contenders, rows, strict=True)}

        def further(row: Row, quantity: str, median: float | None) -> dict[str, Any]:
            """What moves: of a whole step in one of its kinds."""
            if median is None:
                return {"bytes_per_element": moved[id(row)]}
            moving = moved[id(row)] if quantity == (clock.moving if STEP in row.quantities else quantity) else None
            gbps = None if moving is None else moving * workload.elements / median / 1e6
            share = None if gbps is None else gbps / copied
            peak = statistics.median(row.peaks) / workload.elements if row.peaks and quantity == STEP else None
            figures = {"bytes_per_element": moving, "gbps": gbps, "copy_share": share}
            return {**figures, "peak_bytes_per_element": peak}

        take_turns(rows, turn, self.rounds, enough_time=budget.left, after=self.tick)
        found = measurements((PART, workload.name, dtype_name), rows, further=further)
        return Found(found, wrong(self.contenders, rows), copied)

    def _unable(self, contender: Contender, workload: Workload) -> str | None:
        """Why a contender does not run on a workload."""
        if known := contender.missing() or self.skip(contender, workload):
            return known
        free = self.clock.free_bytes()
        if free is None:
            return None
        if contender.most_elements is not None and workload.elements > contender.most_elements:
            return f"takes too long on a CPU for more than {contender.most_elements / 1e6:g}M elements"
        needed = workload.elements * contender.bytes_needed
        if needed > free:
            return f"may need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        return None

    def _clean(self) -> None:
        gc.collect()
        gc.freeze()  # what is still there stays, peers' modules for the most: the next collection need not look at it
        self.clock.release()

    def _turn(self, contender: Contender, row: Row, workload: Workload, dtype: torch.dtype) -> dict[str, list[float]]:
        """One turn of one contender, from fresh tensors on: a tensor that is kept would hide noise from the rounds."""
        clock = self.clock
        with PeakMemory(clock.device) as peak:
            step = contender.build(workload.parameters(dtype, clock.device), LARGE_STEPS)
            for _ in range(clock.warm_up):
                step()
            clock.synchronize()
            peak.restart()
            once = clock.wall_ms(step, 1)
        if peak.bytes is not None and peak.bytes > clock.least_peak:
            row.peaks.append(peak.bytes)
        if len(clock.kinds) == 1 and once[0] >= self.turn_ms:
            return {contender.quantity: once}
        count = max(clock.least, min(_MOST_CALLS, int(self.turn_ms / len(clock.kinds) / max(once[0], 1e-6))))
        if contender.quantity == STEP:
            return clock.step_ms(step, count)
        return {contender.quantity: clock.wall_ms(step, count)}


def state_memory(workload: Workload) -> list[Measurement]:
    """Bytes of state per element, and, where Linux tells it, how far the resident set rises in a step, in bytes."""
    step = ivon("cpu")(workload.parameters(), LARGE_STEPS)
    for _ in range(3):
        step()
    what = (PART, workload.name, "float32", our_name("cpu", PLAIN), True)
    storages = {
        tensor.data_ptr(): tensor.untyped_storage().nbytes()
        for state in step.optimizer._parameters.states.values()
        for tensor in vars(state.arena).values()
        if isinstance(tensor, torch.Tensor)
    }
    found = [(STATE, "bytes/element", sum(storages.values()) / workload.elements)]
    with contextlib.suppress(OSError):
        forget_peak()
        before = resident("VmRSS")
        step()
        found.append((GROWTH, "bytes", float(max(resident("VmHWM") - before, 0))))
    return [Measurement(*what, quantity, unit, value, value, value, [value]) for quantity, unit, value in found]
