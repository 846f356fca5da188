"""The evaluation: a saved adapter and its posterior in a new process, judged domain by domain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import write_record
from benchmarks.finetune import data, report
from benchmarks.finetune.model import load_model
from benchmarks.finetune.run import Progress, find_device, make_folder
from benchmarks.finetune.scorers import scorer_of
from benchmarks.finetune.settings import Settings
from benchmarks.finetune.tasks import PUBLISHED, Task, domains
from benchmarks.finetune.train import InterruptGuard
from benchmarks.tables import show
from ivon_kernels.posterior import Posterior, PosteriorFileError, Sweep, predict, sweep_pruning, sweep_temperature
from ivon_kernels.predict import metrics
from ivon_kernels.report.page import report as write_page

BATCH_SIZE = 12  # sentences; with 10 samples in one pass these are 120 rows. Ctrl-C waits for the end of one
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
DIAL_SAMPLES = 4  # that the temperature is chosen by: they share their noise, so few tell temperatures apart
RECORD = "evaluate.json"


class Examples:
    """One task's examples as `predict` reads them: batches, short sentences first; as often as wanted."""

    def __init__(self, encoded: data.EncodedExamples, on_batch: Callable[[], None]) -> None:
        self._encoded, self._on_batch = encoded, on_batch
        order = [i for batch in encoded.in_length_order(BATCH_SIZE) for i in batch.index]
        self.labels, self.votes = encoded.labels[order], None if encoded.votes is None else encoded.votes[order]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._encoded.in_length_order(BATCH_SIZE):
            self._on_batch()
            yield {**batch.inputs, "labels": batch.labels}


