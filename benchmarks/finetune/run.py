"""The main job: the same finetuning once per optimizer, judged alike, with everything saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from benchmarks import UserError
from benchmarks.finetune import data, evaluate, model, report, train
from benchmarks.finetune.settings import RUN, Settings
from benchmarks.finetune.tasks import Task
from ivon_kernels import IVON
from ivon_kernels.predict import metrics
from ivon_kernels.report.page import draw_reliability

TITLES = {"adamw": "AdamW", "ivon": "IVON"}


class Job:
    """One run of the main job."""

    def __init__(self, task: Task, settings: Settings, console: Console) -> None:
        """Loads data and model.

        Raises:
            UserError: the data, the model or the device cannot be had.
        """
        self.settings, self.console = settings, console
        self.device = find_device(settings.device)
        examples = data.load_dataset(
            task,
            split=settings.split,
            train_size=settings.train_size,
            test_size=settings.test_size,
            max_words=settings.max_words,
            seed=settings.seed,
        )
        make_folder(settings.out)
        with console.status("Loading the model"):
            base, tokenizer = model.load_model(settings.model, device=self.device, in_8bit=settings.load_in_8bit)
        self.model = model.add_lora(base, seed=settings.seed)
        self.scorer = model.LabelScorer(self.model, tokenizer, task.label_words, suffix=last_word(examples.train[0]))
        self.examples = examples.test
        encode = (tokenizer, settings.max_tokens, self.device)
        self.train_set = data.EncodedExamples(examples.train, *encode)
        self.test_set = data.EncodedExamples(examples.test, *encode)
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.rows: list[report.Row] = []
        self.probabilities: dict[str, Tensor] = {}
        self.trainings: dict[str, train.Training] = {}

    def run(self) -> bool:
        """Trains, evaluates and saves, optimizer by optimizer; False when Ctrl-C cut it short.

        Every optimizer starts from the same adapter values and sees the same batches and the same dropout.
        """
        with train.InterruptGuard() as guard, progress_bars(self.console) as progress:
            try:
                for name in self.settings.optimizers:
                    guard.check()
                    self._train(name, guard, progress)
                    guard.check()
                    self._evaluate(name, guard, progress)
            except train.Interrupted:
                finished = False
            else:
                finished = True
        self._report(finished)
        return finished

    def _train(self, name: str, guard: train.InterruptGuard, progress: Progress) -> None:
        self._restore_start()
        bar = progress.add_task(f"{TITLES[name]}: training", total=self.settings.steps, note="")
        optimizer = train.make_optimizer(name, train.trainable(self.model), self.settings)
        training = train.train(
            optimizer,
            self.model,
            lambda batch: train.cross_entropy(self.scorer, batch),
            self.train_set.epochs(self.settings.batch_size, self.settings.seed),
            steps=self.settings.steps,
            seed=self.settings.seed,
            guard=guard,
            on_step=lambda loss: progress.update(bar, advance=1, note=f"loss {loss:.3f}"),
        )
        self.trainings[name] = training
        folder = self.settings.out / name
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / RUN).write_text(json.dumps(self.settings.record(), indent=2) + "\n", encoding="utf-8")
        if isinstance(training.optimizer, IVON):
            torch.save(training.optimizer.state_dict(), folder / "optimizer.pt")
            training.optimizer.posterior(self.model).save(folder)

    def _restore_start(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self.start[name])

    def _evaluate(self, name: str, guard: train.InterruptGuard, progress: Progress) -> None:
        optimizer = self.trainings[name].optimizer
        samples = self.settings.samples if isinstance(optimizer, IVON) else 0
        total = (1 + samples) * len(self.test_set)
        bar = progress.add_task(f"{TITLES[name]}: evaluation", total=total, note="")

        def advance(examples: int) -> None:
            progress.update(bar, advance=examples)

        def predict() -> Tensor:
            return evaluate.predict(self.model, self.scorer, self.test_set, guard, advance)

        self._add_row("IVON, mean" if samples else TITLES[name], name, predict())
        if isinstance(optimizer, IVON):
            probabilities = torch.zeros(())
            for k in range(samples):
                with optimizer.sampled_params(sample=k):
                    probabilities = probabilities + predict() / samples
            self._add_row(f"IVON, {samples} samples", name, probabilities)

    def _add_row(self, title: str, name: str, probabilities: Tensor) -> None:
        training = self.trainings[name]
        scores = evaluate.score(probabilities, self.examples)
        curve = metrics.reliability(probabilities, evaluate.labels_of(self.examples))
        self.probabilities[title] = probabilities
        self.rows.append(report.Row(title, name, scores, curve, training.seconds, training.optimizer_ms))

    def _report(self, finished: bool) -> None:
        out, settings = self.settings.out, self.settings
        title = f"{settings.task}, {len(self.train_set)} training examples"
        results: dict[str, Any] = {
            "finished": finished,
            "settings": settings.record(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "training": {
                name: {"steps": t.steps, "seconds": t.seconds, "optimizer_ms": t.optimizer_ms, "losses": t.losses}
                for name, t in self.trainings.items()
            },
        }
        report.write_results(out / "results.json", results, self.rows)
        if self.rows:
            report.print_table(self.console, self.rows, title=title, examples=len(self.examples))
            labels = evaluate.labels_of(self.examples)
            draw_reliability(out / "reliability.png", self.probabilities, labels, title=title)
        for name, training in self.trainings.items():
            self.console.print(f"{TITLES[name]} adapter after {training.steps} steps: {out / name}", soft_wrap=True)
        self.console.print(f"Results: {out / 'results.json'}", soft_wrap=True)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a CUDA device where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Cannot use the device '{name}': {str(error).splitlines()[0]}") from error
    return device


def make_folder(out: Path) -> None:
    """Makes the folder of `--out`.

    Raises:
        UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to --out {out}: {error.strerror}.") from error


def last_word(example: data.Example) -> str:
    """The end of every prompt, after which the label words come."""
    return example.prompt.split()[-1]


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Bars with a field `note`, above which the console may print."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress
