"""A study: every method on every task with every seed, in parts that are done once each, and its record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from rich.console import Console

from benchmarks import UserError
from benchmarks.finetune.tasks import domains, find_task
from benchmarks.quality import passes, passes_report, report
from benchmarks.quality.bench import Content, Tensors
from benchmarks.quality.earlier import Earlier
from benchmarks.quality.method import Hyper, Method
from benchmarks.quality.methods import all_methods
from benchmarks.quality.settings import BUDGET, DIAL_BUDGET, Settings, kind_of, sized
from benchmarks.quality.workshop import Workshop, key_of

RECORD, HYPERPARAMETERS = "quality.json", "hyperparameters.json"
SEARCH, TRAINED, JUDGED = "search", "trained", "judged"
# Seconds of one core for a word of an example, of SmolLM2-135M: measured with sentences of up to 12 words.
TRAIN_SECONDS, PREDICT_SECONDS = 0.11 / 12, 0.042 / 12
WORDS = 60  # of an example of which nothing is known


def run(settings: Settings, console: Console) -> bool:
    """Does what the folder does not have yet, prints the tables and writes everything; False after Ctrl-C."""
    study = Study(settings, select(settings), console)
    if settings.amounts.passes:
        console.print(study.forecast(), soft_wrap=True)
    with study.progress:
        finished = study.do(list(study.parts()))
    record = study.write(RECORD, finished, study.record())
    chosen = {
        task: {name: entry["chosen"] for name, entry in found.items()}
        for task, found in record["hyperparameters"].items()
    }
    (settings.out / HYPERPARAMETERS).write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    pages = passes_report if settings.amounts.passes else report
    pages.print_tables(console, record)
    pages.write_report(record, settings.out)
    console.print(f"Record and report: {settings.out / RECORD}, {settings.out / report.PAGE}", soft_wrap=True)
    return finished


def select(settings: Settings) -> dict[str, Method]:
    """The methods that are asked for and what they need, all for none; with the candidates for runs of this length."""
    found, names = all_methods(), settings.methods
    if settings.amounts.passes:
        found = {n: replace(m, candidates=m.long_candidates or m.candidates) for n, m in found.items()}
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"Unknown method '{unknown[0]}'; choose from {', '.join(found)}.")
    wanted = {base for name in names for base in (name, found[name].base)} if names else set(found)
    wanted |= {found[name].like for name in wanted if name is not None}
    chosen = {name: method for name, method in found.items() if name in wanted}
    for name, method in chosen.items():
        if len(method.candidates) > BUDGET or len(method.dials) > DIAL_BUDGET:
            raise UserError(f"{name} has more than {BUDGET} candidates or {DIAL_BUDGET} values of a dial.")
    return chosen


class Study(Workshop):
    """The parts of a study, and what they have found so far, of methods by name, each after its base."""

    def __init__(self, settings: Settings, methods: dict[str, Method], console: Console) -> None:
        self._earlier = Earlier.read(settings.out / RECORD, settings)
        super().__init__(settings, console)
        self.methods, self._given = methods, settings.given()
        self._trainers = [method for method in methods.values() if method.base is None]

    def parts(self) -> Iterator[Callable[[], object]]:
        """All parts, so that every seed is complete before the next one begins."""
        for task in self.settings.tasks:
            for method in self._trainers:
                for hyper in self._searched(method):
                    yield partial(self._search, self._chosen_on(task), method, hyper)
            for seed in self.settings.seeds:
                for method in self._trainers:
                    yield partial(self._prepare, task, method, seed)
                for method in self.methods.values():
                    yield partial(self._judge, task, method, seed)

    def _chosen_on(self, task: str) -> str:
        """The task on whose validation split the hyperparameters are chosen."""
        return kind_of(task) if self.settings.amounts.shares else task

    def _searched(self, method: Method) -> tuple[Hyper, ...]:
        """The candidates that have to be tried before a method is trained."""
        return tuple(method.candidates) if self.settings.search and len(method.candidates) > 1 else ()

    def _search(self, task: str, method: Method, hyper: Hyper) -> Content:
        if (earlier := self._earlier.tried(task, method.name, hyper)) is not None:
            return earlier
        names, title = (SEARCH, task, method.name, key_of(hyper)), f"{task}: {method.title}, trying {key_of(hyper)}"
        return self.cell(names, title, lambda: self.bench(task).try_candidate(method, hyper))

    def _settled(self, task: str, method: Method) -> Hyper:
        """The hyperparameters, after every candidate was tried."""
        if method.like is not None:
            self._settled(task, self.methods[method.like])
        for hyper in self._searched(method):
            self._search(self._chosen_on(task), method, hyper)
        return self.chosen(task, method)

    def _prepare(self, task: str, method: Method, seed: int) -> None:
        """Trains where some method that is not judged yet needs it."""
        self._settled(task, method)
        needing = (user for user in self.methods.values() if method.name in (user.name, user.base))
        if any(self._judged(task, user, seed) is None for user in needing):
            self._train(task, method, seed)

    def _train(self, task: str, method: Method, seed: int) -> Content:
        hyper = self._settled(task, method)
        names, title = self._names(TRAINED, task, method, seed), f"{task}, seed {seed}: training {method.title}"
        return self.cell(names, title, lambda: self.bench(task).train(method, hyper, seed))

    def _judge(self, task: str, method: Method, seed: int) -> Content:
        trainer = self.methods[method.base or method.name]
        self._settled(task, trainer)
        if (judged := self._judged(task, method, seed)) is not None:
            return judged
        trained = self._train(task, trainer, seed)

        def compute() -> tuple[Content, Tensors]:
            if trained["error"] is not None:
                raise RuntimeError(f"its training failed: {trained['error']}")
            tensors = self.cells.tensors(*self._names(TRAINED, task, trainer, seed))
            judged, found = self.bench(task).judge(method, trained["hyper"], seed, tensors)
            return {**judged, "cost": {**trained["cost"], **judged["cost"]}}, found

        names, title = self._names(JUDGED, task, method, seed), f"{task}, seed {seed}: predicting with {method.title}"
        return self.cell(names, title, compute)

    def _judged(self, task: str, method: Method, seed: int) -> Content | None:
        """What a method has scored so far, in this folder's cells or in the record of an earlier run."""
        if (found := self.cells.read(*self._names(JUDGED, task, method, seed))) is not None:
            return found
        hyper = self.chosen(task, self.methods[method.base or method.name])
        return self._earlier.judged(task, method.name, seed, hyper)

    def _names(self, kind: str, task: str, method: Method, seed: int) -> tuple[str, ...]:
        """A cell; it has the hyperparameters in its name, so that others, once they are chosen, are another cell."""
        hyper = self.chosen(task, self.methods[method.base or method.name])
        return kind, task, method.name, key_of(hyper), str(seed)

    # ---- what was found ----------------------------------------------------------------------------------------------

    def tried(self, task: str, method: Method) -> list[Content]:
        """The candidates that were tried so far, with their scores on the validation split."""
        where = SEARCH, self._chosen_on(task), method.name
        cells = [
            (h, self.cells.read(*where, key_of(h)) or self._earlier.tried(*where[1:], h)) for h in method.candidates
        ]
        return [{"hyper": dict(h), "scores": c.get("scores"), "error": c["error"]} for h, c in cells if c is not None]

    def chosen(self, task: str, method: Method) -> Hyper:
        """The hyperparameters that a method is trained with: those of the best likelihood on the validation split."""
        given: Hyper | None = self._given.get(task, {}).get(method.name)
        if given is not None:
            return given
        if method.like is not None:
            return self.chosen(task, self.methods[method.like])
        tried = [entry for entry in self.tried(task, method) if entry["error"] is None] if self.settings.search else []
        best: Hyper = min(tried, key=lambda entry: float(entry["scores"]["nll"]))["hyper"] if tried else {}
        return best if tried else method.candidates[0]

    def record(self) -> Content:
        """Methods, hyperparameters and all that was judged so far: task by task, method by method, seed by seed."""
        about, source = ("title", "source", "base", "ablation"), "search" if self.settings.search else "file"
        hyperparameters: Content = {}
        cells: list[Content] = []
        for task in self.settings.tasks:
            hyperparameters[task] = {
                method.name: {
                    "chosen": dict(self.chosen(task, method)),
                    "tried": self.tried(task, method),
                    "from": source,
                }
                for method in self._trainers
            }
            for method in self.methods.values():
                for seed in self.settings.seeds:
                    found = self.cells.read(*self._names(JUDGED, task, method, seed))
                    if found is not None:
                        found.pop("traceback", None)
                        empty: Content = {"hyper": {}, "dials": {}, "domains": [], "cost": None}
                        cells.append({"task": task, "method": method.name, "seed": seed, **empty, **found})
        found = {
            "methods": {name: {key: getattr(method, key) for key in about} for name, method in self.methods.items()},
            "hyperparameters": hyperparameters,
            "cells": cells,
        }
        if not self.settings.amounts.passes:
            return found
        return self._earlier.joined(passes.compact(found), self.settings.record())

    def forecast(self) -> str:
        """How long the whole study takes on one core, by what SmolLM2-135M took on one of a server."""
        seconds, amounts = 0.0, self.settings.amounts
        for task in self.settings.tasks:
            recipe = sized(find_task(task), self.settings.amounts).recipe
            words = recipe.max_words or WORDS
            train = TRAIN_SECONDS * words * recipe.steps * recipe.batch_size
            shifted = (amounts.shift_size or 0) * (len(domains(find_task(task))) - 1)
            predict = PREDICT_SECONDS * words * ((recipe.test_size or 0) + (amounts.validation_size or 0) + shifted)
            if task == self._chosen_on(task):
                seconds += train * sum(len(self._searched(method)) for method in self._trainers)
            for method in self.methods.values():
                trainings, samples = method.work(amounts.samples)
                seconds += len(self.settings.seeds) * (trainings * train + samples * predict)
        return f"All of it takes about {seconds / 3600:.1f} hours of one core, less what is finished already."
