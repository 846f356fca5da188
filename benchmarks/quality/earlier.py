"""What an earlier run has left of a study: its record, which is enough to go on from where the cells are gone.

A folder's cells hold adapters and probabilities, gigabytes in the end; the record of a study of passes is small enough
to be committed. What it has is not done again, and the record of the run that goes on holds both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.quality.passes import SCHEMA
from benchmarks.quality.settings import Settings

Content = dict[str, Any]
_UNITED = ("tasks", "methods", "seeds")  # of the settings: what a later run may add to


@dataclass(frozen=True)
class Earlier:
    """A record that a study goes on from; empty where there is none."""

    record: Content

    @staticmethod
    def read(path: Path, settings: Settings) -> Earlier:
        """The record at `path`, if there is one of this kind; UserError if its study was another one."""
        if not settings.amounts.passes or not path.exists():
            return Earlier({})
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read the record {path}: {error}. Delete it, or give another --out.") from error
        if record.get("schema") != SCHEMA:
            raise UserError(f"{path} is a record of another kind: give another --out, or delete it.")
        begun, wanted = record["settings"], json.loads(json.dumps(settings.identity()))
        amounts = {key: value for key, value in wanted["amounts"].items() if value is not None}  # what tasks say varies
        begun = {**begun, "amounts": {key: begun["amounts"].get(key) for key in amounts}}
        wanted = {**wanted, "amounts": amounts}
        kept = [key for key in wanted if key != "hyperparameters"]
        if differing := [key for key in kept if begun.get(key) != wanted[key]]:
            raise UserError(
                f"{path} is the record of a study with other {', '.join(differing)}: give another --out, or delete it."
            )
        return Earlier(record)

    def tried(self, task: str, method: str, hyper: Mapping[str, float]) -> Content | None:
        """What a candidate's trial has found on the validation split."""
        for about in self.record.get("hyperparameters", {}).get(task, {}).get(method, {}).get("tried", ()):
            if about["hyper"] == dict(hyper) and about["error"] is None:
                return dict(about)
        return None

    def judged(self, task: str, method: str, seed: int, hyper: Mapping[str, float]) -> Content | None:
        """What a method has scored, trained with these hyperparameters."""
        for cell in self.record.get("cells", ()):
            same = (cell["task"], cell["method"], cell["seed"]) == (task, method, seed)
            if same and cell["hyper"] == dict(hyper) and cell["error"] is None:
                return dict(cell)
        return None

    def joined(self, content: Content, settings: Content) -> Content:
        """What was found now, over what was found before; `settings` are those of the run that goes on."""
        if not self.record:
            return content
        before, now = self.record, {_key(cell): cell for cell in content["cells"]}
        united = {key: _union(before["settings"][key], settings[key]) for key in _UNITED}
        cells = {**{_key(cell): cell for cell in before["cells"]}, **now}
        methods = {**before["methods"], **content["methods"]}
        known = {**united, "methods": _union(united["methods"], methods)}  # one that is asked for may need another
        order = sorted(
            cells, key=lambda key: tuple(known[name].index(part) for name, part in zip(_UNITED, key, strict=True))
        )
        chosen = {
            task: {
                **before["hyperparameters"].get(task, {}),
                **content["hyperparameters"].get(task, {}),
            }
            for task in united["tasks"]
        }
        return {
            **content,
            "settings": {**settings, **united},
            "methods": methods,
            "hyperparameters": chosen,
            "cells": [cells[key] for key in order],
            "domains": {**before["domains"], **content["domains"]},
            "earlier": [*before.get("earlier", ()), before["environment"]],  # of the runs that found the rest
        }


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["task"], cell["method"], cell["seed"]


def _union(before: list[Any], now: Any) -> list[Any]:
    return [*before, *(each for each in now if each not in before)]
