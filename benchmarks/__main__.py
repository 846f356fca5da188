"""The command line of the benchmarks: ``python -m benchmarks`` lists its commands."""

import typer

from benchmarks.compare.cli import compare
from benchmarks.evaluate.cli import evaluate
from benchmarks.finetune.cli import finetune
from benchmarks.quality.cli import quality, recipe
from benchmarks.readme.cli import readme
from benchmarks.sharding.cli import sharding
from benchmarks.speed.cli import speed
from benchmarks.stacking.cli import stacking

app = typer.Typer(
    help="Benchmarks of ivon_kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(compare)
app.command()(evaluate)
app.command()(finetune)
app.command()(quality)
app.command()(readme)
app.command()(recipe)
app.command()(sharding)
app.command()(speed)
app.command()(stacking)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
