"""The part `steps`: every contender on every workload, and what IVON's state takes on the CPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.memory import PeakMemory, forget_peak, resident
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import BASELINE, LARGE_STEPS, STEP, Contender
from benchmarks.speed.lineup import PLAIN, ivon, our_name
from benchmarks.speed.measure import Budget, Rounds, Row, take_turns
from benchmarks.speed.record import Measurement
from benchmarks.speed.verify import Verifier
from benchmarks.speed.workloads import DTYPES, Workload

PART = "steps"
STATE, GROWTH = "state", "growth of the resident set in a step"
_MOST_CALLS = 100  # of a contender in a turn


@dataclass(frozen=True)
class Comparison:
    """What was measured on one workload, and what of ours was not right or failed."""

    measurements: list[Measurement]
    copy_gbps: float
    wrong: dict[str, str]


@dataclass(frozen=True)
class Comparer:
    """Verifies and measures the contenders of a device on one workload after the other."""

    clock: CpuClock
    contenders: Sequence[Contender]  # one of them is the baseline of the ratios
    rounds: int  # turns of each contender, if the time allows; at least one
    turn_ms: float  # about how long a turn measures
    skip: Callable[[Contender, Workload], str | None] = lambda contender, workload: None  # why one shall not run
    tick: Callable[[], None] = lambda: None  # called after every turn, and for those that did not come about

    def __call__(self, workload: Workload, dtype_name: str, budget: Budget) -> Comparison:
        """One row for each quantity of each contender, or one that says why there is none."""
        try:
            return self._compare(workload, dtype_name, budget)
        finally:
            gc.unfreeze()  # what _clean froze

    def _compare(self, workload: Workload, dtype_name: str, budget: Budget) -> Comparison:
        dtype = DTYPES[dtype_name]
        verifier = Verifier(workload, dtype, self.clock.device, self.clock.reference_elements)
        rows = verifier.rows(self.contenders, lambda contender: self._unable(contender, workload), self._clean)
        del verifier
        self._clean()
        copied = self.clock.copy_gbps()

        def turn(number: int, done: int) -> dict[str, list[float]]:
            try:
                return self._turn(self.contenders[number], rows[number], workload, dtype)
            finally:
                self._clean()

        take_turns(rows, turn, self.rounds, enough_time=budget.left, after=self.tick)
        pairs = list(zip(self.contenders, rows, strict=True))
        base = {q: times for row in rows if row.name == BASELINE and not row.error for q, times in row.times.items()}
        wrong = {_name(contender): row.error or "" for contender, row in pairs if row.ours and row.failed}
        measured = [m for pair in pairs for m in self._measurements(*pair, base, workload, dtype_name, copied)]
        return Comparison(measured, copied, wrong)

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
        return (
            clock.step_ms(step, count)
            if contender.quantity == STEP
            else {contender.quantity: clock.wall_ms(step, count)}
        )

    def _measurements(
        self,
        contender: Contender,
        row: Row,
        base: Mapping[str, Rounds],
        workload: Workload,
        dtype_name: str,
        copied: float,
    ) -> list[Measurement]:
        place = (PART, workload.name, dtype_name)
        moved = contender.bytes_per_element(DTYPES[dtype_name])
        if row.error is not None:
            return [row.measurement(place, contender.quantity, "ms", bytes_per_element=moved)]
        found = []
        for quantity, times in row.times.items():
            # The baseline's times of the same quantity, or of a whole step where it has none such.
            name = BASELINE if quantity in base else f"{BASELINE}, {STEP}"
            baseline = (name, base.get(quantity, base.get(STEP))) if base else (None, None)
            whole = contender.quantity == STEP
            moving = moved if quantity == (self.clock.moving if whole else contender.quantity) else None
            median = statistics.median([value for part in times for value in part])
            gbps = None if moving is None else moving * workload.elements / median / 1e6
            further = {
                "bytes_per_element": moving,
                "gbps": gbps,
                "copy_share": None if gbps is None else gbps / copied,
                "peak_bytes_per_element": statistics.median(row.peaks) / workload.elements
                if row.peaks and quantity == STEP
                else None,
            }
            found.append(row.measurement(place, quantity, "ms", baseline, **further))
        return found


def _name(contender: Contender) -> str:
    return contender.name if contender.quantity == STEP else f"{contender.name}: {contender.quantity}"


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
