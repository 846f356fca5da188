"""What a record of the quality suite says: means over seeds with their errors, paired differences, and ranks.

Everything is computed from the record alone, a ``quality.json`` that was read; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd

from benchmarks.tables import NOTHING

BASELINE = "adamw"  # the method that all others are compared with
ALL = "all tasks"  # in place of a task: the mean over all of them, seed by seed
IN, SHIFT, COST = "in distribution", "under shift", "cost"
GROUPS = (IN, SHIFT)  # groups of domains. A seed's value under shift is the mean over the shifted domains.
ERRORS = 2.0  # A difference counts as decided beyond this many standard errors
BETTER, WORSE = "✓", "✗"
VOTES = "vote_cross_entropy"
KINDS = ("baseline", "peer", "IVON", "ablation")  # what a method is here for, in the order of tables
_ABOUT = ["task", "group", "method", "seed"]
_NONE = pd.Series(dtype=float)
METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "ece_adaptive": "adaptive ECE",
    "brier": "Brier",
    "auroc_errors": "AUROC of errors",
    "selective_accuracy": "selective accuracy",
    VOTES: "votes",
}
"""What tables call the fields of `ivon_kernels.predict.metrics.Scores`."""
HIGHER = ("accuracy", "auroc_errors", "selective_accuracy")  # the metrics that are better when they are higher
COSTS = {
    "extra_parameters": ("extra parameters", ",.0f"),
    "passes": ("passes of the model", ".3g"),
    "predict_ms_per_example": ("prediction, ms per example", ".1f"),
    "train_seconds": ("training, s", ".1f"),
    "fit_seconds": ("fit after it, s", ".1f"),
    "tune_seconds": ("choosing dials, s", ".1f"),
    "train_peak_mb": ("training, peak MB", ",.0f"),
    "predict_peak_mb": ("prediction, peak MB", ",.0f"),
}
"""By the record's keys: title and format."""
READY = "ready_seconds"  # the cost of training and fit together


@dataclass(frozen=True)
class Estimate:
    """A mean over `seeds`, nan without any; its standard error (ddof 1) is None for fewer than two."""

    mean: float
    error: float | None
    seeds: tuple[int, ...]

    @staticmethod
    def of(by_seed: pd.Series) -> Estimate:
        """From the values of the seeds, nan where there is none."""
        values = by_seed.dropna().sort_index()
        return Estimate(float(values.mean()), float(values.sem()) if len(values) > 1 else None, tuple(values.index))

    def verdict(self, metric: str) -> int:
        """Of a difference: 1 if it is better and -1 if it is worse by more than `ERRORS` standard errors, else 0."""
        if self.error is None or abs(self.mean) <= ERRORS * self.error:
            return 0
        return 1 if (self.mean > 0) == (metric in HIGHER) else -1


