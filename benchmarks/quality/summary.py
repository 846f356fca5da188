"""What a record of the quality suite says: means over seeds with their errors, paired differences, and ranks.

Everything is computed from the record alone, a ``quality.json`` that was read; nothing here measures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

BASELINE = "adamw"
"""The method that all others are compared with."""
ALL = "all tasks"
"""In place of a task: the mean over all of them, seed by seed."""
IN, SHIFT, COST = "in distribution", "under shift", "cost"
GROUPS = (IN, SHIFT)
"""Groups of domains. A seed's value under shift is the mean over the shifted domains."""
ERRORS = 2.0
"""A difference counts as decided beyond this many standard errors."""

Kind = Literal["baseline", "peer", "IVON", "ablation"]
_KINDS = get_args(Kind)


@dataclass(frozen=True)
class Metric:
    """A score: its name in tables, and which direction is better."""

    title: str
    higher: bool = False

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return one > other if self.higher else one < other


METRICS = {
    "accuracy": Metric("accuracy", higher=True),
    "nll": Metric("NLL"),
    "ece": Metric("ECE"),
    "ece_adaptive": Metric("adaptive ECE"),
    "brier": Metric("Brier"),
    "auroc_errors": Metric("AUROC of errors", higher=True),
    "selective_accuracy": Metric("selective accuracy", higher=True),
    "vote_cross_entropy": Metric("votes"),
}
"""By the fields of `ivon_kernels.predict.metrics.Scores`."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Over the seeds.
        error: Its standard error, from the sample variance of the seeds (ddof 1); None for one seed.
        seeds: Those that have a value.
    """

    mean: float
    error: float | None
    seeds: tuple[int, ...]

    @staticmethod
    def of(values: Mapping[int, float]) -> Estimate | None:
        """The estimate from values by seed; None if there are none."""
        if not values:
            return None
        found = np.array(list(values.values()), dtype=np.float64)
        error = float(found.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else None
        return Estimate(float(found.mean()), error, tuple(values))

    @property
    def decided(self) -> bool:
        """Of a difference: whether it exceeds `ERRORS` standard errors. With one seed nothing does."""
        return self.error is not None and abs(self.mean) > ERRORS * self.error


@dataclass(frozen=True)
class Cell:
    """A task, method and seed that has no scores, and why."""

    task: str
    method: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """A task, group and metric in which the best of IVON's methods, `ours`, is behind others by the mean."""

    task: str
    group: str
    metric: str
    ours: str
    ahead: Mapping[str, Estimate | None]
    """By method, the best first: IVON's value less the method's own, paired by seed; None without a common seed."""


class Summary:
    """A record, summarised.

    Args:
        record: As the harness writes it (schema 1).

    Raises:
        ValueError: the record has another schema.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        if record.get("schema") != 1:
            raise ValueError(f"This record has schema {record.get('schema')}; the report reads schema 1.")
        self.record = record
        self.methods: Mapping[str, Mapping[str, Any]] = record["methods"]
        order = sorted(self.methods, key=lambda method: (_KINDS.index(self.kind(method)), self.title(method)))
        self.methods = {method: self.methods[method] for method in order}
        cells: Sequence[Mapping[str, Any]] = record["cells"]
        settings = record["settings"]
        self.tasks = list(settings.get("tasks") or dict.fromkeys(cell["task"] for cell in cells))
        self.seeds = list(settings.get("seeds") or sorted({cell["seed"] for cell in cells}))
        self.failed = [Cell(c["task"], c["method"], c["seed"], c["error"]) for c in cells if c["error"] is not None]
        known = {(cell["task"], cell["method"], cell["seed"]) for cell in cells}
        self.missing = [
            Cell(task, method, seed, "has not run")
            for task in self.tasks
            for method in self.methods
            for seed in self.seeds
            if (task, method, seed) not in known
        ]
        self._cells = {(c["task"], c["method"], c["seed"]): c for c in cells if c["error"] is None}
        self._values: dict[tuple[str, str, str, str], dict[int, float]] = defaultdict(dict)
        for (task, method, seed), cell in self._cells.items():
            for group, key, value in self._read(cell):
                self._values[task, group, method, key][seed] = value
        self._average_tasks()

    # ---- what there is -----------------------------------------------------------------------------------------------

    @property
    def views(self) -> list[str]:
        """What is reported: the mean over the tasks if there are several, and each task."""
        return [ALL, *self.tasks] if len(self.tasks) > 1 else self.tasks

    def groups(self, task: str) -> list[str]:
        """The groups of domains that `task` was tested on."""
        return [group for group in GROUPS if self.metrics(task, group)]

    def metrics(self, task: str, group: str) -> list[str]:
        """The metrics that some method has there, in the order of tables."""
        return [key for key in METRICS if any((task, group, method, key) in self._values for method in self.methods)]

    def title(self, method: str) -> str:
        """The method's name in tables and plots."""
        return str(self.methods[method]["title"])

    def kind(self, method: str) -> Kind:
        """What the method is here for."""
        about = self.methods[method]
        if method == BASELINE:
            return "baseline"
        if about["ablation"]:
            return "ablation"
        return "IVON" if method.startswith("ivon") or about["base"] == "ivon" else "peer"

    @cached_property
    def ours(self) -> list[str]:
        """IVON's methods, without ablations."""
        return [method for method in self.methods if self.kind(method) == "IVON"]

    def cell(self, task: str, method: str, seed: int) -> Mapping[str, Any] | None:
        """The record's cell; None if it failed or has not run."""
        return self._cells.get((task, method, seed))

    def examples(self, task: str) -> dict[tuple[str, bool], list[Mapping[str, Any]]]:
        """Every domain that a task was tested on, by (domain, whether it is shifted), from all cells."""
        found: dict[tuple[str, bool], list[Mapping[str, Any]]] = defaultdict(list)
        for (trained, _, _), cell in self._cells.items():
            if trained == task:
                for domain in cell["domains"]:
                    found[domain["task"], domain["shift"]].append(domain)
        return dict(found)

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def score(self, task: str, group: str, method: str, metric: str) -> Estimate | None:
        """Mean and error over the seeds; None without a value. With the group `COST`, `metric` is a cost."""
        return Estimate.of(self._values.get((task, group, method, metric), {}))

    def cost(self, task: str, method: str, key: str) -> Estimate | None:
        """Mean and error over the seeds of one of the record's costs, or of `ready_seconds`: training and fit."""
        return self.score(task, COST, method, key)

    def difference(self, task: str, group: str, method: str, metric: str, to: str = BASELINE) -> Estimate | None:
        """The mean of `method` less `to`, paired: over the seeds that both have. None without such a seed."""
        one = self._values.get((task, group, method, metric), {})
        other = self._values.get((task, group, to, metric), {})
        return Estimate.of({seed: value - other[seed] for seed, value in one.items() if seed in other})

    def ranking(self, task: str, group: str, metric: str) -> dict[str, int]:
        """Methods by rank of their mean, the best first; equal ones share the better rank."""
        means = {m: s.mean for m in self.methods if (s := self.score(task, group, m, metric)) is not None}
        better = METRICS[metric].better
        ranks = {m: 1 + sum(better(other, mean) for other in means.values()) for m, mean in means.items()}
        return dict(sorted(ranks.items(), key=lambda item: item[1]))

    def lost(self) -> list[Lost]:
        """Every task, group and metric in which a method that is not IVON's has a better mean than all of IVON's."""
        found = []
        for task, group, metric in self._comparisons():
            ranks = self.ranking(task, group, metric)
            ours = next((method for method in ranks if method in self.ours), None)
            if ours is None:
                continue
            better = [method for method in ranks if ranks[method] < ranks[ours]]
            if better:
                ahead = {method: self.difference(task, group, ours, metric, method) for method in better}
                found.append(Lost(task, group, metric, ours, ahead))
        return found

    def tally(self, method: str, other: str) -> tuple[int, int, int]:
        """Over all tasks, groups and metrics: how often `method` is better than `other`, undecided, and worse.

        Better and worse are differences beyond `ERRORS` standard errors.
        """
        better = undecided = worse = 0
        for task, group, metric in self._comparisons():
            gap = self.difference(task, group, method, metric, other)
            if gap is None:
                continue
            ahead = METRICS[metric].better(gap.mean, 0)
            better += gap.decided and ahead
            worse += gap.decided and not ahead
            undecided += not gap.decided
        return better, undecided, worse

    def reliability(self, task: str, group: str, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The reliability diagram over all examples of all seeds and domains together.

        Returns:
            Mean confidence, accuracy and number of examples of each bin that holds any.
        """
        sums: dict[int, np.ndarray] = {}
        for (trained, name, _), cell in self._cells.items():
            if name != method or task not in (trained, ALL):
                continue
            for domain in _of_group(cell, group):
                points = domain["reliability"]
                filled = [(number, count) for number, count in enumerate(points["counts"]) if count]
                for (number, n), confidence, accuracy in zip(
                    filled, points["confidence"], points["accuracy"], strict=True
                ):
                    sums[number] = sums.get(number, np.zeros(3)) + np.array([n * confidence, n * accuracy, n])
        confidence, accuracy, counts = np.array([sums[number] for number in sorted(sums)]).reshape(-1, 3).T
        return confidence / counts, accuracy / counts, counts

    # ---- from the record ---------------------------------------------------------------------------------------------

    def _comparisons(self) -> Iterator[tuple[str, str, str]]:
        for task in self.tasks:
            for group in self.groups(task):
                for metric in self.metrics(task, group):
                    yield task, group, metric

    def _read(self, cell: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
        """Group, key and value of everything that a cell says; what is null has no value."""
        for group in GROUPS:
            domains = _of_group(cell, group)
            for key in METRICS:
                # Domains without votes have none for any method; any other gap leaves the seed out, because a mean
                # over fewer domains could not be compared.
                rated = [d for d in domains if key != "vote_cross_entropy" or d["vote_entropy"] is not None]
                values = [domain["scores"].get(key) for domain in rated]
                if values and None not in values:
                    yield group, key, float(np.mean(values))
        costs = cell["cost"]
        ready = {"ready_seconds": costs["train_seconds"] + costs["fit_seconds"]}
        for key, value in {**costs, **ready}.items():
            if value is not None:
                yield COST, key, float(value)

    def _average_tasks(self) -> None:
        """Enters the mean over the tasks, of the seeds that have a value in each task where any method has one."""
        keys = list(dict.fromkeys((group, key) for _, group, _, key in self._values))
        for group, key in keys:
            tasks = {task for task, g, _, k in self._values if (g, k) == (group, key)}
            for method in self.methods:
                by_task = [self._values.get((task, group, method, key), {}) for task in sorted(tasks)]
                mean = {s: float(np.mean([v[s] for v in by_task])) for s in _common(by_task)}
                if mean:
                    self._values[ALL, group, method, key] = mean


def _of_group(cell: Mapping[str, Any], group: str) -> list[Mapping[str, Any]]:
    return [domain for domain in cell["domains"] if domain["shift"] == (group == SHIFT)]


def _common(values: Sequence[Mapping[int, float]]) -> Iterable[int]:
    return [seed for seed in values[0] if all(seed in found for found in values)]
