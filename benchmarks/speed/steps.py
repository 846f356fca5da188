"""The part `steps`: every contender on every workload, and what IVON's state takes on the CPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import UserError
from benchmarks.memory import PeakMemory, forget_peak, resident
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import LARGE_STEPS, STEP, Contender
from benchmarks.speed.measure import Budget, Row, Session, measurements, progress, take_turns
from benchmarks.speed.peers import PLAIN, ivon, lineup, our_name
from benchmarks.speed.record import Measurement
from benchmarks.speed.verify import Verifier, wrong
from benchmarks.speed.workloads import DRY_WORKLOADS, DTYPES, QUICK, WORKLOADS, Workload, flat, short

PART = "steps"
STATE, GROWTH = "state", "growth of the resident set in a step"
_MOST_CALLS = 100  # of a contender in a turn
_SLOW_ELEMENTS = 1_000_000  # that --quick gives to a contender of which one turn is enough


def run(session: Session) -> None:
    """Measures; the record is written after every workload, so that a run that is ended leaves what it had."""
    options, clock, record = session.options, session.clock, session.record
    reasons = {w: left_out(session, w) for w in (DRY_WORKLOADS if record.dry_run else WORKLOADS)}
    missing = [(workload.name, why) for workload, why in reasons.items() if why]
    workloads = [workload for workload, why in reasons.items() if not why]
    if options.quick:
        workloads.sort(key=lambda workload: workload.elements)  # as many as the time allows
    pairs = [(workload, dtype) for dtype in DTYPES for workload in workloads]
    contenders = lineup(clock.device)
    measured: list[Measurement] = []
    copies: list[float] = []
    record.workloads = {}
    with progress(session.console) as bar:
        task = bar.add_task("", total=len(pairs) * len(contenders) * options.rounds)
        for number, (workload, dtype) in enumerate(pairs):
            name = f"{workload.name}, {dtype}"
            if measured and not session.budget.left():
                missing.append((name, f"the time was up (--seconds {options.seconds:g})"))
                continue
            bar.update(task, description=name)
            budget = session.budget.share(len(pairs) - number)
            found, copied = compare(session, contenders, workload, dtype, budget, functools.partial(bar.advance, task))
            measured += found
            copies.append(copied)
            about = {"title": workload.title, "tensors": len(workload.shapes), "elements": workload.elements}
            record.workloads[workload.name] = about
            record.copy_gbps = {clock.kind: statistics.median(copies)}
            record.replace_part(PART, measured, missing)
            session.save(PART)
        if clock.kind == "cpu" and not record.dry_run:
            bar.update(task, description="memory")
            measured += _state_memory(flat(10_000_000))
    record.replace_part(PART, measured, missing)


def _asked(session: Session) -> set[str]:
    """The workloads that --workloads names."""
    asked = {name.strip() for name in session.options.workloads.split(",") if name.strip()}
    if unknown := asked.difference(workload.name for workload in (*WORKLOADS, *DRY_WORKLOADS)):
        names = ", ".join(workload.name for workload in WORKLOADS)
        raise UserError(f"there is no workload {', '.join(sorted(unknown))}; choose from {names}")
    return asked


def left_out(session: Session, workload: Workload) -> str:
    """Why a workload is not measured, or an empty string."""
    if (asked := _asked(session)) and workload.name not in asked:
        return "--workloads leaves it out"
    if session.options.quick and workload in WORKLOADS and workload.name not in QUICK:
        return "--quick leaves it out"
    if workload.elements > session.options.max_elements:
        return f"more elements than --max-elements {session.options.max_elements}"
    free, needed = session.clock.free_bytes(), 16 * workload.elements  # weights, gradients and AdamW's moments
    if free is None or needed <= free:
        return ""
    return f"AdamW alone needs {needed / 2**30:.0f} GiB of memory in float32, {free / 2**30:.0f} are free"


def _unable(session: Session, contender: Contender, workload: Workload) -> str | None:
    """Why a contender does not run on a workload."""
    if missing := contender.missing():
        return missing
    if contender.compiles and not session.options.compiling:
        return "compiles for long, and was left out"
    if session.options.quick and contender.turns == 1 and workload.elements > _SLOW_ELEMENTS:
        return f"takes long: --quick leaves it out above {short(_SLOW_ELEMENTS)} elements"
    free, needed = session.clock.free_bytes(), workload.elements * contender.bytes_needed
    if free is None:
        return None
    if contender.most_elements is not None and workload.elements > contender.most_elements:
        return f"takes too long on a CPU for more than {contender.most_elements / 1e6:g}M elements"
    return f"may need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free" if needed > free else None


def compare(
    session: Session,
    contenders: Sequence[Contender],
    workload: Workload,
    dtype_name: str,
    budget: Budget,
    tick: Callable[[], object] = lambda: None,
) -> tuple[list[Measurement], float]:
    """Verifies and measures the contenders on a workload, one of them the baseline; and a copy's GB/s."""
    clock, dtype = session.clock, DTYPES[dtype_name]

    def clean() -> None:
        gc.collect()
        gc.freeze()  # what is still there stays, peers' modules for the most: the next collection need not look at it
        clock.release()

    def turn(number: int, done: int) -> dict[str, list[float]]:
        try:
            return _turn(clock, contenders[number], rows[number], workload, dtype, session.options.turn_ms)
        finally:
            clean()

    try:
        verifier = Verifier(workload, dtype, clock.device, clock.reference_elements)
        rows = verifier.rows(contenders, lambda contender: _unable(session, contender, workload), clean)
        del verifier
        clean()
        copied = clock.copy_gbps()
        take_turns(rows, turn, session.options.rounds, enough_time=budget.left, after=tick)
    finally:
        gc.unfreeze()
    failures = wrong(contenders, rows)
    session.wrong |= {f"{workload.name}, {dtype_name}, {contender}": why for contender, why in failures.items()}

    def further(number: int, quantity: str, median: float | None) -> dict[str, Any]:
        """What moves: of a whole step in one of its kinds."""
        row, moved = rows[number], contenders[number].bytes_per_element(dtype)
        if median is None:
            return {"bytes_per_element": moved}
        moving = moved if quantity == (clock.moving if STEP in row.quantities else quantity) else None
        gbps = None if moving is None else moving * workload.elements / median / 1e6
        share = None if gbps is None else gbps / copied
        peak = statistics.median(row.peaks) / workload.elements if row.peaks and quantity == STEP else None
        figures = {"bytes_per_element": moving, "gbps": gbps, "copy_share": share}
        return {**figures, "peak_bytes_per_element": peak}

    return measurements((PART, workload.name, dtype_name), rows, further=further), copied


