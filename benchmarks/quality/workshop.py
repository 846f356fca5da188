"""A process that works on a study: one model, a bench for each task, progress bars, and Ctrl-C between two steps."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import peft
import torch
from filelock import Timeout
from rich.console import Console
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.finetune.model import add_lora, load_model
from benchmarks.finetune.report import PACKAGES
from benchmarks.finetune.run import find_device, make_folder, progress_bars
from benchmarks.finetune.tasks import find_task
from benchmarks.finetune.train import Interrupted, InterruptGuard
from benchmarks.quality.bench import Bench
from benchmarks.quality.cells import Cells, Compute, Content
from benchmarks.quality.settings import Settings

WAIT_SECONDS = 1.0


class Workshop:
    """Opens a study's folder and works in it; the model is loaded when the first bench is asked for.

    Raises:
        UserError: There is no such device or folder, or it holds another study.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings, self._console = settings, console
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.device = find_device(settings.device)
        make_folder(settings.out)
        self.cells = Cells(settings.out, settings.identity())
        self._guard = InterruptGuard()
        self._model: tuple[peft.PeftModel, Any] | None = None
        self._benches: dict[str, Bench] = {}

    def __enter__(self) -> Workshop:
        self.cells.forget_failures()
        self._stack = ExitStack()
        self._progress = self._stack.enter_context(progress_bars(self._console))
        self._whole = self._progress.add_task("study", total=None, note="")
        self._detail = self._progress.add_task("", total=None, note="")
        self._stack.callback(self._progress.update, self._detail, visible=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def bench(self, task: str) -> Bench:
        """The bench of a task.

        Raises:
            UserError: Model or data cannot be had.
        """
        if task not in self._benches:
            self._note("loading")
            settings = self._settings
            if self._model is None:
                base, tokenizer = load_model(settings.model, device=self.device, in_8bit=settings.load_in_8bit)
                self._model = add_lora(base, seed=0), tokenizer
            self._benches[task] = Bench(find_task(task), settings.amounts, *self._model, self._guard, self._note)
        return self._benches[task]

    def cell(self, names: tuple[str, ...], title: str, compute: Compute) -> Content:
        """What a cell says, done here if nobody has; one that failed says why.

        Raises:
            Interrupted: Ctrl-C was pressed.
            UserError: It needs something that cannot be had.
            filelock.Timeout: Another process is at it.
        """

        def attempt() -> tuple[Content, dict[str, Tensor]]:
            self._progress.update(self._detail, description=title, note="")
            try:
                return compute()
            except (Interrupted, UserError):
                raise
            except Exception as error:  # a row of the table, not the end of the study
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                return {"error": reason, "traceback": traceback.format_exc()}, {}

        return self.cells.get(names, attempt)

    def do(self, parts: Sequence[Callable[[], object]]) -> bool:
        """Does parts in their order, and again those that wait for a cell of another process, until none is left.

        Returns:
            False when Ctrl-C cut it short.
        """
        left = list(parts)
        with self._guard:
            while left:
                waiting = []
                for part in left:
                    try:
                        self._guard.check()
                        part()
                    except Interrupted:
                        return False
                    except Timeout:
                        waiting.append(part)
                    self._progress.update(self._whole, total=len(parts), completed=len(parts) - len(waiting))
                if len(waiting) == len(left):
                    time.sleep(WAIT_SECONDS)
                left = waiting
        return True

    def about(self, finished: bool, more: Content) -> Content:
        """The head of a record: how far it came, the settings with `more`, and what it ran on."""
        return {
            "schema": 1,
            "finished": finished,
            "settings": {**self._settings.record(), **more},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "threads": torch.get_num_threads(),
            "environment": environment(PACKAGES),
        }

    def _note(self, text: str) -> None:
        self._progress.update(self._detail, note=text)
