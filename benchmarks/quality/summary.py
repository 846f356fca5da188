"""What a record of the quality suite says: means over seeds with their errors, paired differences, and ranks.

Everything is computed from the record alone, a ``quality.json`` that was read; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

BASELINE = "adamw"
"""The method that all others are compared with."""
ALL = "all tasks"
"""In place of a task: the mean over all of them, seed by seed."""
IN, SHIFT, COST = "in distribution", "under shift", "cost"
GROUPS = (IN, SHIFT)
"""Groups of domains. A seed's value under shift is the mean over the shifted domains."""
ERRORS = 2.0
"""A difference counts as decided beyond this many standard errors."""
VOTES = "vote_cross_entropy"
KINDS = ("baseline", "peer", "IVON", "ablation")
"""What a method is here for, in the order of tables."""
_LEVELS = ["task", "group", "method", "metric"]


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
    VOTES: Metric("votes"),
}
"""By the fields of `ivon_kernels.predict.metrics.Scores`."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `seeds`; its standard error is from their sample variance (ddof 1), and None for one seed."""

    mean: float
    error: float | None
    seeds: tuple[int, ...]

    @property
    def decided(self) -> bool:
        """Of a difference: whether it exceeds `ERRORS` standard errors. With one seed nothing does."""
        return self.error is not None and abs(self.mean) > ERRORS * self.error


