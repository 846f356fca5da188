"""The command line of the benchmarks: ``python -m benchmarks`` lists its commands.

Those of one module stand here: heavy imports wait until a command runs, so that ``--help`` is quick.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from benchmarks import Interruption, UserError
from benchmarks.evaluate.cli import evaluate
from benchmarks.finetune.cli import INTERRUPTED, finetune
from benchmarks.pairs import pairs
from benchmarks.quality.cli import quality, recipe
from benchmarks.speed.cli import compare, speed


class _Benchmarks(TyperGroup):
    """Ends what a user can mend in one sentence, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        except Interruption as interruption:
            typer.echo(str(interruption), err=True)
            raise typer.Exit(INTERRUPTED) from None


def readme() -> None:
    """Write the tables of README.md and of other documents from the committed records."""
    from benchmarks.readme import write

    write()


def sharding(
    rounds: Annotated[int, typer.Option(help="Turns of each rank per workload and world size.")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, worlds of 1 and 2 ranks.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = Path("results/sharding"),
) -> None:
    """Time each rank's optimizer step on DTensor shards (CPU, one thread), over 1, 2 and 4 ranks, against 1 / ranks."""
    from benchmarks.sharding import run

    if rounds < 1:
        raise UserError("--rounds must be at least 1")
    run(worlds=(1, 2) if quick else (1, 2, 4), rounds=3 if quick else rounds, out=out)


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
    given = batches.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in given):
        raise UserError(f"--batches must be whole numbers from 1 on, like 1,2,4,8; got {batches!r}")
    if min(samples, tokens, rank, rounds, threads) < 1:
        raise UserError("--samples, --tokens, --rank, --rounds and --threads must be at least 1")
    sizes = [1] if quick else [int(size) for size in given]
    rounds, memory = 3 if quick else rounds, memory and not quick
    from benchmarks.stacking import Options, run

    run(Options(model, device, samples, sizes, tokens, rank, rounds, threads, memory), out)


app = typer.Typer(
    cls=_Benchmarks,
    help="Benchmarks of ivon_kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (compare, evaluate, finetune, pairs, quality, readme, recipe, sharding, speed, stacking):
    app.command()(command)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
