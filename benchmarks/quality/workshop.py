"""A process that works on a study: its folder of finished parts, one model, progress bars, and Ctrl-C between steps."""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import UserError
from benchmarks.environment import write_record
from benchmarks.finetune.model import add_lora, load_model
from benchmarks.finetune.report import PACKAGES
from benchmarks.finetune.run import Progress, find_device, make_folder
from benchmarks.finetune.tasks import find_task
from benchmarks.finetune.train import Interrupted, InterruptGuard
from benchmarks.quality.bench import Bench, Content, Tensors
from benchmarks.quality.settings import Settings

WAIT_SECONDS = 1.0
Compute = Callable[[], tuple[Content, Tensors]]


class Cells:
    """A folder of cells, one file each: what was found, as JSON in the header, and tensors.

    What is there is not done again, and several processes may share the work.
    """

    def __init__(self, folder: Path, identity: Content) -> None:
        self.folder = folder / "cells"
        path, wanted = folder / "study.json", json.loads(json.dumps(identity))
        with self.lock("study"):
            if not path.exists():
                path.write_text(json.dumps(wanted), encoding="utf-8")
            begun = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in wanted if begun.get(key) != wanted[key]]:
            raise UserError(
                f"{folder} holds a study with other {', '.join(differing)} ({path.name}): "
                "give another --out, or delete it."
            )

    def _path(self, names: Sequence[str], suffix: str = ".safetensors") -> Path:
        return self.folder.joinpath(*names).with_name(f"{names[-1]}{suffix}")

    def lock(self, *names: str) -> FileLock:
        """A lock that one process at a time can hold; the system takes it from one that died."""
        path = self._path(names, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def read(self, *names: str) -> Content | None:
        """What a finished cell says; None if it is not finished."""
        path = self._path(names)
        return _content(path) if path.exists() else None

    def tensors(self, *names: str) -> Tensors:
        """The tensors of a finished cell, on the CPU."""
        return load_file(self._path(names))

    def get(self, names: Sequence[str], compute: Compute) -> Content:
        """What the cell of these names says, finished by `compute` if need be; Timeout if another process is at it."""
        if (found := self.read(*names)) is not None:
            return found
        with self.lock(*names).acquire(timeout=0):
            if (found := self.read(*names)) is None:  # whoever had the lock before may have finished it
                found, tensors = compute()
                part = self._path(names, ".part")
                save_file(tensors, part, {"content": json.dumps(found, allow_nan=False)})
                os.replace(part, self._path(names))  # nobody reads a half
        return found

    def forget_failures(self) -> None:
        """Has what failed in an earlier run done again."""
        for path in self.folder.rglob("*.safetensors"):
            if _content(path)["error"] is not None:
                path.unlink(missing_ok=True)


def _content(path: Path) -> Content:
    with safe_open(path, "pt") as file:
        content: Content = json.loads(file.metadata()["content"])
    return content


def key_of(hyper: Mapping[str, float]) -> str:
    """A name for hyperparameters, fit for a file."""
    text = ",".join(f"{name}={float(value)!r}" for name, value in sorted(hyper.items())) or "none"
    return text if len(text) <= 100 else hashlib.sha256(text.encode()).hexdigest()[:16]


class Workshop:
    """Opens a study's folder and works in it; the model is loaded when the first bench is asked for."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.device = find_device(settings.device)
        make_folder(settings.out)
        self.cells = Cells(settings.out, settings.identity())
        self.cells.forget_failures()
        self._guard, self._benches, self.progress = InterruptGuard(), dict[str, Bench](), Progress(console)
        self._whole = self.progress.add_task("study", total=None, note="")
        self._detail = self.progress.add_task("", total=None, note="")

    @cached_property
    def _model(self) -> tuple[peft.PeftModel, Any]:
        base, tokenizer = load_model(self.settings.model, device=self.device, in_8bit=self.settings.load_in_8bit)
        return add_lora(base, seed=0), tokenizer

    def bench(self, task: str) -> Bench:
        """The bench of a task."""
        if task not in self._benches:
            self._note("loading")
            amounts = self.settings.amounts
            self._benches[task] = Bench(find_task(task), amounts, *self._model, self._guard, self._note)
        return self._benches[task]

    def cell(self, names: Sequence[str], title: str, compute: Compute) -> Content:
        """What a cell says, done here if nobody has; one that failed says why."""

        def attempt() -> tuple[Content, Tensors]:
            self.progress.update(self._detail, description=title, note="", visible=True)
            try:
                found, tensors = compute()
            except (Interrupted, UserError):
                raise
            except Exception as error:  # a row of the table, not the end of the study
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                return {"error": reason, "traceback": traceback.format_exc()}, {}
            return {**found, "error": None}, tensors

        return self.cells.get(names, attempt)

    def do(self, parts: Sequence[Callable[[], object]]) -> bool:
        """Does parts in order, again those that wait for another process, until none is left; False after Ctrl-C."""
        left = list(parts)
        with self._guard:
            while left:
                waiting = []
                for part in left:
                    try:
                        self._guard.check()
                        part()
                    except Timeout:
                        waiting.append(part)
                    self.progress.update(self._whole, total=len(parts), completed=len(parts) - len(waiting))
                if len(waiting) == len(left):
                    time.sleep(WAIT_SECONDS)
                left = waiting
        self.progress.update(self._detail, visible=False)
        return not self._guard.interrupted

    def write(self, name: str, finished: bool, content: Content, **more: Any) -> Content:
        """Writes a record, with how far it came, the settings with `more`, and what it ran on; returns it."""
        about = {
            "schema": 1,
            "finished": finished,
            "settings": {**self.settings.record(), **more},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "threads": torch.get_num_threads(),
        }
        path = self.settings.out / name
        with self.cells.lock("record"):  # for processes that end at the same time
            write_record(path, {**about, **content}, PACKAGES)
            record: Content = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _note(self, text: str) -> None:
        self.progress.update(self._detail, note=text)
