"""What one evaluation does: what the adapter's folder says about its training, and the user's options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.finetune.settings import MAX_SAMPLES, RUN, option
from benchmarks.finetune.tasks import TASKS, Task, find_task

SAMPLES = 10
QUICK_SAMPLES, QUICK_SIZE = 4, 40
RATED = "vader_"
"""The tasks of rated sentences, each from a domain of its own, begin so."""


@dataclass(frozen=True)
class Settings:
    """Everything that an evaluation needs to know."""

    folder: Path
    task: str
    """What the adapter was trained on."""
    split: str
    samples: int
    test_size: int | None
    """Examples of each domain, at most; None takes all."""
    max_words: int | None
    max_tokens: int
    model: str | None
    load_in_8bit: bool
    device: str
    out: Path

    def record(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {**asdict(self), "folder": str(self.folder), "out": str(self.out)}


def resolve(
    *,
    folder: Path,
    task: str | None,
    split: str,
    samples: int | None,
    test_size: int | None,
    quick: bool,
    model: str | None,
    device: str,
    out: Path,
) -> tuple[Task, Settings]:
    """Lays the user's options over what the folder says about the training.

    Returns:
        The task of the training, and the settings.

    Raises:
        UserError: no adapter in the folder, an unknown name, a number out of range, or options that contradict.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"There is no adapter in {folder}: train one with python -m benchmarks finetune.")
    if split not in ("test", "validation"):
        raise UserError(f"Unknown split '{split}'; choose test or validation.")
    for name, value in (("samples", samples), ("test_size", test_size)):
        if value is not None and value < 1:
            raise UserError(f"{option(name)} must be at least 1, not {value}.")
        if value is not None and quick:
            raise UserError(f"--quick decides {option(name)}: give one of the two.")
    if samples is not None and samples > MAX_SAMPLES:
        raise UserError(f"--samples must be at most {MAX_SAMPLES}, not {samples}.")
    trained = _trained(folder)
    found = _find_task(folder, task, trained.get("task"))
    recipe = {**asdict(found.recipe), **trained}
    return found, Settings(
        folder=folder,
        task=found.name,
        split=split,
        samples=QUICK_SAMPLES if quick else samples or SAMPLES,
        test_size=QUICK_SIZE if quick else test_size or recipe["test_size"],
        max_words=recipe["max_words"],
        max_tokens=recipe["max_tokens"],
        model=model or recipe.get("model"),
        load_in_8bit=recipe.get("load_in_8bit", False),
        device=device,
        out=out,
    )


def domains(task: Task) -> list[Task]:
    """The task itself, and where it is one of rated sentences, then the other domains of these."""
    others = [t for t in TASKS.values() if t.name.startswith(RATED) and t is not task]
    return [task, *others] if task.name.startswith(RATED) else [task]


def _trained(folder: Path) -> dict[str, Any]:
    """The settings that the main job wrote beside the adapter; none for an adapter from elsewhere."""
    path = folder / RUN
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"Cannot read {path}: it holds no settings.")
    return settings


def _find_task(folder: Path, given: str | None, trained: str | None) -> Task:
    if given is None and trained is None:
        raise UserError(f"{folder} does not say what it was trained on: give --task.")
    if given is not None and trained is not None and given != trained:
        raise UserError(f"{folder} was trained on {trained}, not on {given}.")
    return find_task(given or trained or "")
