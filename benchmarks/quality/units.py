"""Units of work that are done once each, by one process or by several that share a folder."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import UserError
from benchmarks.finetune.train import Interrupted
from benchmarks.quality.cells import Cells

_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Unit:
    """One piece of work, whose cell says that it is done."""

    cell: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    """Cells that have to be finished before."""
    title: str
    run: Callable[[], dict[str, Any]]


def forget_failures(units: Sequence[Unit], cells: Cells) -> None:
    """Have what failed in an earlier run tried again."""
    for unit in units:
        content = cells.read(*unit.cell)
        if content is not None and content["error"] is not None:
            cells.forget(*unit.cell)


def unfinished(units: Sequence[Unit], cells: Cells) -> list[Unit]:
    """The units that are left to do."""
    return [unit for unit in units if cells.read(*unit.cell) is None]


def work(units: Sequence[Unit], cells: Cells, begins: Callable[[Unit], None], ends: Callable[[int], None]) -> None:
    """Do what is left, beside other processes that do the same; returns when all is finished.

    A unit that fails is finished too: its cell says why.

    Args:
        units: In the order in which they are done; what one needs comes before it.
        cells: Where finished units are.
        begins: Called before every unit.
        ends: Called after every unit, with how many are left.

    Raises:
        Interrupted: Ctrl-C was pressed.
        UserError: A unit needs something that cannot be had.
    """
    while left := unfinished(units, cells):
        worked = False
        for unit in left:
            if any(cells.read(*need) is None for need in unit.needs):
                continue
            with cells.claim(*unit.cell) as owned:
                if owned and cells.read(*unit.cell) is None:
                    begins(unit)
                    cells.finish(_try(unit), *unit.cell)
                    worked = True
            ends(len(unfinished(units, cells)))
        if not worked:
            time.sleep(_WAIT_SECONDS)


def _try(unit: Unit) -> dict[str, Any]:
    try:
        return unit.run()
    except (Interrupted, UserError):
        raise
    except Exception as error:  # a row of the table, not the end of the study
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return {"error": reason, "traceback": traceback.format_exc()}