class Summary:
    """A record, summarised.

    Attributes:
        tasks: Names of the tasks.
        seeds: Of the study.
        methods: What the record says of each, by kind and title.
        cells: Those with scores, by task, method and seed.
        domains: A row for every one of their domains: cell, scores, reliability diagram.
        failed: Cells without scores: task, method, seed, reason.
        missing: The same of combinations that have not run.

    Raises:
        ValueError: the record has another schema.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        if record.get("schema") != 1:
            raise ValueError(f"This record has schema {record.get('schema')}; the report reads schema 1.")
        self.record, cells, settings = record, record["cells"], record["settings"]
        order = sorted(record["methods"], key=lambda name: (KINDS.index(self.kind(name)), self.title(name)))
        self.methods = {method: record["methods"][method] for method in order}
        self.ours = [method for method in order if self.kind(method) == "IVON"]
        self.tasks = list(settings.get("tasks") or dict.fromkeys(cell["task"] for cell in cells))
        self.seeds = list(settings.get("seeds") or sorted({cell["seed"] for cell in cells}))
        known = {(cell["task"], cell["method"], cell["seed"]): cell for cell in cells}
        self.failed = [(*key, cell["error"]) for key, cell in known.items() if cell["error"] is not None]
        wanted = pd.MultiIndex.from_product([self.tasks, order, self.seeds])
        self.missing = [(*key, "has not run") for key in wanted if key not in known]
        self.cells = {key: cell for key, cell in known.items() if cell["error"] is None}
        rows = [
            {**d["scores"], **d, "domain": d["task"], "task": task, "method": method, "seed": seed}
            for (task, method, seed), cell in self.cells.items()
            for d in cell["domains"]
        ]
        about = ["domain", "shift", "examples", "vote_entropy", "reliability"]
        self.domains = pd.DataFrame(rows, columns=["task", "method", "seed", *about, *METRICS])
        self.domains["group"] = self.domains["shift"].map({False: IN, True: SHIFT})
        values = _with_mean_of_tasks(pd.concat([self._scores(), self._costs()]))
        self._values = {key: found.droplevel(_LEVELS) for key, found in values.groupby(_LEVELS)}
        self._estimates = {key: _estimate(found) for key, found in self._values.items()}

    def _scores(self) -> pd.Series:
        """By task, group, method, metric and seed: the mean over the domains, of seeds that have them all.

        Domains without votes have none for any method; any other gap leaves the seed out, because a mean over fewer
        domains could not be compared.
        """
        long = self.domains.melt([*_LEVELS[:3], "seed", "vote_entropy"], list(METRICS), "metric")
        long = long[(long["metric"] != VOTES) | long["vote_entropy"].notna()].astype({"value": float})
        groups = long.groupby([*_LEVELS, "seed"])["value"]
        return groups.mean()[groups.count() == groups.size()]

    def _costs(self) -> pd.Series:
        rows = []
        for (task, method, seed), cell in self.cells.items():
            ready = cell["cost"]["train_seconds"] + cell["cost"]["fit_seconds"]
            costs = {**cell["cost"], "ready_seconds": ready}
            rows += [(task, COST, method, metric, seed, value) for metric, value in costs.items()]
        frame = pd.DataFrame(rows, columns=[*_LEVELS, "seed", "value"]).astype({"value": float})
        return frame.set_index([*_LEVELS, "seed"])["value"].dropna()

    @property
    def views(self) -> list[str]:
        """What is reported: the mean over the tasks if there are several, and each task."""
        return [ALL, *self.tasks] if len(self.tasks) > 1 else self.tasks

    def groups(self, task: str) -> list[str]:
        """The groups of domains that `task` was tested on."""
        return [group for group in GROUPS if self.metrics(task, group)]

    def metrics(self, task: str, group: str) -> list[str]:
        """The metrics that some method has there, in the order of tables."""
        return [key for key in METRICS if any((task, group, name, key) in self._values for name in self.methods)]

    def title(self, method: str) -> str:
        """The method's name in tables and plots."""
        return str(self.record["methods"][method]["title"])

    def kind(self, method: str) -> str:
        """What the method is here for."""
        about = self.record["methods"][method]
        if method == BASELINE or about["ablation"]:
            return "baseline" if method == BASELINE else "ablation"
        return "IVON" if method.startswith("ivon") or about["base"] == "ivon" else "peer"

    def score(self, task: str, group: str, method: str, metric: str) -> Estimate | None:
        """Mean and error over the seeds; None without a value. With the group `COST`, `metric` is a cost."""
        return self._estimates.get((task, group, method, metric))

    def cost(self, task: str, method: str, key: str) -> Estimate | None:
        """Mean and error over the seeds of one of the record's costs, or of `ready_seconds`: training and fit."""
        return self.score(task, COST, method, key)

    def difference(self, task: str, group: str, method: str, metric: str, to: str = BASELINE) -> Estimate | None:
        """The mean of `method` less `to`, paired: over the seeds that both have. None without such a seed."""
        one, other = (self._values.get((task, group, name, metric)) for name in (method, to))
        return None if one is None or other is None else _estimate((one - other).dropna())

    def ranking(self, task: str, group: str, metric: str) -> dict[str, int]:
        """Methods by rank of their mean, the best first; equal ones share the better rank."""
        scores = {method: self.score(task, group, method, metric) for method in self.methods}
        means = pd.Series({method: score.mean for method, score in scores.items() if score is not None}, dtype=float)
        ranks = means.rank(method="min", ascending=not METRICS[metric].higher).sort_values(kind="stable")
        return {str(method): int(rank) for method, rank in ranks.items()}

    def comparisons(self) -> list[tuple[str, str, str]]:
        """Every task, group and metric that some method has."""
        return [(t, group, metric) for t in self.tasks for group in GROUPS for metric in self.metrics(t, group)]

    def lost(self) -> Iterator[tuple[str, str, str, str, list[str]]]:
        """Task, group and metric where others have a better mean than the best of IVON's, that one, and the others."""
        for task, group, metric in self.comparisons():
            ranks = self.ranking(task, group, metric)
            for ours in [method for method in ranks if method in self.ours][:1]:
                if better := [method for method in ranks if ranks[method] < ranks[ours]]:
                    yield task, group, metric, ours, better

    def tally(self, method: str, other: str) -> tuple[int, int, int]:
        """Over all comparisons: how often `method` is decidedly better than `other`, undecided, and decidedly worse."""
        found = {1: 0, 0: 0, -1: 0}
        for task, group, metric in self.comparisons():
            gap = self.difference(task, group, method, metric, other)
            if gap is not None:
                found[0 if not gap.decided else 1 if METRICS[metric].better(gap.mean, 0) else -1] += 1
        return found[1], found[0], found[-1]

    def reliability(self, task: str, group: str, method: str) -> pd.DataFrame:
        """The reliability diagram over all examples of all seeds and domains together.

        Returns:
            ``confidence``, ``accuracy`` and ``count`` of each bin that holds any example.
        """
        chosen = self.domains[(self.domains["method"] == method) & (self.domains["group"] == group)]
        rows = []
        for points in chosen[chosen["task"].eq(task) | (task == ALL)]["reliability"]:
            filled = [(number, count) for number, count in enumerate(points["counts"]) if count]
            for (number, n), confidence, accuracy in zip(filled, points["confidence"], points["accuracy"], strict=True):
                rows.append((number, n * confidence, n * accuracy, n))
        sums = pd.DataFrame(rows, columns=["bin", "confidence", "accuracy", "count"]).groupby("bin").sum()
        return sums.assign(**{key: sums[key] / sums["count"] for key in ("confidence", "accuracy")})


def _estimate(values: pd.Series) -> Estimate | None:
    if values.empty:
        return None
    return Estimate(float(values.mean()), float(values.sem()) if len(values) > 1 else None, tuple(values.index))


def _with_mean_of_tasks(values: pd.Series) -> pd.Series:
    """Adds the mean over the tasks, of the seeds that have a value in each task where any method has one."""
    tasks = values.reset_index().groupby(["group", "metric"])["task"].nunique()
    groups = values.groupby([*_LEVELS[1:], "seed"])
    wanted = tasks.reindex(groups.size().index.droplevel(["method", "seed"]))
    mean = groups.mean()[groups.size().to_numpy() == wanted.to_numpy()]
    return pd.concat([values, pd.concat({ALL: mean}, names=["task"]).reorder_levels([*_LEVELS, "seed"])])
