"""The command ``python -m benchmarks sharding``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sharding(
    rounds: Annotated[int, typer.Option(help="Turns of each rank per workload and world size.")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, worlds of 1 and 2 ranks.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = Path("results/sharding"),
) -> None:
    """Time each rank's optimizer step on DTensor shards (CPU, one thread), over 1, 2 and 4 ranks, against 1 / ranks."""
    from benchmarks import UserError
    from benchmarks.sharding.run import run

    try:
        if rounds < 1:
            raise UserError("--rounds must be at least 1")
        run(worlds=(1, 2) if quick else (1, 2, 4), rounds=3 if quick else rounds, out=out)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
