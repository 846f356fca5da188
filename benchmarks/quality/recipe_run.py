"""Runs the search for IVON's settings and writes what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.environment import environment
from benchmarks.finetune.report import PACKAGES
from benchmarks.finetune.run import find_device, make_folder
from benchmarks.quality import recipe_report
from benchmarks.quality.cells import Cells, write_json
from benchmarks.quality.methods.ivon import IvonMean
from benchmarks.quality.recipe import CONFIRMED, TRIED, Recipe, candidates, frozen
from benchmarks.quality.settings import Settings
from benchmarks.quality.workshop import Workshop

RECORD = "recipe.json"


def run(settings: Settings, trials: int, best: int, console: Console) -> bool:
    """Tries, confirms and reports; False when Ctrl-C cut it short.

    Args:
        settings: Sizes, model, device and folder; the first task is searched on.
        trials: How many settings are tried.
        best: How many of them are confirmed.
        console: For progress and tables.

    Raises:
        UserError: Model, data or device cannot be had.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    make_folder(settings.out)
    cells = Cells(settings.out, settings.identity())
    task = settings.tasks[0]
    with Workshop(settings, cells, device, console) as workshop:
        tried = [*IvonMean.candidates, *candidates(trials)]
        recipe = Recipe(task, cells, workshop.bench(task), tried, len(settings.seeds))
        finished = workshop.do(recipe.tries())
        chosen = recipe.best(best)
        chosen += [frozen(hyper) for hyper in chosen]
        finished = finished and workshop.do(recipe.confirmations(chosen))
    record = {
        "schema": 1,
        "finished": finished,
        "settings": {**settings.record(), "trials": trials, "best": best},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "tried": list(recipe.found(TRIED, tried)),
        "confirmed": list(recipe.found(CONFIRMED, chosen)),
        "environment": environment(PACKAGES),
    }
    _write(record, settings.out, console)
    return finished


def _write(record: dict[str, Any], out: Path, console: Console) -> None:
    write_json(out / RECORD, record)
    recipe_report.print_tables(console, record)
    recipe_report.write_report(record, out)
    console.print(f"Record and report: {out / RECORD}, {out / 'recipe.md'}", soft_wrap=True)
