"""Runs the search for IVON's settings and writes what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.environment import environment
from benchmarks.finetune.report import PACKAGES
from benchmarks.finetune.run import find_device, make_folder
from benchmarks.finetune.tasks import find_task
from benchmarks.quality import recipe_report
from benchmarks.quality.cells import Cells, write_json
from benchmarks.quality.method import Hyper
from benchmarks.quality.recipe import CONFIRMED, SAMPLES, TRIED, Plan, Recipe, around, candidates, frozen, parse
from benchmarks.quality.settings import Settings
from benchmarks.quality.workshop import Workshop

RECORD = "recipe.json"
CENTERS = 3
"""Settings around which more are tried."""


def run(settings: Settings, plan: Plan, console: Console) -> bool:
    """Tries, confirms and reports; False when Ctrl-C cut it short.

    Args:
        settings: Sizes, model, device and folder; the first task is searched on.
        plan: How many settings are tried and confirmed.
        console: For progress and tables.

    Raises:
        UserError: Model, data or device cannot be had, or a given setting is none.
    """
    given = [parse(text) for text in plan.given]
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    make_folder(settings.out)
    cells = Cells(settings.out, settings.identity())
    task = settings.tasks[0]
    with Workshop(settings, cells, device, console) as workshop:
        recipe = Recipe(task, cells, workshop.bench(task), len(settings.seeds))
        if given:
            finished = workshop.do(recipe.tries([of_main_job(task), *given], max(SAMPLES)))
        else:
            finished = workshop.do(recipe.tries([of_main_job(task), *candidates(plan.trials)]))
            if finished and plan.refine:
                finished = workshop.do(recipe.tries(around(recipe.best(CENTERS), plan.refine)))
        chosen = recipe.best(plan.best)
        for group in (chosen, [frozen(hyper) for hyper in chosen]):
            finished = finished and workshop.do(recipe.confirmations(group))
        chosen += [frozen(hyper) for hyper in chosen]
    record = {
        "schema": 1,
        "finished": finished,
        "settings": {**settings.record(), **plan.record()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "tried": list(recipe.found(TRIED, recipe.trials)),
        "confirmed": list(recipe.found(CONFIRMED, chosen)),
        "environment": environment(PACKAGES),
    }
    _write(record, settings.out, console)
    return finished


def of_main_job(task: str) -> Hyper:
    """What ``python -m benchmarks finetune`` uses on the task."""
    recipe = find_task(task).recipe
    return {
        "lr": recipe.ivon_lr,
        "ess": recipe.ess,
        "hess_init": recipe.hess_init,
        "beta2": recipe.beta2,
        "clip_radius": recipe.clip_radius,
    }


def _write(record: dict[str, Any], out: Path, console: Console) -> None:
    write_json(out / RECORD, record)
    recipe_report.print_tables(console, record)
    recipe_report.write_report(record, out)
    console.print(f"Record and report: {out / RECORD}, {out / 'recipe.md'}", soft_wrap=True)
