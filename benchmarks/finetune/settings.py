"""What one run of the main job does: the command line's answers over the task's recipe, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.finetune.tasks import PAPER_MODEL, PAPER_SEEDS, PUBLISHED, QUICK, Recipe, Task, find_task

OPTIMIZERS = {"both": ("adamw", "ivon"), "adamw": ("adamw",), "ivon": ("ivon",)}
IVON_ONLY = ("ess", "hess_init", "clip_radius", "samples")
RUN = "run.json"  # beside an adapter: the settings it was trained with, which the command `evaluate` goes by
_COUNTS = ("steps", "batch_size", "train_size", "test_size", "max_words", "samples")
_POSITIVE = ("lr", "adamw_lr", "ess", "hess_init", "clip_radius")
_RULES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (  # of which fields, what they must be
    (_COUNTS, "at least 1", lambda value: value >= 1),
    (("samples",), f"at most {2**16}", lambda value: value <= 2**16),
    (_POSITIVE, "a positive number", lambda value: 0 < value < inf),
    (("weight_decay",), "zero or a positive number", lambda value: 0 <= value < inf),
    (("validation_size",), "zero or more", lambda value: value >= 0),
    (("seed",), "between 0 and 2^63 - 1", lambda value: 0 <= value < 2**63),
)


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """A task's recipe with the user's changes, and everything else that a run needs to know."""

    task: str
    recipe: str | None = None
    split: str
    optimizers: tuple[str, ...]
    prompts: str = "ours"
    seed: int = 0
    model: str | None = None
    load_in_8bit: bool = False
    device: str
    out: Path

    def record(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {**asdict(self), "out": str(self.out)}


def resolve(
    *,
    task: str,
    optimizer: str,
    recipe: str | None = None,
    prompts: str | None = None,
    lr: float | None = None,
    quick: bool = False,
    **options: Any,
) -> tuple[Task, Settings]:
    """Lays the user's options over the task's recipe: None keeps the recipe's value, and `lr` is the optimizer's.

    `recipe` "paper" is the published one, for the paper's tasks: its prompts, unless others are asked for, the first of
    its seeds, and where no model is given its model in 8 bit. `quick` makes the recipe's own amounts small.

    UserError for an unknown name, a number out of range, and an option that would have no effect.
    """
    found = find_task(task, recipe)
    if prompts is not None:
        if prompts not in ("ours", PUBLISHED):
            raise UserError(f"Unknown prompts '{prompts}'; choose ours or {PUBLISHED}.")
        if not found.hub:
            raise UserError("--prompts is for the paper's tasks with --recipe paper.")
        found = replace(found, prompts=prompts)
    if recipe is not None:
        options = {**options, "seed": PAPER_SEEDS[0] if options.get("seed") is None else options["seed"]}
        if options.get("model") is None:
            options |= {"model": PAPER_MODEL, "load_in_8bit": True}
    if optimizer not in OPTIMIZERS:
        raise UserError(f"Unknown optimizer '{optimizer}'; choose one of {', '.join(OPTIMIZERS)}.")
    given = {name: value for name, value in {"lr": lr, **options}.items() if value is not None}
    if optimizer != "both" and "adamw_lr" in given:
        raise UserError(f"--adamw-lr is for --optimizer both; with --optimizer {optimizer} use --lr.")
    for name in IVON_ONLY if optimizer == "adamw" else ():
        if name in given:
            raise UserError(f"{option(name)} has no effect with --optimizer adamw.")
    check(given)
    if lr is not None:
        given["adamw_lr" if optimizer == "adamw" else "ivon_lr"] = given.pop("lr")
    return found, Settings(
        task=task,
        recipe=recipe,
        prompts=found.prompts,
        optimizers=OPTIMIZERS[optimizer],
        **{**asdict(found.recipe), **(QUICK if quick else {}), **given},
    )


def check(given: Mapping[str, Any]) -> None:
    """Refuses, by UserError, a number that is out of range and a split that there is not."""
    if given["split"] not in ("test", "validation"):
        raise UserError(f"Unknown split '{given['split']}'; choose test or validation.")
    for fields, wanted, holds in _RULES:
        for name in fields:
            if name in given and not holds(given[name]):
                raise UserError(f"{option(name)} must be {wanted}, not {given[name]}.")


def option(name: str) -> str:
    """The command-line option that sets a field."""
    return f"--{name.replace('_', '-')}"
