"""The command ``python -m benchmarks gpu``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def gpu(
    parts: Annotated[str, typer.Option(help="Some of kernels,model,host.")] = "kernels,model,host",
    rounds: Annotated[int, typer.Option(help="Turns of each contender, as far as the time allows.")] = 3,
    turn_ms: Annotated[float, typer.Option(help="About how long a turn measures.")] = 150.0,
    seconds: Annotated[float, typer.Option(help="For each part: nothing new begins after it.")] = 600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny sizes on the CPU; the figures mean nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for records and plot.")] = Path("results/gpu"),
) -> None:
    """Time the GPU backends side by side with AdamW and ivon-opt, after a correctness check, against the targets.

    Exit code 1: a backend of ours is wrong or failed.
    """
    from benchmarks import UserError
    from benchmarks.gpu.run import run

    try:
        if min(rounds, turn_ms, seconds) <= 0:
            raise UserError("--rounds, --turn-ms and --seconds must be positive")
        names = tuple(part.strip() for part in parts.split(",") if part.strip())
        sound = run(parts=names, rounds=rounds, turn_ms=turn_ms, seconds=seconds, dry_run=dry_run, out=out)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    if not sound:
        raise typer.Exit(1)
