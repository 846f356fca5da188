"""Tables of text, for the terminal and for Markdown alike."""

from __future__ import annotations

import pandas as pd
from rich.console import Console

NOTHING = "-"
"""A cell without a figure."""


def markdown(table: pd.DataFrame, left: int = 1) -> str:
    """A table of text in Markdown; the first `left` columns are words, the others are figures."""
    align = ["left" if number < left else "right" for number in range(table.shape[1])]
    cells = table.map(lambda cell: cell.replace("|", r"\|"))
    return str(cells.to_markdown(index=False, disable_numparse=True, colalign=align))


def show(console: Console, title: str, table: pd.DataFrame) -> None:
    """Prints a table, with its index, below its title."""
    console.print(f"{title}\n\n{table.to_string()}\n", markup=False, highlight=False, soft_wrap=True)
