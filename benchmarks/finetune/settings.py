"""What one run of the main job does: the command line's answers over the task's recipe, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.finetune.tasks import Recipe, Task, find_task

OPTIMIZERS = {"both": ("adamw", "ivon"), "adamw": ("adamw",), "ivon": ("ivon",)}
IVON_ONLY = ("ess", "hess_init", "clip_radius", "samples")
POSITIVE = ("lr", "adamw_lr", "ess", "hess_init", "clip_radius")
AT_LEAST_ONE = ("steps", "batch_size", "train_size", "test_size", "max_words", "samples")
MAX_SAMPLES = 2**16
RUN = "run.json"
"""Beside an adapter: the settings it was trained with, which ``python -m benchmarks evaluate`` goes by."""


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """A task's recipe with the user's changes, and everything else that a run needs to know."""

    task: str
    split: str
    optimizers: tuple[str, ...]
    seed: int = 0
    model: str | None = None
    load_in_8bit: bool = False
    device: str
    out: Path

    def record(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {**asdict(self), "out": str(self.out)}


def resolve(*, task: str, optimizer: str, lr: float | None = None, **options: Any) -> tuple[Task, Settings]:
    """Lays the user's options over the task's recipe.

    Args:
        task: a name in TASKS.
        optimizer: "adamw", "ivon" or "both".
        lr: learning rate of the chosen optimizer; with both, of IVON.
        options: other fields of Settings; None keeps the recipe's value.

    Raises:
        UserError: an unknown name, a number out of range, or an option that would have no effect.
    """
    found = find_task(task)
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
    return found, Settings(task=task, optimizers=OPTIMIZERS[optimizer], **{**asdict(found.recipe), **given})


def check(given: Mapping[str, Any]) -> None:
    """Looks at the options that were given, by field.

    Raises:
        UserError: a number is out of range, or there is no such split.
    """
    if given["split"] not in ("test", "validation"):
        raise UserError(f"Unknown split '{given['split']}'; choose test or validation.")
    for name, value in given.items():
        if name in POSITIVE and not 0 < value < math.inf:
            raise UserError(f"{option(name)} must be a positive number, not {value}.")
        if name in AT_LEAST_ONE and value < 1:
            raise UserError(f"{option(name)} must be at least 1, not {value}.")
        if name == "samples" and value > MAX_SAMPLES:
            raise UserError(f"--samples must be at most {MAX_SAMPLES}, not {value}.")
        if name == "weight_decay" and not 0 <= value < math.inf:
            raise UserError(f"--weight-decay must be zero or a positive number, not {value}.")
        if name == "seed" and not 0 <= value < 2**63:
            raise UserError(f"--seed must be between 0 and 2^63 - 1, not {value}.")


def option(name: str) -> str:
    """The command-line option that sets a field."""
    return f"--{name.replace('_', '-')}"