def _turn(
    clock: CpuClock, contender: Contender, row: Row, workload: Workload, dtype: torch.dtype, turn_ms: float
) -> dict[str, list[float]]:
    """One turn of one contender, from fresh tensors on: a tensor that is kept would hide noise from the rounds."""
    with PeakMemory(clock.device) as peak:
        step = contender.build(workload.parameters(dtype, clock.device), LARGE_STEPS)
        for _ in range(clock.warm_up):
            step()
        clock.synchronize()
        peak.restart()
        once = clock.wall_ms(step, 1)
    if peak.bytes is not None and peak.bytes > clock.least_peak:
        row.peaks.append(peak.bytes)
    if len(clock.kinds) == 1 and once[0] >= turn_ms:
        return {contender.quantity: once}
    count = max(clock.least, min(_MOST_CALLS, int(turn_ms / len(clock.kinds) / max(once[0], 1e-6))))
    if contender.quantity == STEP:
        return clock.step_ms(step, count)
    return {contender.quantity: clock.wall_ms(step, count)}


def _state_memory(workload: Workload) -> list[Measurement]:
    """Bytes of state per element, and, where Linux tells it, how far the resident set rises in a step, in bytes."""
    step = ivon("cpu")(workload.parameters(), LARGE_STEPS)
    for _ in range(3):
        step()
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
    what = (PART, workload.name, "float32", our_name("cpu", PLAIN), True)
    return [Measurement(*what, quantity, unit, value, value, value, [value]) for quantity, unit, value in found]
