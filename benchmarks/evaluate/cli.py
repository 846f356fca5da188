"""The command ``python -m benchmarks evaluate``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import Interruption
from benchmarks.evaluate.settings import resolve
from benchmarks.finetune.hub import use_cache_without_network


def evaluate(
    folder: Annotated[Path, typer.Argument(help="An adapter with its posterior, such as results/finetune/ivon.")],
    task: Annotated[
        str | None, typer.Option(help="The task that it was trained on, for a folder that does not say it.")
    ] = None,
    split: Annotated[str, typer.Option(help="Judge on test, or on validation, where the dials are chosen.")] = "test",
    samples: Annotated[int | None, typer.Option(help="Posterior samples to average; default 10.")] = None,
    test_size: Annotated[
        int | None, typer.Option(help="Examples of each domain; default: as many as its training was judged on.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="4 samples and 40 examples of each domain.")] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="The base model; default: the one that it was trained on."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the record, pages and pictures.")] = Path("results/evaluate"),
) -> None:
    """Judge a saved adapter by its posterior: at the mean, by samples, tempered and pruned.

    In distribution, and for the rated sentences under shift: on the domains that it was not trained on. Temperature and
    pruned fraction are chosen on the validation split of the task it was trained on. Ctrl-C keeps what is done.
    """
    found, settings = resolve(**locals())  # the options above have the names of the settings
    if found.hub or not Path(settings.model or ".").exists():
        use_cache_without_network()
    from rich.console import Console

    from benchmarks.evaluate.run import Evaluation

    try:
        finished = Evaluation(folder, found, settings, Console()).run()
    except KeyboardInterrupt:
        raise Interruption("Interrupted; nothing was saved.") from None
    if not finished:
        raise Interruption(f"Interrupted; what was judged so far is in {out}.")
