"""Tables and lines on a terminal, and the same where the output goes into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["show", "table"]

_WIDE = 1000  # nothing is wrapped where nobody reads it on a terminal


def show(*parts: str | Table) -> None:
    """Print lines, as they are, and tables."""
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False, soft_wrap=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            console.print(part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Columns without lines between them; without a head if it is empty."""
    made = Table(*head, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="", show_header=any(head))
    for row in rows:
        made.add_row(*row)
    return made
