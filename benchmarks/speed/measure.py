"""Timing side by side: every entry in turn, round after round, so that a drift of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.speed.contender import reason
from benchmarks.speed.record import Measurement

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
    values = [value for part in times for value in part]
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    rounds = [statistics.median(part) for part in times]
    ratios = [own / statistics.median(base) for own, base in zip(rounds, baseline or (), strict=False)]
    middle = statistics.median(ratios) if ratios else None
    return Timing(deciles[1], statistics.median(values), deciles[7], rounds, ratios, middle)


@dataclass
class Row:
    """An entry's times by quantity, one list for each round."""

    name: str
    ours: bool = False
    error: str | None = None  # why it was not measured
    failed: bool = False  # though it could run here
    turns: int = 1_000  # at most so many
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)  # bytes

    def measurement(
        self,
        place: tuple[str, str, str],
        quantity: str,
        unit: str,
        baseline: tuple[str | None, Rounds | None] = (None, None),
        **further: Any,
    ) -> Measurement:
        """What was found of one quantity, or why it was not.

        Args:
            place: Part, workload and dtype.
            quantity: What was measured.
            unit: Of its times.
            baseline: Its name and times.
            **further: Other fields.
        """
        if self.error is None:
            further |= timing(self.times[quantity], baseline[1])._asdict() | {"baseline": baseline[0]}
        name, ours, error = self.name, self.ours, self.error
        return Measurement(*place, contender=name, ours=ours, quantity=quantity, unit=unit, error=error, **further)


def take_turns(
    rows: Sequence[Row],
    turn: Callable[[int, int], dict[str, list[float]]],
    rounds: int,
    *,
    enough_time: Callable[[], bool] = lambda: True,
    after: Callable[[], None] = lambda: None,
) -> None:
    """One turn for each row, round after round; a row that fails keeps the reason and sits out.

    Args:
        rows: Where the times go.
        turn: Gives the times of the row with this number, by quantity, in the round with this number.
        rounds: How many, if the time allows; at least one.
        enough_time: Asked before every round but the first.
        after: Called after every turn, and at the end for those that did not come about.
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


def progress(console: Console) -> Progress:
    """A bar that goes away."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def wrong(rows: Iterable[Row]) -> dict[str, str]:
    """What of ours failed though it could run, with the reason."""
    return {row.name: row.error or "" for row in rows if row.ours and row.failed}
