"""A process that does units of work: one model, a bench for each task, progress bars, and Ctrl-C between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import peft
import torch
from rich.console import Console

from benchmarks.finetune.model import add_lora, load_model
from benchmarks.finetune.run import progress_bars
from benchmarks.finetune.tasks import find_task
from benchmarks.finetune.train import Interrupted, InterruptGuard
from benchmarks.quality.bench import Bench
from benchmarks.quality.cells import Cells
from benchmarks.quality.settings import Settings
from benchmarks.quality.units import Unit, forget_failures, unfinished, work


class Workshop:
    """Does units; the model is loaded when the first one asks for a bench."""

    def __init__(self, settings: Settings, cells: Cells, device: torch.device, console: Console) -> None:
        self._settings, self._cells, self._device = settings, cells, device
        self._guard = InterruptGuard()
        self._bars = progress_bars(console)
        self._model: tuple[peft.PeftModel, Any] | None = None
        self._benches: dict[str, Bench] = {}

    def __enter__(self) -> Workshop:
        self._progress = self._bars.__enter__()
        self._whole = self._progress.add_task("study", total=None, note="")
        self._detail = self._progress.add_task("", total=None, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.update(self._detail, visible=False)
        self._bars.__exit__(kind, error, traceback)

    def bench(self, task: str) -> Bench:
        """The bench of a task.

        Raises:
            UserError: Model or data cannot be had.
        """
        if task not in self._benches:
            self._note("loading")
            if self._model is None:
                settings = self._settings
                base, tokenizer = load_model(settings.model, device=self._device, in_8bit=settings.load_in_8bit)
                self._model = add_lora(base, seed=0), tokenizer
            self._benches[task] = Bench(
                find_task(task), self._settings.amounts, *self._model, guard=self._guard, note=self._note
            )
        return self._benches[task]

    def do(self, units: Sequence[Unit]) -> bool:
        """Do what is left of these units; False when Ctrl-C cut it short."""
        forget_failures(units, self._cells)
        done = len(units) - len(unfinished(units, self._cells))
        self._progress.update(self._whole, total=len(units), completed=done)
        with self._guard:
            try:
                work(units, self._cells, self._begins, lambda left: self._ends(len(units) - left))
            except Interrupted:
                return False
        return True

    def _note(self, text: str) -> None:
        self._progress.update(self._detail, note=text)

    def _begins(self, unit: Unit) -> None:
        self._progress.update(self._detail, description=unit.title, note="")

    def _ends(self, done: int) -> None:
        self._progress.update(self._whole, completed=done)
