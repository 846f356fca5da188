"""The evaluation: a saved adapter and its posterior in a new process, judged domain by domain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks import UserError
from benchmarks.evaluate import report
from benchmarks.evaluate.settings import Settings, domains
from benchmarks.finetune import data
from benchmarks.finetune.evaluate import labels_of, votes_of
from benchmarks.finetune.model import LabelScorer, load_model
from benchmarks.finetune.run import find_device, last_word, make_folder, progress_bars
from benchmarks.finetune.tasks import Task
from benchmarks.finetune.train import Interrupted, InterruptGuard
from ivon_kernels.posterior import Posterior, PosteriorFileError
from ivon_kernels.posterior.sweeps import Sweep, sweep_pruning, sweep_temperature
from ivon_kernels.predict.prediction import Prediction, predict
from ivon_kernels.report.page import report as write_page

BATCH_SIZE = 12
"""Sentences in a batch; with 10 samples in one pass these are 120 rows. Ctrl-C waits for the end of one."""
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
DIAL_SAMPLES = 4
"""Samples that the temperature is chosen by: they share their noise, so few tell temperatures apart."""
RECORD = "evaluate.json"


@dataclass(frozen=True)
class Method:
    """One way of predicting with a posterior."""

    name: str
    samples: int
    """0 predicts at the mean."""
    temperature: float = 1.0
    pruned: float = 0.0

    @property
    def key(self) -> tuple[int, float, float]:
        """Equal for methods that give the same predictions."""
        return self.samples, self.temperature, self.pruned

    def of(self, posterior: Posterior) -> Posterior:
        """The posterior that this method predicts with."""
        if self.temperature != 1:
            posterior = posterior.tempered(self.temperature)
        return posterior.pruned(self.pruned) if self.pruned else posterior


class Examples:
    """One task's examples as `predict` reads them: batches, short sentences first; as often as wanted."""

    def __init__(
        self,
        examples: list[data.Example],
        encoded: data.EncodedExamples,
        guard: InterruptGuard,
        advance: Callable[[], None],
    ) -> None:
        self._encoded, self._guard, self._advance = encoded, guard, advance
        in_order = [examples[i] for batch in encoded.in_length_order(BATCH_SIZE) for i in batch.index]
        self.labels, self.votes = labels_of(in_order), votes_of(in_order)

    def __len__(self) -> int:
        return -(-len(self._encoded) // BATCH_SIZE)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Raises Interrupted before a batch if Ctrl-C was pressed."""
        for batch in self._encoded.in_length_order(BATCH_SIZE):
            self._guard.check()
            yield {"input_ids": batch.input_ids, "last": batch.last, "labels": batch.labels}
            self._advance()


class Evaluation:
    """One run of the command."""

    def __init__(self, task: Task, settings: Settings, console: Console) -> None:
        """Loads data, posterior and model.

        Raises:
            UserError: one of them cannot be had, or they do not fit together.
        """
        self.task, self.settings, self.console = task, settings, console
        self.device = find_device(settings.device)
        self.tasks = domains(task)
        self.examples = {t.name: self._load(t, settings.split) for t in self.tasks}
        # The hub's tasks are judged on their published validation split: there is no other to choose by.
        self.validation = None if task.hub else self._load(task, "validation")
        self.posterior = load_posterior(settings)
        make_folder(settings.out)
        with console.status("Loading the model"):
            self.model, self.tokenizer = load_adapted(settings, self.device, self.posterior)
        self.posterior = self.posterior.to(self.device)
        suffix = last_word(self.examples[task.name][0])
        self.scorer = LabelScorer(self.model, self.tokenizer, task.label_words, suffix)
        self.sweeps: list[Sweep] = []
        self.domains: list[report.Domain] = []

    def run(self) -> bool:
        """Chooses the dials, judges every domain and writes it all; False when Ctrl-C cut it short."""
        with InterruptGuard() as guard, progress_bars(self.console) as progress:
            try:
                methods = self._methods(guard, progress)
                for task in self.tasks:
                    guard.check()
                    self._judge(task, methods, guard, progress)
            except Interrupted:
                finished = False
            else:
                finished = True
        self._finish(finished)
        return finished

    def _load(self, task: Task, split: str) -> list[data.Example]:
        found = data.load_dataset(
            task, split=split, train_size=1, test_size=None, max_words=self.settings.max_words, seed=0
        )
        return found.test[: self.settings.test_size]

    def _encode(
        self, examples: list[data.Example], guard: InterruptGuard, progress: Progress, title: str, passes: int
    ) -> Examples:
        """The examples, with a progress bar for `passes` readings of them."""
        encoded = data.EncodedExamples(examples, self.tokenizer, self.settings.max_tokens, self.device)
        bar = progress.add_task(title, total=passes * -(-len(examples) // BATCH_SIZE), note="")
        return Examples(examples, encoded, guard, lambda: progress.advance(bar))

    def _score(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return self.scorer.logits(inputs["input_ids"], inputs["last"])

    def _methods(self, guard: InterruptGuard, progress: Progress) -> list[Method]:
        """The ways to predict; the dials of the last two are chosen by NLL on the validation split.

        Pruning is judged at the mean: there it costs nothing at prediction time.
        """
        samples = self.settings.samples
        methods = [Method("mean", 0), Method(f"{samples} samples", samples)]
        if self.validation is None:
            return methods
        examples = self._encode(self.validation, guard, progress, "choosing dials", len(TEMPERATURES) + len(FRACTIONS))
        heat = sweep_temperature(
            self.posterior,
            self.model,
            examples,
            temperatures=TEMPERATURES,
            samples=min(samples, DIAL_SAMPLES),
            score=self._score,
            progress=False,
        )
        self.sweeps.append(heat)
        cut = sweep_pruning(
            self.posterior, self.model, examples, fractions=FRACTIONS, samples=0, score=self._score, progress=False
        )
        self.sweeps.append(cut)
        report.print_dials(self.console, self.sweeps, len(self.validation))
        tempered = Method(f"tempered x{heat.best:g}, {samples} samples", samples, temperature=heat.best)
        return [*methods, tempered, Method(f"pruned {cut.best:.0%}, mean", 0, pruned=cut.best)]

    def _judge(self, task: Task, methods: list[Method], guard: InterruptGuard, progress: Progress) -> None:
        passes = len({method.key for method in methods})
        examples = self._encode(self.examples[task.name], guard, progress, task.name, passes)
        known: dict[Any, Prediction] = {}
        for method in methods:
            if method.key not in known:
                posterior = method.of(self.posterior)
                known[method.key] = predict(
                    posterior, self.model, examples, samples=method.samples, score=self._score, progress=False
                )
        predictions = {method.name: known[method.key] for method in methods}
        domain = report.Domain(task.name, task is not self.task, predictions, examples.labels, examples.votes)
        self.domains.append(domain)
        report.print_domain(self.console, domain)

    def _finish(self, finished: bool) -> None:
        """Writes the record, the dials' picture and the pages of the domains that were judged."""
        out = self.settings.out
        about = {
            "finished": finished,
            "settings": self.settings.record(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }
        report.write_record(out / RECORD, about, self.sweeps, self.domains)
        if self.sweeps:
            report.draw_dials(out / "dials.png", self.sweeps)
        for domain in self.domains:
            posterior = None if domain.shift else self.posterior
            write_page(
                out / domain.task, domain.predictions, domain.labels, posterior, votes=domain.votes, title=domain.title
            )
        if self.domains:
            report.print_legend(self.console, self.domains)
        self.console.print(f"Record, pages and pictures: {out}", soft_wrap=True)


def load_posterior(settings: Settings) -> Posterior:
    """The posterior beside the adapter.

    Raises:
        UserError: there is none, it is damaged, or it belongs to other weights.
    """
    try:
        return Posterior.load(settings.folder)
    except (FileNotFoundError, PosteriorFileError) as error:
        raise UserError(f"Cannot read the posterior: {error}.") from error


def load_adapted(settings: Settings, device: torch.device, posterior: Posterior) -> tuple[peft.PeftModel, Any]:
    """The base model with the adapter, and its tokenizer.

    Raises:
        UserError: the model cannot be read, or is not the one that the adapter was trained on.
    """
    base, tokenizer = load_model(settings.model, device=device, in_8bit=settings.load_in_8bit)
    mismatch = f"The adapter in {settings.folder} was not trained on this model"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT: names that transformers is changing; missing keys are seen below
            adapted = peft.PeftModel.from_pretrained(base, settings.folder, torch_device=str(device))
        posterior.parameters_of(adapted)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{mismatch}: {' '.join(str(error).split())}") from error
    more = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - posterior.keys()
    if more:
        raise UserError(f"{mismatch}: its {min(more)} is not in the posterior; name the right one with --model.")
    return adapted, tokenizer