class Evaluation:
    """One run of the command."""

    def __init__(self, folder: Path, task: Task, settings: Settings, console: Console) -> None:
        """Loads data, posterior and model; UserError if one cannot be had, or they do not fit together."""
        self.folder, self.task, self.settings, self.console = folder, task, settings, console
        self.guard, self.progress = InterruptGuard(), Progress(console)
        self.device = find_device(settings.device)
        self.examples = {t.name: self._load(t, settings.split) for t in domains(task)}
        # The hub's tasks are judged on their published validation split: there is no other to choose by.
        self.validation = None if task.hub else self._load(task, "validation")
        try:
            posterior = Posterior.load(folder)
        except (FileNotFoundError, PosteriorFileError) as error:
            raise UserError(f"Cannot read the posterior: {error}.") from error
        make_folder(settings.out)
        with console.status("Loading the model"):
            self.model, self.tokenizer = load_adapted(folder, settings, self.device, posterior)
        self.posterior = posterior.to(self.device)
        self.scorer = scorer_of(task, self.model, self.tokenizer, self.examples[task.name][0])
        self.dials: list[Sweep] = []
        self.domains: list[dict[str, Any]] = []

    def run(self) -> bool:
        """Chooses the dials, judges every domain and writes it all; False when Ctrl-C cut it short."""
        with self.guard, self.progress:
            methods = self._methods()
            for name in self.examples:
                self.guard.check()
                self._judge(name, methods)
        self._finish()
        return not self.guard.interrupted

    def _load(self, task: Task, split: str) -> list[data.Example]:
        test = data.load_dataset(task, split=split, train_size=1, max_words=self.settings.max_words).test
        return test[: self.settings.test_size]

    def _encode(self, examples: list[data.Example], title: str, readings: int) -> Examples:
        """The examples, with a progress bar; reading them raises Interrupted before a batch after Ctrl-C."""
        bar = self.progress.add_task(title, total=readings * -(-len(examples) // BATCH_SIZE), note="")

        def on_batch() -> None:
            self.guard.check()
            self.progress.advance(bar)

        keep = self.settings.prompts == PUBLISHED
        encoded = data.EncodedExamples(examples, self.tokenizer, self.settings.max_tokens, self.device, keep_start=keep)
        return Examples(encoded, on_batch)

    def _methods(self) -> dict[str, tuple[Posterior, int]]:
        """The ways to predict: with which posterior, and how many samples of it; 0 predicts at the mean.

        The dials of the last two are chosen by NLL on the validation split. Pruning is judged at the mean: there it
        costs nothing at prediction time.
        """
        samples = self.settings.samples
        methods = {"mean": (self.posterior, 0), f"{samples} samples": (self.posterior, samples)}
        if self.validation is None:
            return methods
        examples = self._encode(self.validation, "choosing dials", len(TEMPERATURES) + len(FRACTIONS))
        given: Any = {"model": self.model, "inputs": examples, "score": self.scorer.score, "progress": False}
        few = min(samples, DIAL_SAMPLES)
        self.dials.append(sweep_temperature(self.posterior, temperatures=TEMPERATURES, samples=few, **given))
        self.dials.append(sweep_pruning(self.posterior, fractions=FRACTIONS, samples=0, **given))
        for dial in self.dials:
            chosen = f"{dial.dial} {dial.best:g}: the best NLL on {len(self.validation)} validation examples"
            self.console.print(f"{chosen}, of {', '.join(f'{value:g}' for value in dial.values)}", soft_wrap=True)
        heat, cut = self.dials
        methods[f"tempered x{heat.best:g}, {samples} samples"] = (heat.posterior, samples)
        methods[f"pruned {cut.best:.0%}, mean"] = (cut.posterior, 0)
        return methods

    def _judge(self, name: str, methods: dict[str, tuple[Posterior, int]]) -> None:
        """Judges every method on one domain; prints its table and writes its page."""
        examples = self._encode(self.examples[name], name, len(methods))
        # Without advice on samples that agree: the table has the mutual information, and a row for the mean.
        options: dict[str, Any] = {"score": self.scorer.score, "progress": False, "advise": False}
        predictions = {
            title: predict(posterior, self.model, examples, samples=samples, **options)
            for title, (posterior, samples) in methods.items()
        }
        labels, votes, shift = examples.labels, examples.votes, name != self.task.name
        rows = [
            {
                "name": title,
                "scores": report.scores_record(metrics.evaluate(found.probabilities, labels, votes)),
                "mutual_information": found.mutual_information.mean().item(),
            }
            for title, found in predictions.items()
        ]
        entropy = None if votes is None else metrics.vote_entropy(votes)
        domain = {"task": name, "shift": shift, "examples": len(labels), "vote_entropy": entropy, "rows": rows}
        self.domains.append(domain)
        frame = report.table(rows, report.OF_POSTERIORS)
        if entropy is not None:
            frame.loc["votes' own entropy"] = {"votes": f"{entropy:.3f}"}
        title = f"{report.place(domain)}, {len(labels)} examples"
        show(self.console, title, frame.fillna(""))
        # The pictures of the posterior are on one page: it is the same in every domain.
        posterior = None if shift else self.posterior
        write_page(self.settings.out / name, predictions, labels, posterior, votes=votes, title=title)

    def _finish(self) -> None:
        """Writes the record and the dials' picture, and says what the tables' columns are."""
        out, show_line = self.settings.out, self.console.print
        record = {
            "finished": not self.guard.interrupted,
            "settings": {"folder": str(self.folder), **self.settings.record()},
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "dials": [
                {name: getattr(dial, name) for name in ("dial", "best", "criterion", "values")}
                | {"scores": [report.scores_record(scores) for scores in dial.scores]}
                for dial in self.dials
            ],
            "domains": self.domains,
        }
        write_record(out / RECORD, record, report.PACKAGES)
        if self.dials:
            figure = Figure(figsize=(4.6 * len(self.dials), 3.8), layout="constrained")
            for dial, axis in zip(self.dials, figure.subplots(1, len(self.dials), squeeze=False)[0], strict=True):
                dial.plot(axis).set_title(f"{dial.dial}, validation split")
            figure.savefig(out / "dials.png", dpi=150)
        if self.domains:
            error = max(report.standard_error(domain["rows"], domain["examples"]) for domain in self.domains)
            show_line(f"One standard error of an accuracy is up to {error:.3f}.")
            show_line("AUROC: does confidence tell right from wrong answers; 0.5 is not at all.")
        if any(domain["vote_entropy"] is not None for domain in self.domains):
            show_line("votes: cross-entropy of the predictions to the raters' votes, in nats.")
        show_line(f"Record, pages and pictures: {out}", soft_wrap=True)


def load_adapted(
    folder: Path, settings: Settings, device: torch.device, posterior: Posterior
) -> tuple[peft.PeftModel, Any]:
    """The base model with the adapter, and its tokenizer; UserError if they are not those of the training."""
    base, tokenizer = load_model(settings.model, device=device, in_8bit=settings.load_in_8bit)
    mismatch = f"The adapter in {folder} was not trained on this model"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT: names that transformers is changing; missing keys are seen below
            adapted = peft.PeftModel.from_pretrained(base, folder, torch_device=str(device))
        posterior.parameters_of(adapted)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{mismatch}: {' '.join(str(error).split())}") from error
    more = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - posterior.keys()
    if more:
        raise UserError(f"{mismatch}: its {min(more)} is not in the posterior; name the right one with --model.")
    return adapted, tokenizer
