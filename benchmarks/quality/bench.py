"""The place where methods run: the model, one task's examples, and the clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.finetune import data
from benchmarks.finetune.model import LabelScorer
from benchmarks.finetune.run import last_word
from benchmarks.finetune.tasks import Task, domains
from benchmarks.finetune.train import InterruptGuard
from benchmarks.memory import PeakMemory
from benchmarks.quality.cells import Content
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.settings import SEARCH_SEED, Size, sized
from ivon_kernels.predict import metrics

Tensors = dict[str, Tensor]
_WEIGHTS, _STATE = "weights.", "state."


@dataclass(frozen=True)
class Domain:
    """Examples that predictions are judged on; `shift` says whether training was on another domain."""

    task: str
    shift: bool
    encoded: data.EncodedExamples
    labels: Tensor
    votes: Tensor | None

    def judge(self, probabilities: Tensor) -> Content:
        """The scores and the reliability diagram of predictions, as the record holds them."""
        return {
            "task": self.task,
            "shift": self.shift,
            "examples": len(self.labels),
            "vote_entropy": None if self.votes is None else metrics.vote_entropy(self.votes),
            "scores": scores_of(probabilities, self.labels, self.votes),
            "reliability": asdict(metrics.reliability(probabilities, self.labels)),
        }


class Bench:
    """One task in a model that several tasks share; loads the examples.

    Raises:
        UserError: They cannot be had.
    """

    def __init__(
        self,
        task: Task,
        amounts: Size,
        model: peft.PeftModel,
        tokenizer: Any,
        guard: InterruptGuard,
        note: Callable[[str], None],
    ) -> None:
        self.task, self.amounts = sized(task, amounts), amounts
        self.model, self._tokenizer = model, tokenizer
        self._guard, self._note = guard, note
        self.device = next(model.parameters()).device
        self.validation = self._domain(self.task, "validation", amounts.validation_size)
        first, *others = domains(task)
        self.domains = [self._domain(self.task, "test", self.task.recipe.test_size)]
        self.domains += [self._domain(sized(other, amounts), "test", amounts.shift_size) for other in others]
        suffix = last_word(self._load(self.task, "validation", 1, 0).test[0])
        self.scorer = LabelScorer(model, tokenizer, first.label_words, suffix)

    def _load(self, task: Task, split: str, size: int | None, seed: int) -> data.Dataset:
        train_size = task.recipe.train_size if split == "validation" else 1
        sizes = {"train_size": train_size, "test_size": size, "max_words": task.recipe.max_words}
        return data.load_dataset(task, split=split, seed=seed, **sizes)

    def _encode(self, examples: list[data.Example]) -> data.EncodedExamples:
        return data.EncodedExamples(examples, self._tokenizer, self.task.recipe.max_tokens, self.device)

    def _domain(self, task: Task, split: str, size: int | None) -> Domain:
        examples = self._load(task, split, size, 0).test
        shift = task.name != self.task.name
        encoded = self._encode(examples)
        return Domain(task.name, shift, encoded, encoded.labels, encoded.votes)

    def job(self, seed: int, samples: int) -> Job:
        """A job of this task; the seed also draws its training examples."""
        examples = self._encode(self._load(self.task, "validation", None, seed).train)
        steps, batch_size = self.task.recipe.steps, self.task.recipe.batch_size
        return Job(self.model, self.scorer, examples, seed, steps, batch_size, samples, self._guard, self._note)

    def try_candidate(self, method: Method, hyper: Hyper) -> tuple[Content, Tensors]:
        """Train with some hyperparameters and judge on the validation split."""
        job = self.job(SEARCH_SEED, self.amounts.search_samples)
        begin = time.perf_counter()
        job.restart()
        state = method.train(job, hyper)
        probabilities = self._predict(method, job, state, {**hyper, **method.dials[0]}, self.validation.encoded)
        scores = scores_of(probabilities, self.validation.labels, None)
        return {"hyper": dict(hyper), "scores": scores, "seconds": time.perf_counter() - begin, "error": None}, {}

    def train(self, method: Method, hyper: Hyper, seed: int) -> tuple[Content, Tensors]:
        """Train for good: what it cost, and the adapter's weights with the method's state."""
        job = self.job(seed, self.amounts.samples)
        with PeakMemory(self.device) as memory:
            begin = time.perf_counter()
            job.restart()
            state = method.train(job, hyper)
            seconds = time.perf_counter() - begin
        cost = {"train_seconds": seconds, "train_peak_mb": memory.megabytes}
        tensors = {_WEIGHTS + name: value for name, value in self._weights().items()}
        tensors |= {_STATE + name: value for name, value in state.items()}
        return {"hyper": dict(hyper), "cost": cost, "error": None}, tensors

    def judge(self, method: Method, hyper: Hyper, seed: int, trained: Tensors) -> tuple[Content, Tensors]:
        """Predict every domain with what was trained: the scores with the costs, and the probabilities by domain."""
        weights, state = (
            {name.removeprefix(kind): value for name, value in trained.items() if name.startswith(kind)}
            for kind in (_WEIGHTS, _STATE)
        )
        self._put(weights)
        job = self.job(seed, self.amounts.samples)
        with PeakMemory(self.device) as fitting:
            begin = time.perf_counter()
            state = method.fit(job, state, hyper)
            fitted = time.perf_counter()
        few = job.with_samples(self.amounts.search_samples)
        dials = dict(method.tune(few, state, hyper, self.validation.encoded))
        tuned = time.perf_counter()
        setting = {**hyper, **dials}
        job.passes = 0
        with PeakMemory(self.device) as predicting:
            started = time.perf_counter()
            found = {self.task.name: self._predict(method, job, state, setting, self.domains[0].encoded)}
            seconds = time.perf_counter() - started
        count = len(self.domains[0].labels)
        cost = {
            "extra_parameters": sum(value.numel() for value in state.values()),
            "passes": job.passes / count,
            "fit_seconds": fitted - begin,
            "tune_seconds": tuned - fitted,
            "predict_ms_per_example": 1e3 * seconds / count,
            "fit_peak_mb": fitting.megabytes,
            "predict_peak_mb": predicting.megabytes,
        }
        for domain in self.domains[1:]:
            found[domain.task] = self._predict(method, job, state, setting, domain.encoded)
        now = self._weights()
        if now.keys() != weights.keys() or not all(torch.equal(now[name], weights[name]) for name in weights):
            raise RuntimeError(f"{method.name} did not leave the adapter's weights as they were")
        judged = [domain.judge(found[domain.task]) for domain in self.domains]
        return {"hyper": dict(hyper), "dials": dials, "domains": judged, "cost": cost, "error": None}, found

    def _predict(self, method: Method, job: Job, state: State, hyper: Hyper, examples: data.EncodedExamples) -> Tensor:
        probabilities = method.predict(job, state, hyper, examples).double().cpu()
        wanted = (len(examples), len(self.task.label_words))
        if probabilities.shape != wanted or not bool(probabilities.isfinite().all()):
            raise ValueError(f"predict() must return finite probabilities {wanted}, got {tuple(probabilities.shape)}")
        return probabilities

    def _weights(self) -> Tensors:
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _put(self, weights: Tensors) -> None:
        for name, param in self.model.named_parameters():
            if name in weights:
                param.copy_(weights[name])


def scores_of(probabilities: Tensor, labels: Tensor, votes: Tensor | None) -> dict[str, float | None]:
    """Scores as JSON can hold them: nan, where there is no score, is null."""
    scores = asdict(metrics.evaluate(probabilities, labels, votes))
    return {name: None if value is None or isnan(value) else value for name, value in scores.items()}
