"""Timing side by side: every entry in turn, round after round, so that a drift of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import BASELINE, STEP, reason
from benchmarks.speed.record import Measurement, Record

Rounds = Sequence[Sequence[float]]  # the times of each round


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


class Options(NamedTuple):
    """How to measure; see the command's help."""

    device: str
    threads: int
    rounds: int
    turn_ms: float
    seconds: float
    max_elements: int
    quick: bool
    compiling: bool
    workloads: str = ""


@dataclass
class Session:
    """A run under way."""

    record: Record
    clock: CpuClock
    options: Options
    budget: Budget  # of the part
    console: Console
    save: Callable[[str], object]  # writes the record with the settings of this part
    wrong: dict[str, str] = field(default_factory=dict)  # what of ours was not right or failed, with the reason


class Timing(NamedTuple):
    """Quantiles of all times, the median of each round, and the ratios to the baseline's medians."""

    p20: float
    p50: float
    p80: float
    rounds: list[float]
    ratios: list[float]
    ratio: float | None  # their median


def timing(times: Rounds, baseline: Rounds | None = None) -> Timing:
    """Summary of the times of one entry; those of a baseline are from the same rounds."""
    p20, p50, p80 = np.quantile([value for part in times for value in part], (0.2, 0.5, 0.8)).tolist()
    rounds = [statistics.median(part) for part in times]
    ratios = [own / statistics.median(base) for own, base in zip(rounds, baseline or (), strict=False)]
    return Timing(p20, p50, p80, rounds, ratios, statistics.median(ratios) if ratios else None)


@dataclass
class Row:
    """An entry's times by quantity, one list for each round."""

    name: str
    ours: bool = False
    error: str | None = None  # why it was not measured
    failed: bool = False  # though it could run here
    turns: int = 1_000  # at most so many
    quantities: Sequence[str] = ()  # those that are missing if it failed
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)  # bytes


def take_turns(
    rows: Sequence[Row],
    turn: Callable[[int, int], dict[str, list[float]]],
    rounds: int,
    *,
    enough_time: Callable[[], bool] = lambda: True,
    after: Callable[[], object] = lambda: None,
) -> None:
    """One turn for each row, round after round, if the time allows more than one; a row that fails sits out.

    `turn` gives the times by quantity from the numbers of row and round. `after` is called after every turn, and at the
    end for those that did not come about.
    """
    done = 0
    while done < rounds and (not done or enough_time()):
        for number, row in enumerate(rows):
            if row.error is None and done < row.turns:
                try:
                    for quantity, values in turn(number, done).items():
                        row.times.setdefault(quantity, []).append(values)
                except Exception as error:  # a row of the table, not the end of the suite
                    row.error, row.failed = reason(error), True
            after()
        done += 1
    for _ in range((rounds - done) * len(rows)):
        after()


def measurements(
    place: tuple[str, str, str],
    rows: Sequence[Row],
    unit: str = "ms",
    further: Callable[[int, str, float | None], dict[str, Any]] = lambda number, quantity, median: {},
) -> list[Measurement]:
    """What was found of every quantity of every row, or why it was not.

    `place` are part, workload and dtype; `further` gives other fields from a row's number, the quantity and its median
    time. The ratios are to the baseline's times of the same quantity, or of a whole step where it has none such.
    """
    base = {q: times for row in rows if row.name == BASELINE and row.error is None for q, times in row.times.items()}
    found = []
    for number, row in enumerate(rows):
        for quantity in row.times if row.error is None else row.quantities:
            fields: dict[str, Any] = {"error": row.error}
            if row.error is None:
                name = BASELINE if quantity in base else f"{BASELINE}, {STEP}"
                fields |= timing(row.times[quantity], base.get(quantity, base.get(STEP)))._asdict()
                fields |= {"baseline": name if base else None}
            fields |= further(number, quantity, fields.get("p50"))
            found.append(Measurement(*place, row.name, row.ours, quantity, unit, **fields))
    return found


def progress(console: Console) -> Progress:
    """A bar that goes away."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
