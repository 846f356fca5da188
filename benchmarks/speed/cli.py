"""The commands ``python -m benchmarks speed`` and ``compare``. Heavy imports wait, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import UserError


def speed(
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = "",
    parts: Annotated[str, typer.Option(help="Some of steps,host,model.")] = "steps,host,model",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Turns of each contender, as far as the time allows.")] = 10,
    turn_ms: Annotated[float, typer.Option(help="About how long a turn measures.")] = 50.0,
    seconds: Annotated[float, typer.Option(help="For each part, shared by its workloads.")] = 600.0,
    workloads: Annotated[str, typer.Option(help="Some of them by name; default all that fit.")] = "",
    max_elements: Annotated[int, typer.Option(help="No workload with more.")] = 1_000_000_000,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds and workloads, and nothing that compiles for long.")
    ] = False,
    compiling: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Peers that torch.compile compiles for long.")
    ] = True,
    report: Annotated[bool, typer.Option(help="Draw the pictures and write the report.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny sizes on the CPU; the figures mean nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for record, pictures and report.")] = Path("results/speed"),
) -> None:
    """Time one optimizer step of IVON side by side with AdamW, ivon-opt and others, after a correctness check.

    Exit code 1: a backend of ours is wrong or failed.
    """
    from benchmarks.speed.measure import Options
    from benchmarks.speed.run import run

    if min(threads, rounds, turn_ms, seconds, max_elements) <= 0:
        raise UserError("--threads, --rounds, --turn-ms, --seconds and --max-elements must be positive")
    if quick:
        rounds, turn_ms, seconds = min(rounds, 4), min(turn_ms, 20.0), min(seconds, 90.0)
    compiling = compiling and not quick and not dry_run
    options = Options(device, threads, rounds, turn_ms, seconds, max_elements, quick, compiling, workloads)
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    if not run(options, chosen, out, dry_run=dry_run, with_report=report):
        raise typer.Exit(1)


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

    from benchmarks.speed.compare import compare_records, print_comparison, refuse_unlike
    from benchmarks.speed.record import read

    if not 0 <= threshold < 1:
        raise UserError("--threshold is a share, at least 0 and below 1: 0.05 is 5%")
    before, after = read(old), read(new)
    refuse_unlike(before, after)
    comparison = compare_records(before, after, threshold)
    print_comparison(Console(), comparison, before, after, everything=everything)
    if len(comparison.regressions):
        raise typer.Exit(1)
