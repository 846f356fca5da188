"""The command ``python -m benchmarks speed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def speed(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Turns of each contender per workload.")] = 12,
    max_elements: Annotated[
        int, typer.Option(help="Largest tensor of the scaling run (24 bytes per element).")
    ] = 400_000_000,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, scaling up to 40M elements.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = Path("results/speed"),
) -> None:
    """Time one optimizer step of IVON on the CPU side by side with AdamW and ivon-opt, after a correctness check."""
    from benchmarks import UserError
    from benchmarks.speed.run import run

    try:
        if min(threads, rounds, max_elements) < 1:
            raise UserError("--threads, --rounds and --max-elements must be at least 1")
        run(threads=threads, rounds=3 if quick else rounds, max_elements=40_000_000 if quick else max_elements, out=out)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
