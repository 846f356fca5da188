"""The command ``python -m benchmarks stacking``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def stacking(
    samples: Annotated[int, typer.Option(help="Posterior samples.")] = 10,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option(help="Length of every sequence.")] = 32,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters on q and v.")] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of each contender and batch size.")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    model: Annotated[str | None, typer.Option(help="Folder, GGUF file or hub id; SmolLM2-135M by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Measure the peak memory too, in processes of their own.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds of batch size 1, no memory.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = Path("results/stacking"),
) -> None:
    """Time posterior samples stacked in one forward pass against one pass for each, and against one at the mean."""
    from benchmarks import UserError
    from benchmarks.stacking.run import Options, run

    try:
        given = batches.split(",")
        if not all(size.strip().isdecimal() and int(size) for size in given):
            raise UserError(f"--batches must be whole numbers from 1 on, like 1,2,4,8; got {batches!r}")
        if min(samples, tokens, rank, rounds, threads) < 1:
            raise UserError("--samples, --tokens, --rank, --rounds and --threads must be at least 1")
        options = Options(
            model=model,
            device=device,
            samples=samples,
            batches=[1] if quick else [int(size) for size in given],
            tokens=tokens,
            rank=rank,
            rounds=3 if quick else rounds,
            threads=threads,
            memory=memory and not quick,
        )
        run(options, out)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
