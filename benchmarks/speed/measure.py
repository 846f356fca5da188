"""Timing side by side: every contender in turn, round after round, so that a drift of the machine meets all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contenders import BASELINE, STEP, Contender
from benchmarks.speed.record import Measurement
from benchmarks.speed.timing import Rounds, quantiles, ratios
from benchmarks.speed.verify import Verifier, reason
from benchmarks.speed.workloads import DTYPES, Workload

PART = "steps"
_MOST_CALLS = 100  # of a contender in a turn


class Budget:
    """The time that a part may take; what has begun is finished."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> bool:
        """Whether more may begin."""
        return time.monotonic() < self._end

    def share(self, parts: int) -> Budget:
        """An equal share of what is left, for one of `parts`."""
        return Budget(max(self._end - time.monotonic(), 0.0) / parts)


@dataclass
class _Row:
    """A contender's times by quantity, one list for each round."""

    contender: Contender
    error: str | None = None  # why it was not measured
    failed: bool = False  # though it could run here
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    peaks: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """What was measured on one workload, and what of ours was not right or failed."""

    measurements: list[Measurement]
    copy_gbps: float
    wrong: dict[str, str]


class Comparer:
    """Compares the contenders of a device on one workload after the other.

    Args:
        clock: The device.
        contenders: One of them is the baseline of the ratios.
        rounds: Turns of each contender, if the time allows; at least one.
        turn_ms: About how long a turn measures.
        skip: Why a contender shall not run on a workload, or None.
        tick: Called after every turn, and at the end for those that did not come about.
    """

    def __init__(
        self,
        clock: CpuClock,
        contenders: Sequence[Contender],
        *,
        rounds: int,
        turn_ms: float,
        skip: Callable[[Contender, Workload], str | None] = lambda contender, workload: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock, self._contenders, self._skip, self._tick = clock, contenders, skip, tick
        self._rounds, self._turn_ms = rounds, turn_ms

    def __call__(self, workload: Workload, dtype_name: str, budget: Budget) -> Comparison:
        """Verifies and measures."""
        try:
            return self._compare(workload, dtype_name, budget)
        finally:
            gc.unfreeze()  # what _clean froze

    def _compare(self, workload: Workload, dtype_name: str, budget: Budget) -> Comparison:
        dtype = DTYPES[dtype_name]
        verifier = Verifier(workload, dtype, self._clock.device, self._clock.reference_elements)
        rows = []
        for contender in self._contenders:
            row = _Row(contender, self._unable(contender, workload))
            if row.error is None:
                row.error = verifier.check(contender)
                row.failed = row.error is not None
                self._clean()
            rows.append(row)
        del verifier
        self._clean()
        copied = self._clock.copy_gbps()
        self._measure(rows, workload, dtype, budget)
        wrong = {_name(row.contender): row.error or "" for row in rows if row.contender.ours and row.failed}
        measurements = [m for row in rows for m in self._measurements(row, rows, workload, dtype_name, copied)]
        return Comparison(measurements, copied, wrong)

    def _unable(self, contender: Contender, workload: Workload) -> str | None:
        """Why a contender does not run on a workload."""
        if known := contender.missing() or self._skip(contender, workload):
            return known
        free = self._clock.free_bytes()
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
        self._clock.release()

    def _measure(self, rows: list[_Row], workload: Workload, dtype: torch.dtype, budget: Budget) -> None:
        done = 0
        while done < self._rounds and (not done or budget.left()):
            for row in rows:
                if row.error is None and done < row.contender.turns:
                    try:
                        self._turn(row, workload, dtype)
                    except Exception as error:  # a row of the table, not the end of the suite
                        row.error, row.failed = reason(error), True
                    self._clean()
                self._tick()
            done += 1
        for _ in range((self._rounds - done) * len(rows)):
            self._tick()

    def _turn(self, row: _Row, workload: Workload, dtype: torch.dtype) -> None:
        """One turn of one contender, from fresh tensors to memory given back."""
        clock, before = self._clock, self._clock.allocated()
        step = row.contender.build(workload.parameters(dtype, clock.device))
        for _ in range(clock.warm_up):
            step()
        clock.synchronize()
        clock.reset_peak()
        once = clock.wall_ms(step, 1)
        row.peaks.append(clock.peak_since(before))
        count = max(clock.least, min(_MOST_CALLS, int(self._turn_ms / len(clock.kinds) / max(once[0], 1e-6))))
        whole = row.contender.quantity == STEP
        if len(clock.kinds) == 1 and once[0] >= self._turn_ms:
            times = {row.contender.quantity: once}
        else:
            times = clock.step_ms(step, count) if whole else {row.contender.quantity: clock.wall_ms(step, count)}
        for quantity, values in times.items():
            row.times.setdefault(quantity, []).append(values)

    def _measurements(
        self, row: _Row, rows: list[_Row], workload: Workload, dtype_name: str, copied: float
    ) -> list[Measurement]:
        """What a row gives: one measurement for each of its quantities, or one that says why there is none."""
        contender = row.contender
        what = (PART, workload.name, dtype_name, contender.name, contender.ours)
        moved = contender.bytes_per_element(DTYPES[dtype_name])
        if row.error is not None:
            return [Measurement(*what, contender.quantity, "ms", bytes_per_element=moved, error=row.error)]
        peaks = [peak / workload.elements for peak in row.peaks if peak is not None]
        found = []
        for quantity, times in row.times.items():
            baseline, base = _baseline(rows, quantity)
            main = self._clock.moving if contender.quantity == STEP else contender.quantity
            moving = moved if quantity == main else None
            quotients = ratios(times, base) if base else None
            p20, p50, p80 = quantiles([value for part in times for value in part])
            gbps = None if moving is None else moving * workload.elements / p50 / 1e6
            found.append(
                Measurement(
                    *what,
                    quantity,
                    "ms",
                    *(p20, p50, p80),
                    rounds=[statistics.median(part) for part in times],
                    baseline=baseline,
                    ratios=quotients,
                    ratio=statistics.median(quotients) if quotients else None,
                    bytes_per_element=moving,
                    gbps=gbps,
                    copy_share=None if gbps is None else gbps / copied,
                    peak_bytes_per_element=statistics.median(peaks) if peaks and quantity == STEP else None,
                )
            )
        return found


def _name(contender: Contender) -> str:
    return contender.name if contender.quantity == STEP else f"{contender.name}: {contender.quantity}"


def _baseline(rows: list[_Row], quantity: str) -> tuple[str | None, Rounds | None]:
    """The baseline's times of the same quantity, or of a whole step where it has none such."""
    times: dict[str, Rounds] = {}
    for row in rows:
        if row.contender.name == BASELINE and row.error is None:
            times.update(row.times)
    for found, name in ((quantity, BASELINE), (STEP, f"{BASELINE}, {STEP}")):
        if times.get(found):
            return name, times[found]
    return None, None
