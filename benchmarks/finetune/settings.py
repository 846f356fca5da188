"""What one run of the main job does: the command line's answers over the task's recipe, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
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


@dataclass(frozen=True)
class Settings(Recipe):
    """A task's recipe with the user's changes, and everything else that a run needs to know."""

    task: str = ""
    split: str = "test"
    optimizers: tuple[str, ...] = ()
    seed: int = 0
    model: str | None = None
    load_in_8bit: bool = False
    device: str = "auto"
    out: Path = Path()

    def record(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {**asdict(self), "out": str(self.out)}


def resolve(
    *,
    task: str,
    optimizer: str,
    split: str,
    seed: int,
    model: str | None,
    load_in_8bit: bool,
    device: str,
    out: Path,
    lr: float | None,
    **changes: float | None,
) -> tuple[Task, Settings]:
    """Lays the user's options over the task's recipe.

    Args:
        task: a name in TASKS.
        optimizer: "adamw", "ivon" or "both".
        split: "test" or "validation".
        seed: decides every random draw.
        model: folder, GGUF file or hub id; None is the default model.
        load_in_8bit: quantize the model.
        device: a torch device, or "auto".
        out: folder for everything that is written.
        lr: learning rate of the chosen optimizer; with both, of IVON.
        changes: fields of Recipe; None keeps the recipe's value.

    Raises:
        UserError: an unknown name, a number out of range, or an option that would have no effect.
    """
    found = find_task(task)
    if optimizer not in OPTIMIZERS:
        raise UserError(f"Unknown optimizer '{optimizer}'; choose one of {', '.join(OPTIMIZERS)}.")
    if split not in ("test", "validation"):
        raise UserError(f"Unknown split '{split}'; choose test or validation.")
    given = {name: value for name, value in {"lr": lr, **changes}.items() if value is not None}
    _refuse_without_effect(optimizer, given)
    _check_numbers(given, seed)
    if "lr" in given:
        given["adamw_lr" if optimizer == "adamw" else "ivon_lr"] = given.pop("lr")
    recipe = {field.name: getattr(found.recipe, field.name) for field in fields(Recipe)}
    return found, Settings(
        **{**recipe, **given},
        task=task,
        split=split,
        optimizers=OPTIMIZERS[optimizer],
        seed=seed,
        model=model,
        load_in_8bit=load_in_8bit,
        device=device,
        out=out,
    )


def _refuse_without_effect(optimizer: str, given: dict[str, Any]) -> None:
    unused = IVON_ONLY if optimizer == "adamw" else ()
    if optimizer != "both" and "adamw_lr" in given:
        raise UserError(f"--adamw-lr is for --optimizer both; with --optimizer {optimizer} use --lr.")
    for name in unused:
        if name in given:
            raise UserError(f"{option(name)} has no effect with --optimizer adamw.")


def _check_numbers(given: dict[str, Any], seed: int) -> None:
    for name in POSITIVE:
        value = given.get(name, 1.0)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{option(name)} must be a positive number, not {value}.")
    for name in AT_LEAST_ONE:
        if given.get(name, 1) < 1:
            raise UserError(f"{option(name)} must be at least 1, not {given[name]}.")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be between 0 and 2^63 - 1, not {seed}.")
    if given.get("samples", 1) > MAX_SAMPLES:
        raise UserError(f"--samples must be at most {MAX_SAMPLES}, not {given['samples']}.")
    if given.get("weight_decay", 0.0) < 0 or not math.isfinite(given.get("weight_decay", 0.0)):
        raise UserError(f"--weight-decay must be zero or a positive number, not {given['weight_decay']}.")


def option(name: str) -> str:
    """The command-line option that sets a field."""
    return f"--{name.replace('_', '-')}"
