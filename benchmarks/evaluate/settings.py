"""What one evaluation does: what the adapter's folder says about its training, and the user's options."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.finetune import settings
from benchmarks.finetune.settings import RUN, Settings, option
from benchmarks.finetune.tasks import TASKS, Task

QUICK = {"samples": 4, "test_size": 40}
RATED = "vader_"
"""The tasks of rated sentences, each from a domain of its own, begin so."""
OWN = ("split", "samples", "device", "out")
"""What an evaluation does not take from the training."""


def resolve(*, folder: Path, task: str | None, quick: bool, **options: Any) -> tuple[Task, Settings]:
    """Lays the user's options over what the folder says about the training.

    Args:
        folder: of the adapter.
        task: what it was trained on, if the folder does not say it.
        quick: few samples and examples.
        options: fields of Settings; None keeps the training's value, and the recipe's for the samples.

    Returns:
        The task of the training, and the settings.

    Raises:
        UserError: no adapter in the folder, an unknown name, a number out of range, or options that contradict.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"There is no adapter in {folder}: train one with python -m benchmarks finetune.")
    given = {name: value for name, value in options.items() if value is not None}
    settings.check(given)
    if quick:
        for name in QUICK:
            if name in given:
                raise UserError(f"--quick decides {option(name)}: give one of the two.")
        given |= QUICK
    trained = _trained(folder)
    trained_on = trained.get("task", task)
    if trained_on is None:
        raise UserError(f"{folder} does not say what it was trained on: give --task.")
    if task not in (None, trained_on):
        raise UserError(f"{folder} was trained on {trained_on}, not on {task}.")
    found, chosen = settings.resolve(task=trained_on, optimizer="ivon", **given)
    names = {field.name for field in fields(Settings)}.difference(OWN, given)
    return found, replace(chosen, **{name: value for name, value in trained.items() if name in names})


def domains(task: Task) -> list[Task]:
    """The task itself, and where it is one of rated sentences, then the other domains of these."""
    others = [t for t in TASKS.values() if t.name.startswith(RATED) and t is not task]
    return [task, *others] if task.name.startswith(RATED) else [task]


def _trained(folder: Path) -> dict[str, Any]:
    """The settings that the main job wrote beside the adapter; none for an adapter from elsewhere."""
    path = folder / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"Cannot read {path}: it holds no settings.")
    return found
