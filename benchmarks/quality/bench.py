"""The place where methods run: the model, one task's examples, and the clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

from benchmarks.finetune import data
from benchmarks.finetune.report import scores_record
from benchmarks.finetune.scorers import scorer_of
from benchmarks.finetune.tasks import Task, domains
from benchmarks.finetune.train import InterruptGuard
from benchmarks.memory import PeakMemory
from benchmarks.quality.method import Hyper, Job, Method, State
from benchmarks.quality.settings import SEARCH_SEED, Size, sized
from ivon_kernels.predict import metrics
from ivon_kernels.predict.temperature import best_temperature, scale

Content = dict[str, Any]
Tensors = dict[str, Tensor]
_WEIGHTS, _STATE = "weights.", "state."
CALIBRATION = "calibration"  # what temperatures are fitted to: beside the domains, in the tensors of a judged cell


class Domain(NamedTuple):
    """Examples that predictions are judged on."""

    task: str
    examples: data.EncodedExamples


class Bench:
    """One task in a model that several tasks share; loads the examples."""

    def __init__(
        self,
        task: Task,
        amounts: Size,
        model: peft.PeftModel,
        tokenizer: Any,
        guard: InterruptGuard,
        note: Callable[[str], None],
    ) -> None:
        self.task, self.amounts, self.model, self._tokenizer = sized(task, amounts), amounts, model, tokenizer
        self._guard, self._note = guard, note
        self.device = next(model.parameters()).device
        self.validation = self._domain(self.task, "validation", amounts.validation_size)
        self.domains = [self._domain(self.task, "test", self.task.recipe.test_size)]
        self.domains += [self._domain(sized(other, amounts), "test", amounts.shift_size) for other in domains(task)[1:]]
        self.scorer = scorer_of(task, model, tokenizer, self._load(self.task, "validation", 1, 0).test[0])

    def _load(self, task: Task, split: str, size: int | None, seed: int) -> data.Dataset:
        train_size = task.recipe.train_size if split == "validation" else 1
        sizes = {"train_size": train_size, "test_size": size, "max_words": task.recipe.max_words}
        return data.load_dataset(task, split=split, seed=seed, **sizes)

    def _encode(self, examples: list[data.Example]) -> data.EncodedExamples:
        return data.EncodedExamples(examples, self._tokenizer, self.task.recipe.max_tokens, self.device)

    def _domain(self, task: Task, split: str, size: int | None) -> Domain:
        return Domain(task.name, self._encode(self._load(task, split, size, 0).test))

    def job(self, seed: int, samples: int) -> Job:
        """A job of this task; the seed also draws its training examples."""
        examples = self._encode(self._load(self.task, "validation", None, seed).train)
        steps, batch_size = self.task.recipe.steps, self.task.recipe.batch_size
        return Job(self.model, self.scorer, examples, seed, steps, batch_size, samples, self._guard, self._note)

    def try_candidate(self, method: Method, hyper: Hyper) -> tuple[Content, Tensors]:
        """Trains with some hyperparameters and judges on the validation split."""
        job = self.job(SEARCH_SEED, self.amounts.search_samples)
        begin = time.perf_counter()
        job.restart()
        state = method.train(job, hyper)
        probabilities = self._predict(method, job, state, {**hyper, **method.dials[0]}, self.validation).mean(0)
        scores = scores_of(self.validation, probabilities)
        return {"hyper": dict(hyper), "scores": scores, "seconds": time.perf_counter() - begin}, {}

    def train(self, method: Method, hyper: Hyper, seed: int) -> tuple[Content, Tensors]:
        """Trains for good: what it cost, and the adapter's weights with the method's state."""
        job, cost = self.job(seed, self.amounts.samples), Content()
        with self._costs(cost, "train"):
            job.restart()
            state = method.train(job, hyper)
        tensors = {_WEIGHTS + name: value for name, value in self._weights().items()}
        tensors |= {_STATE + name: value for name, value in state.items()}
        return {"hyper": dict(hyper), "cost": cost}, tensors

    def judge(self, method: Method, hyper: Hyper, seed: int, trained: Tensors) -> tuple[Content, Tensors]:
        """Predicts every domain with what was trained: the scores with the costs, and the probabilities by domain.

        A size with `passes` keeps what each sample says, also of the validation split, and has a row for every average
        and for every average with a temperature: neither takes another forward pass.
        """
        weights, state = (
            {name.removeprefix(kind): value for name, value in trained.items() if name.startswith(kind)}
            for kind in (_WEIGHTS, _STATE)
        )
        self.model.load_state_dict(weights, strict=False)
        job, cost = self.job(seed, self.amounts.samples), Content()
        with self._costs(cost, "fit"):
            state = method.fit(job, state, hyper)
        few = replace(job, samples=self.amounts.search_samples)
        with self._costs(cost, "tune"):
            dials = dict(method.tune(few, state, hyper, self.validation.examples))
        setting, (first, *others) = {**hyper, **dials}, self.domains
        job.passes = 0
        with self._costs(cost, "predict"):
            found = {first.task: self._predict(method, job, state, setting, first)}
        cost["extra_parameters"] = sum(value.numel() for value in state.values())
        cost["passes"] = job.passes / len(first.examples)
        cost["predict_ms_per_example"] = 1e3 * cost.pop("predict_seconds") / len(first.examples)
        found |= {domain.task: self._predict(method, job, state, setting, domain) for domain in others}
        calibration = None
        if self.amounts.passes:
            calibration = method.calibration(job, state, setting, self.validation.examples)
        now = self._weights()
        if now.keys() != weights.keys() or not all(torch.equal(now[name], weights[name]) for name in weights):
            raise RuntimeError(f"{method.name} did not leave the adapter's weights as they were")
        content = {"hyper": dict(hyper), "dials": dials, "cost": cost}
        if calibration is None:
            averages = {name: each.mean(0) for name, each in found.items()}
            judged = [self._judged(domain, averages[domain.task]) for domain in self.domains]
            return {**content, "domains": judged}, averages
        each, labels = calibration
        found[CALIBRATION] = self._checked(each, len(labels))
        rows = self._rows(found, labels, scaled=(True,) if method.scaled else (False, True))
        return {**content, "rows": rows}, {name: each.float() for name, each in found.items()}

    def _predict(self, method: Method, job: Job, state: State, hyper: Hyper, domain: Domain) -> Tensor:
        """Class probabilities ``[samples, examples, classes]``; their average alone where the size asks for no more."""
        each = method.each if self.amounts.passes else method.predict
        found = each(job, state, hyper, domain.examples)
        return self._checked(found if self.amounts.passes else found[None], len(domain.examples))

    def _checked(self, each: Tensor, examples: int) -> Tensor:
        found, wanted = each.double().cpu(), (examples, len(self.task.label_words))
        if found.shape[1:] != wanted or not bool(found.isfinite().all()):
            raise ValueError(f"predict() must return finite probabilities {wanted}, got {tuple(found.shape[1:])}")
        return found

    def _rows(self, found: Tensors, labels: Tensor, scaled: Iterable[bool]) -> list[Content]:
        """By averages of so many samples, without and with the temperature that the same of `CALIBRATION` gives."""
        samples, rows = len(found[CALIBRATION]), []
        for count in sorted({count for count in self.amounts.passes if count < samples} | {samples}):
            averages = {name: each[:count].mean(0) for name, each in found.items()}
            fitted = best_temperature(averages[CALIBRATION].log(), labels)
            for temperature in (fitted if wanted else None for wanted in scaled):
                judged = [self._judged(domain, _scaled(averages[domain.task], temperature)) for domain in self.domains]
                rows.append({"samples": count, "temperature": temperature, "domains": judged})
        return rows

    def _judged(self, domain: Domain, probabilities: Tensor) -> Content:
        votes = domain.examples.votes
        return {
            "task": domain.task,
            "shift": domain.task != self.task.name,
            "examples": len(domain.examples),
            "vote_entropy": None if votes is None else metrics.vote_entropy(votes),
            "scores": scores_of(domain, probabilities, votes),
            "reliability": asdict(metrics.reliability(probabilities, domain.examples.labels)),
        }

    @contextmanager
    def _costs(self, cost: Content, part: str) -> Iterator[None]:
        """Notes the seconds of a block, and its peak of memory in MB above what was in use before it."""
        with PeakMemory(self.device) as memory:
            begin = time.perf_counter()
            yield
            cost[f"{part}_seconds"] = time.perf_counter() - begin
        cost[f"{part}_peak_mb"] = memory.megabytes

    def _weights(self) -> Tensors:
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def _scaled(probabilities: Tensor, temperature: float | None) -> Tensor:
    return probabilities if temperature is None else scale(probabilities.log(), temperature)


def scores_of(domain: Domain, probabilities: Tensor, votes: Tensor | None = None) -> Content:
    """Scores as JSON can hold them; without votes, the raters are not asked."""
    return scores_record(metrics.evaluate(probabilities, domain.examples.labels, votes))
