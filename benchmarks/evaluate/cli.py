"""The command ``python -m benchmarks evaluate``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import Interruption, UserError
from benchmarks.finetune import settings
from benchmarks.finetune.cli import use_cache_without_network
from benchmarks.finetune.settings import RUN, Settings
from benchmarks.finetune.tasks import Task

QUICK = {"samples": 4, "test_size": 40}
OWN = ("split", "samples", "device", "out")  # what an evaluation does not take from the training


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
    pruned fraction are chosen on the validation split of the task it was trained on. Ctrl-C and SIGTERM keep what is
    done.
    """
    found, chosen = resolve(**locals())  # the options above have the names of the settings
    if found.hub or not Path(chosen.model or ".").exists():
        use_cache_without_network()
    from rich.console import Console

    from benchmarks.evaluate.run import Evaluation

    try:
        finished = Evaluation(folder, found, chosen, Console()).run()
    except KeyboardInterrupt:
        raise Interruption("Interrupted; nothing was saved.") from None
    if not finished:
        raise Interruption(f"Interrupted; what was judged so far is in {out}.")


def resolve(*, folder: Path, task: str | None, quick: bool, **options: Any) -> tuple[Task, Settings]:
    """The task of the training, and the user's options over what the adapter's folder says about it.

    An option of None keeps the training's value, and the recipe's for the samples. UserError where there is no adapter
    in the folder, for an unknown name, a number out of range, and options that contradict.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"There is no adapter in {folder}: train one with python -m benchmarks finetune.")
    given = {name: value for name, value in options.items() if value is not None}
    settings.check(given)
    if quick:
        for name in QUICK:
            if name in given:
                raise UserError(f"--quick decides {settings.option(name)}: give one of the two.")
        given |= QUICK
    trained = _trained(folder / RUN)
    trained_on = trained.get("task", task)
    if trained_on is None:
        raise UserError(f"{folder} does not say what it was trained on: give --task.")
    if task not in (None, trained_on):
        raise UserError(f"{folder} was trained on {trained_on}, not on {task}.")
    recipe = trained.get("recipe")
    prompts = trained.get("prompts") if recipe else None
    found, chosen = settings.resolve(task=trained_on, optimizer="ivon", recipe=recipe, prompts=prompts, **given)
    names = {field.name for field in fields(Settings)}.difference(OWN, given)
    return found, replace(chosen, **{name: value for name, value in trained.items() if name in names})


def _trained(path: Path) -> dict[str, Any]:
    """The settings that the main job wrote beside the adapter; none for an adapter from elsewhere."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"Cannot read {path}: it holds no settings.")
    return found
