"""The command line of the benchmarks: ``python -m benchmarks`` lists its commands."""

from typing import Any

import typer
from typer.core import TyperGroup

from benchmarks import Interruption, UserError
from benchmarks.evaluate.cli import evaluate
from benchmarks.finetune.cli import INTERRUPTED, finetune
from benchmarks.quality.cli import quality, recipe
from benchmarks.readme.cli import readme
from benchmarks.sharding.cli import sharding
from benchmarks.speed.cli import compare, speed
from benchmarks.stacking.cli import stacking


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


app = typer.Typer(
    cls=_Benchmarks,
    help="Benchmarks of ivon_kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (compare, evaluate, finetune, quality, readme, recipe, sharding, speed, stacking):
    app.command()(command)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
