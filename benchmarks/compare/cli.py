"""The command ``python -m benchmarks compare``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    old: Annotated[Path, typer.Argument(help="The record to compare with, a speed.json.")],
    new: Annotated[Path, typer.Argument(help="The record of the changed code.")],
    threshold: Annotated[float, typer.Option(help="A slowdown or growth up to this is no regression.")] = 0.05,
    everything: Annotated[bool, typer.Option("--all", help="Show every measurement, the peers' too.")] = False,
) -> None:
    """Say what got slower, grew or began to fail between two records of the speed suite, beyond their noise.

    Exit code 0: nothing did. 1: something of ours did. 2: the files cannot be compared.
    """
    from rich.console import Console

    from benchmarks import UserError
    from benchmarks.compare import report
    from benchmarks.compare.changes import compare_records
    from benchmarks.compare.records import read, refuse_unlike

    try:
        if not 0 <= threshold < 1:
            raise UserError("--threshold is a share, at least 0 and below 1: 0.05 is 5%")
        before, after = read(old), read(new)
        refuse_unlike(before, after)
        comparison = compare_records(before, after, threshold)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    console = Console(width=None if Console().is_terminal else 180)
    report.print_comparison(console, comparison, before, after, everything=everything)
    if comparison.regressions:
        raise typer.Exit(1)
