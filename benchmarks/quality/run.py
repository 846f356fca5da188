"""Runs a study: loads the model, does the units with progress bars, and writes the record and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.finetune.report import PACKAGES
from benchmarks.finetune.run import find_device, make_folder
from benchmarks.quality import report
from benchmarks.quality.cells import Cells, write_json
from benchmarks.quality.method import Method
from benchmarks.quality.methods import all_methods
from benchmarks.quality.settings import Settings
from benchmarks.quality.study import Study
from benchmarks.quality.workshop import Workshop

RECORD, HYPERPARAMETERS = "quality.json", "hyperparameters.json"
SCHEMA = 1


def run(settings: Settings, console: Console) -> bool:
    """Does what the folder does not have yet, prints the tables and writes everything.

    Returns:
        False when Ctrl-C cut it short.

    Raises:
        UserError: data, model, device, methods or hyperparameters cannot be had.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    methods = select(settings.methods)
    make_folder(settings.out)
    cells = Cells(settings.out, settings.identity())
    with Workshop(settings, cells, device, console) as workshop:
        study = Study(settings, methods, cells, workshop.bench)
        study.forget_outdated()
        finished = workshop.do(study.units)
    record = record_of(study, finished, device)
    write(record, settings.out, console)
    return finished


def select(names: tuple[str, ...]) -> dict[str, Method]:
    """The methods of these names with their bases; all for none.

    Raises:
        UserError: There is no such method.
    """
    found = all_methods()
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"Unknown method '{unknown[0]}'; choose from {', '.join(found)}.")
    wanted = {base for name in names for base in (name, found[name].base)} if names else set(found)
    return {name: method for name, method in found.items() if name in wanted}


def record_of(study: Study, finished: bool, device: torch.device) -> dict[str, Any]:
    """Everything that the study knows."""
    settings = study.settings
    trainers = [method for method in study.methods.values() if method.base is None]
    hyperparameters = {
        task: {
            method.name: {
                "chosen": dict(study.chosen(task, method)),
                "tried": study.tried(task, method),
                "from": "search" if settings.search else "file",
            }
            for method in trainers
        }
        for task in settings.tasks
    }
    return {
        "schema": SCHEMA,
        "finished": finished,
        "settings": settings.record(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "methods": {
            name: {
                "title": method.title,
                "source": method.source,
                "base": method.base,
                "ablation": method.ablation,
            }
            for name, method in study.methods.items()
        },
        "hyperparameters": hyperparameters,
        "cells": study.results(),
        "environment": environment(PACKAGES),
    }


def write(record: dict[str, Any], out: Path, console: Console) -> None:
    """Writes record, hyperparameters and report to the folder, and prints the tables."""
    write_json(out / RECORD, record)
    chosen = {
        task: {name: entry["chosen"] for name, entry in methods.items()}
        for task, methods in record["hyperparameters"].items()
    }
    write_json(out / HYPERPARAMETERS, chosen)
    report.print_tables(console, record)
    report.write_report(record, out)
    console.print(f"Record and report: {out / RECORD}, {out / 'report.md'}", soft_wrap=True)
