"""A study: every method on every task with every seed, as units of work that are done once each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from safetensors.torch import save_file

from benchmarks import UserError
from benchmarks.quality.bench import Bench
from benchmarks.quality.cells import Cells, key_of
from benchmarks.quality.method import Hyper, Method
from benchmarks.quality.settings import BUDGET, DIAL_BUDGET, Settings
from benchmarks.quality.units import Unit

SEARCH, TRAINED, JUDGED = "search", "trained", "judged"


class Study:
    """The units of a study, and what they have found so far."""

    def __init__(
        self,
        settings: Settings,
        methods: dict[str, Method],
        cells: Cells,
        bench: Callable[[str], Bench],
    ) -> None:
        """Plans the study.

        Args:
            settings: What is studied.
            methods: By name, each after its base.
            cells: Where finished units are.
            bench: Gives the bench of a task.

        Raises:
            UserError: A method tries more than all others may.
        """
        self.settings, self.methods, self.cells = settings, methods, cells
        self._given, self._bench = settings.given(), bench
        for method in methods.values():
            if len(method.candidates) > BUDGET or len(method.dials) > DIAL_BUDGET:
                raise UserError(f"{method.name} has more than {BUDGET} candidates or {DIAL_BUDGET} values of a dial.")
        self.units = list(self._plan())

    # ---- what there is to do -----------------------------------------------------------------------------------------

    def _plan(self) -> Iterator[Unit]:
        """All units, so that every seed is complete before the next one begins."""
        for task in self.settings.tasks:
            trainers = [method for method in self.methods.values() if method.base is None]
            if self.settings.search:
                for method in trainers:
                    if self._searches(task, method):
                        for hyper in method.candidates:
                            yield self._search(task, method, hyper)
            for seed in self.settings.seeds:
                for method in trainers:
                    yield self._train(task, method, seed)
                for method in self.methods.values():
                    yield self._judge(task, method, seed)

    def _search(self, task: str, method: Method, hyper: Hyper) -> Unit:
        cell = (SEARCH, task, method.name, key_of(hyper))
        title = f"{task}: {method.title}, trying {key_of(hyper)}"
        return Unit(cell, (), title, lambda: self._bench(task).try_candidate(method, hyper))

    def _train(self, task: str, method: Method, seed: int) -> Unit:
        cell = (TRAINED, task, method.name, str(seed))

        def run() -> dict[str, Any]:
            content, weights, state = self._bench(task).train(method, self.chosen(task, method), seed)
            self.cells.save_trained(weights, state, *cell)
            return content

        return Unit(cell, self._searches(task, method), f"{task}, seed {seed}: training {method.title}", run)

    def _searches(self, task: str, method: Method) -> tuple[tuple[str, ...], ...]:
        """The cells by which a method's hyperparameters are chosen."""
        if not self.settings.search or len(method.candidates) == 1:
            return ()
        return tuple((SEARCH, task, method.name, key_of(hyper)) for hyper in method.candidates)

    def _judge(self, task: str, method: Method, seed: int) -> Unit:
        cell = (JUDGED, task, method.name, str(seed))
        trained = (TRAINED, task, method.base or method.name, str(seed))

        def run() -> dict[str, Any]:
            content = self.cells.read(*trained) or {}
            if content.get("error") is not None:
                raise RuntimeError(f"its training failed: {content['error']}")
            weights, state = self.cells.load_trained(*trained)
            judged, probabilities = self._bench(task).judge(method, content["hyper"], seed, weights, state)
            judged["cost"] = {**content["cost"], **judged["cost"]}
            save_file(probabilities, self.cells.path(*cell) / "probabilities.safetensors")
            return judged

        return Unit(cell, (trained,), f"{task}, seed {seed}: predicting with {method.title}", run)

    def forget_outdated(self) -> None:
        """Have done again what was trained with hyperparameters that would not be chosen now: candidates were added."""
        for unit in self.units:
            kind, task, name, _ = unit.cell
            if kind not in (TRAINED, JUDGED):
                continue
            method = self.methods[self.methods[name].base or name]
            complete = all(self.cells.read(*need) is not None for need in self._searches(task, method))
            content = self.cells.read(*unit.cell)
            if content is not None and complete and content.get("hyper") != self.chosen(task, method):
                self.cells.forget(*unit.cell)

    # ---- what was found ----------------------------------------------------------------------------------------------

    def tried(self, task: str, method: Method) -> list[dict[str, Any]]:
        """The candidates that were tried so far, with their scores on the validation split."""
        found = []
        for hyper in method.candidates:
            content = self.cells.read(SEARCH, task, method.name, key_of(hyper))
            if content is not None:
                found.append({"hyper": dict(hyper), "scores": content.get("scores"), "error": content["error"]})
        return found

    def chosen(self, task: str, method: Method) -> Hyper:
        """The hyperparameters that a method is trained with: those of the best likelihood on the validation split."""
        given: Hyper | None = self._given.get(task, {}).get(method.name)
        if given is not None:
            return given
        tried = [entry for entry in self.tried(task, method) if entry["error"] is None] if self.settings.search else []
        if not tried:
            return method.candidates[0]
        best: Hyper = min(tried, key=lambda entry: float(entry["scores"]["nll"]))["hyper"]
        return best

    def results(self) -> list[dict[str, Any]]:
        """What was judged so far, task by task, method by method, seed by seed."""
        found = []
        for task in self.settings.tasks:
            for method in self.methods.values():
                for seed in self.settings.seeds:
                    content = self.cells.read(JUDGED, task, method.name, str(seed))
                    if content is not None:
                        empty: dict[str, Any] = {"hyper": {}, "dials": {}, "domains": [], "cost": None}
                        about = {"task": task, "method": method.name, "seed": seed}
                        kept = {key: value for key, value in content.items() if key != "traceback"}
                        found.append({**about, **empty, **kept})
        return found