class Summary:
    """A record, summarised: tasks, seeds, and methods by kind and title, of which `ours` are IVON's.

    `views` are what is reported: the mean over the tasks if there are several, and each task. `cells` are those with
    scores, `domains` has a row for each domain of each; `failed` and `missing` are task, method, seed and reason.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        if record.get("schema") != 1:
            raise ValueError(f"This record has schema {record.get('schema')}; the report reads schema 1.")
        self.record = record
        order = sorted(record["methods"], key=lambda name: (KINDS.index(self.kind(name)), self.title(name)))
        self.methods = {method: record["methods"][method] for method in order}
        self.ours = [method for method in order if self.kind(method) == "IVON"]
        self.tasks, self.seeds = (list(record["settings"][name]) for name in ("tasks", "seeds"))
        self.views = [ALL, *self.tasks] if len(self.tasks) > 1 else self.tasks
        known = {(cell["task"], cell["method"], cell["seed"]): cell for cell in record["cells"]}
        self.failed = [(*key, cell["error"]) for key, cell in known.items() if cell["error"] is not None]
        wanted = product(self.tasks, order, self.seeds)
        self.missing = [(*key, "has not run") for key in wanted if key not in known]
        self.cells = {key: cell for key, cell in known.items() if cell["error"] is None}
        columns = [*_ABOUT, "domain", "shift", "examples", "vote_entropy", "reliability", *METRICS, *COSTS, READY]
        rows = pd.DataFrame(self._rows(), columns=columns)
        self.domains = rows[rows["group"] != COST]
        self._values = _by_seed(rows)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for cell in self.cells.values():
            about, cost = {name: cell[name] for name in ("task", "method", "seed")}, cell["cost"]
            for found in cell["domains"]:
                group = SHIFT if found["shift"] else IN
                yield {**found, **found["scores"], **about, "group": group, "domain": found["task"]}
            yield {**cost, **about, "group": COST, READY: cost["train_seconds"] + cost["fit_seconds"]}

    def groups(self, task: str) -> list[str]:
        """The groups of domains that `task` was tested on."""
        return [group for group in GROUPS if self.metrics(task, group)]

    def metrics(self, task: str, *groups: str) -> list[str]:
        """The metrics that some method has in one of the groups, in the order of tables."""
        wanted = list(product(groups, self.methods))
        return [key for key in METRICS if any((task, group, key, method) in self._values for group, method in wanted)]

    def title(self, method: str) -> str:
        return str(self.record["methods"][method]["title"])

    def kind(self, method: str) -> str:
        """What the method is here for: one of `KINDS`."""
        about = self.record["methods"][method]
        if method == BASELINE or about["ablation"]:
            return "baseline" if method == BASELINE else "ablation"
        return "IVON" if method.startswith("ivon") or about["base"] == "ivon" else "peer"

    def score(self, task: str, group: str, method: str, metric: str) -> Estimate:
        """Mean and error over the seeds. With the group `COST`, `metric` is a cost."""
        return Estimate.of(self._values.get((task, group, metric, method), _NONE))

    def difference(self, task: str, group: str, method: str, metric: str, to: str = BASELINE) -> Estimate:
        """The mean of `method` less `to`, paired: over the seeds that both have."""
        one, other = (self._values.get((task, group, metric, name), _NONE) for name in (method, to))
        return Estimate.of(one - other)

    def ranking(self, task: str, group: str, metric: str) -> dict[str, int]:
        """Methods by rank of their mean, the best first; equal ones share the better rank."""
        means = pd.Series({method: self.score(task, group, method, metric).mean for method in self.methods})
        ranks = means.dropna().rank(method="min", ascending=metric not in HIGHER).sort_values(kind="stable")
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
        gaps = [(self.difference(t, group, method, key, other), key) for t, group, key in self.comparisons()]
        verdicts = [gap.verdict(key) for gap, key in gaps if gap.seeds]
        return verdicts.count(1), verdicts.count(0), verdicts.count(-1)

    def reliability(self, task: str, group: str, method: str) -> pd.DataFrame:
        """``confidence``, ``accuracy`` and ``count`` of each filled bin, over all examples of all seeds and domains."""
        chosen = self.domains[(self.domains["method"] == method) & (self.domains["group"] == group)]
        rows = []
        for points in chosen[chosen["task"].eq(task) | (task == ALL)]["reliability"]:
            filled = [(number, count) for number, count in enumerate(points["counts"]) if count]
            for (number, n), confidence, accuracy in zip(filled, points["confidence"], points["accuracy"], strict=True):
                rows.append((number, n * confidence, n * accuracy, n))
        sums = pd.DataFrame(rows, columns=["bin", "confidence", "accuracy", "count"]).groupby("bin").sum()
        return sums.assign(**{key: sums[key] / sums["count"] for key in ("confidence", "accuracy")})


def _by_seed(rows: pd.DataFrame) -> dict[Any, pd.Series]:
    """The values by seed, of every task (and the mean of them all), group, metric and method that has any.

    A value is the mean over the domains of a group. Domains without votes have none for any method; any other gap
    leaves the seed out, because a mean over fewer domains, or fewer tasks, could not be compared.
    """
    long = rows.melt([*_ABOUT, "vote_entropy"], [*METRICS, *COSTS, READY], "metric").astype({"value": float})
    domains = long[(long["metric"] != VOTES) | long["vote_entropy"].notna()].groupby([*_ABOUT, "metric"])["value"]
    values = domains.mean()[domains.count() == domains.size()]
    if values.empty:
        return {}
    table = values.unstack(["method", "seed"])  # a row for every task, group and metric that some method has
    tasks = table.groupby(["group", "metric"])
    mean = tasks.mean().where(tasks.count().eq(tasks.size(), axis=0))
    by_method = pd.concat([table, pd.concat({ALL: mean}, names=["task"])]).stack("method")
    return {key: seeds for key, seeds in by_method.iterrows() if seeds.notna().any()}


def heading(key: str, group: str = IN, *, scaled: bool = False) -> str:
    """What tables call a metric: in distribution unless it says otherwise, and without a temperature."""
    return METRICS[key] + (", scaled" if scaled else "") + (", shift" if group == SHIFT else "")


def number(value: Estimate, *, signed: bool = False) -> str:
    """A mean with its standard error."""
    mean = f"{value.mean:{'+' if signed else ''}.3f}" if value.seeds else NOTHING
    return mean if value.error is None else f"{mean} ± {value.error:.3f}"


def mark(value: Estimate, metric: str) -> str:
    """A difference, with a mark for better or worse if it is decided."""
    return number(value, signed=True) + ("", f" {BETTER}", f" {WORSE}")[value.verdict(metric)]


def bold(text: str, chosen: bool) -> str:
    """The text, bold where it is the chosen one."""
    return f"**{text}**" if chosen else text
