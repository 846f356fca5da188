"""The main job: the same finetuning once per optimizer, judged alike, with everything saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import progress as bars
from rich.console import Console
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import write_record
from benchmarks.finetune import compare, data, model, report, train
from benchmarks.finetune.scorers import scorer_of
from benchmarks.finetune.settings import RUN, Settings
from benchmarks.finetune.tasks import PUBLISHED, Task
from benchmarks.tables import show
from ivon_kernels import IVON
from ivon_kernels.predict import metrics
from ivon_kernels.predict.temperature import best_temperature, scale
from ivon_kernels.report.page import draw_reliability

TITLES = {"adamw": "AdamW", "ivon": "IVON"}
SCALED = ", scaled"
SHARES = 10  # of a piece of work, one line each where there is no terminal to draw bars on
RECORD = "results.json"
BATCH_SIZE = 32  # at prediction


class Job:
    """One run of the main job."""

    def __init__(self, task: Task, settings: Settings, console: Console) -> None:
        """Loads data and model; UserError if one of them or the device cannot be had."""
        self.settings, self.console = settings, console
        self.guard, self.progress = train.InterruptGuard(), Progress(console)
        self.device = find_device(settings.device)
        wanted = ("split", "train_size", "test_size", "max_words", "seed")
        examples = data.load_dataset(task, **{name: getattr(settings, name) for name in wanted})
        # The hub's tasks keep no examples apart, and who judges on the validation split has no other to fit on.
        fitted = settings.validation_size if settings.split == "test" and not task.hub else 0
        kept: dict[str, Any] = {
            "split": "validation",
            "train_size": 1,
            "test_size": fitted,
            "max_words": settings.max_words,
        }
        validation = data.load_dataset(task, **kept).test if fitted else []
        make_folder(settings.out)
        with console.status("Loading the model"):
            base, tokenizer = model.load_model(settings.model, device=self.device, in_8bit=settings.load_in_8bit)
        self.model = model.add_lora(base, seed=settings.seed)
        self.scorer = scorer_of(task, self.model, tokenizer, examples.train[0])
        self.train_set, self.test_set = (self._encode(tokenizer, part) for part in examples)
        self.validation = self._encode(tokenizer, validation) if validation else None
        self.start = [p.detach().clone() for p in train.trainable(self.model)]
        self.rows: list[dict[str, Any]] = []
        self.probabilities: dict[str, Tensor] = {}
        self.trainings: dict[str, train.Training] = {}

    def _encode(self, tokenizer: Any, examples: list[data.Example]) -> data.EncodedExamples:
        keep = self.settings.prompts == PUBLISHED
        return data.EncodedExamples(examples, tokenizer, self.settings.max_tokens, self.device, keep_start=keep)

    def run(self) -> bool:
        """Trains, evaluates and saves, optimizer by optimizer; False when Ctrl-C cut it short.

        Every optimizer starts from the same adapter values and sees the same batches and the same dropout.
        """
        with self.guard, self.progress:
            for name in self.settings.optimizers:
                self.guard.check()
                self._train(name)
                self.guard.check()
                self._evaluate(name)
        self._report()
        return not self.guard.interrupted

    def _train(self, name: str) -> None:
        settings, parameters = self.settings, train.trainable(self.model)
        with torch.no_grad():
            for parameter, value in zip(parameters, self.start, strict=True):
                parameter.copy_(value)
        bar = self.progress.add_task(f"{TITLES[name]}: training", total=settings.steps, note="")
        self.trainings[name] = train.train(
            train.make_optimizer(name, parameters, settings, len(self.train_set)),
            self.model,
            lambda batch: train.cross_entropy(self.scorer, batch),
            self.train_set.epochs(settings.batch_size, settings.seed),
            steps=settings.steps,
            seed=settings.seed,
            guard=self.guard,
            on_step=lambda loss: self.progress.update(bar, advance=1, note=f"loss {loss:.3f}"),
        )
        folder = settings.out / name
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / RUN).write_text(json.dumps(settings.record(), indent=2) + "\n", encoding="utf-8")
        optimizer = self.trainings[name].optimizer
        if isinstance(optimizer, IVON):
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            optimizer.posterior(self.model).save(folder)

    def _evaluate(self, name: str) -> None:
        optimizer = self.trainings[name].optimizer
        samples = self.settings.samples if isinstance(optimizer, IVON) else 0
        # A scaled mean is no row: what the validation split gives the samples is what it would be for.
        both = [self.test_set] if self.validation is None else [self.test_set, self.validation]
        total = sum(map(len, both)) * (samples or 1) + (len(self.test_set) if samples else 0)
        bar = self.progress.add_task(f"{TITLES[name]}: evaluation", total=total, note="")
        if not isinstance(optimizer, IVON):
            self._judge(TITLES[name], name, *[self._predict(part, bar) for part in both])
            return
        self._judge("IVON, mean", name, self._predict(self.test_set, bar))
        averages = [torch.zeros(())] * len(both)
        for k in range(samples):
            with optimizer.sampled_params(sample=k):
                averages = [
                    average + self._predict(part, bar) / samples for average, part in zip(averages, both, strict=True)
                ]
        self._judge(f"IVON, {samples} samples", name, *averages)

    @torch.inference_mode()
    def _predict(self, examples: data.EncodedExamples, bar: bars.TaskID) -> Tensor:
        """Class probabilities under the weights as they are, float64 `[examples, classes]`."""
        self.model.eval()
        index: list[int] = []
        found: list[Tensor] = []
        for batch in examples.in_length_order(BATCH_SIZE):
            self.guard.check()
            found.append(self.scorer(batch).double().softmax(1).cpu())
            index += batch.index
            self.progress.advance(bar, len(batch.index))
        return torch.cat(found)[torch.tensor(index).argsort()]

    def _judge(self, title: str, name: str, probabilities: Tensor, validation: Tensor | None = None) -> None:
        """Adds a row, and one with the temperature that the validation split gives where it was predicted too."""
        self._add(title, name, probabilities)
        if validation is not None and self.validation is not None:
            temperature = best_temperature(validation.log(), self.validation.labels)
            self._add(f"{title}{SCALED}", name, scale(probabilities.log(), temperature), temperature)

    def _add(self, title: str, name: str, probabilities: Tensor, temperature: float | None = None) -> None:
        labels, training = self.test_set.labels, self.trainings[name]
        row = {
            "name": title,
            "optimizer": name,
            "scores": report.scores_record(metrics.evaluate(probabilities, labels, self.test_set.votes)),
            "reliability": asdict(metrics.reliability(probabilities, labels)),
            "temperature": temperature,
            "train_seconds": training.seconds,
            "optimizer_ms": training.optimizer_ms,
        }
        self.rows.append(row)
        self.probabilities[title] = probabilities

    def _report(self) -> None:
        out, settings, console = self.settings.out, self.settings, self.console
        baseline, labels = TITLES["adamw"], self.test_set.labels
        compared = compare.differences(self.probabilities, baseline, labels) if len(self.trainings) == 2 else {}
        said = compare.conclusion(compared, baseline, len(labels)) if compared else None
        record = {
            "finished": not self.guard.interrupted,
            "settings": settings.record(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "training": {name: training.record() for name, training in self.trainings.items()},
            "rows": self.rows,
            "less_adamw": compare.record(compared),
            "conclusion": said,
        }
        write_record(out / RECORD, record, report.PACKAGES)
        if self.rows:
            title = f"{settings.task}, {len(self.train_set)} training examples"
            frame = report.table(self.rows, {**report.SCORES, "vote_kl": "raters"})
            frame["training"] = [f"{row['train_seconds']:.1f} s" for row in self.rows]
            frame["opt./step"] = [f"{row['optimizer_ms']:.2f} ms" for row in self.rows]
            show(console, title, frame)
            if said is not None:
                show(console, f"less {baseline} (95% interval; * leaves out zero)", compare.table(compared))
                console.print(f"{said}\n", highlight=False)
            self._explain()
            draw_reliability(out / "reliability.png", self.probabilities, labels, title=title)
        for name, done in self.trainings.items():
            console.print(f"{TITLES[name]} adapter after {done.steps} steps: {out / name}", soft_wrap=True)
        console.print(f"Results: {out / RECORD}", soft_wrap=True)

    def _explain(self) -> None:
        count = len(self.test_set)
        error = report.standard_error(self.rows, count)
        self.console.print(f"{count} test examples: one standard error of the accuracy is {error:.3f}.")
        if self.validation is not None:
            self.console.print(f"scaled: by a temperature fitted to {len(self.validation)} validation examples.")
        if self.test_set.votes is not None:
            self.console.print("raters: KL divergence of the predictions from the raters' votes, in nats.")


def find_device(name: str) -> torch.device:
    """The device called `name`, or UserError; "auto" is a CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Cannot use the device '{name}': {str(error).splitlines()[0]}") from error
    return device


def make_folder(out: Path) -> None:
    """Makes the folder of `--out`, or UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to --out {out}: {error.strerror}.") from error


class Progress(bars.Progress):
    """Bars with a field `note`, above which the console may print; a line for each tenth where there is no terminal."""

    def __init__(self, console: Console) -> None:
        how_far = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
        more = (bars.TextColumn("{task.fields[note]}"), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
        super().__init__(*how_far, *more, console=console)

    def update(self, task_id: bars.TaskID, **changes: Any) -> None:
        """As rich's."""
        super().update(task_id, **changes)
        self._say(task_id, changes.get("advance", 0.0))

    def advance(self, task_id: bars.TaskID, advance: float = 1) -> None:
        """As rich's."""
        super().advance(task_id, advance)
        self._say(task_id, advance)

    def _say(self, task_id: bars.TaskID, done: float) -> None:
        if self.console.is_terminal or not done:
            return
        task = self._tasks[task_id]
        total = task.total or 1
        if int(task.completed * SHARES / total) > int((task.completed - done) * SHARES / total):
            took = f"{task.elapsed or 0.0:.0f} s"
            self.console.print(f"{task.description} {task.completed:.0f}/{total:.0f} {task.fields['note']} {took}")
