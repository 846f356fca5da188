"""The tables of the quality report, as Markdown, which the terminal shows too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.quality.summary import BASELINE, GROUPS, METRICS, Estimate, Summary

BETTER, WORSE = "✓", "✗"
NOTHING = "-"
RANKED = ("accuracy", "nll", "ece")
"""Metrics of the tables that have no room for all."""
COSTS: Mapping[str, tuple[str, str]] = {
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


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a Markdown table; the first `left` columns are text, the others are numbers."""
    rule = [":---" if number < left else "---:" for number in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def number(value: Estimate | None, *, signed: bool = False) -> str:
    """A mean with its standard error."""
    if value is None:
        return NOTHING
    mean = f"{value.mean:{'+' if signed else ''}.3f}"
    return mean if value.error is None else f"{mean} ± {value.error:.3f}"


def mark(value: Estimate | None, key: str) -> str:
    """A difference, with a mark for better or worse if it is decided."""
    if value is None or not value.decided:
        return number(value, signed=True)
    return f"{number(value, signed=True)} {BETTER if METRICS[key].better(value.mean, 0) else WORSE}"


def bold(text: str, chosen: bool) -> str:
    """The text, bold where it is the chosen one."""
    return f"**{text}**" if chosen else text


def settings(values: Mapping[str, float] | None) -> str:
    """Hyperparameters in a line."""
    return ", ".join(f"{name} {value:g}" for name, value in (values or {}).items()) or "none"


def cell_text(text: str) -> str:
    """Text that cannot break a row of a table."""
    return " ".join(text.split()).replace("|", r"\|")


def _by_method(
    summary: Summary,
    header: Sequence[str],
    find: Callable[[str], Sequence[Estimate | None]],
    show: Callable[[Estimate | None, int], str],
    *,
    without: str | None = None,
) -> list[str]:
    """A row for every method, which says how many seeds it is about if some are missing."""
    rows = []
    for method in summary.methods:
        if method != without:
            found = find(method)
            seeds = len({seed for value in found if value is not None for seed in value.seeds})
            title = cell_text(summary.title(method))
            if seeds < len(summary.seeds):
                title += f" ({seeds} of {len(summary.seeds)} seeds)" if seeds else " (no scores)"
            rows.append([title, *(show(value, column) for column, value in enumerate(found))])
    return table(["", *header], rows)


def scores(summary: Summary, task: str, group: str, keys: Sequence[str]) -> list[str]:
    """These metrics of every method; the best of each column is bold."""
    leaders = {key: next(iter(summary.ranking(task, group, key))) for key in keys}
    best = [summary.score(task, group, leader, key) for key, leader in leaders.items()]

    def show(value: Estimate | None, column: int) -> str:
        top = best[column]
        return bold(number(value), value is not None and top is not None and value.mean == top.mean)

    header = [METRICS[key].title for key in keys]
    return _by_method(summary, header, lambda method: [summary.score(task, group, method, key) for key in keys], show)


def differences(summary: Summary, task: str, group: str, keys: Sequence[str]) -> list[str]:
    """Every method less AdamW in these metrics, paired by seed; marked where it is decided."""
    return _by_method(
        summary,
        [METRICS[key].title for key in keys],
        lambda method: [summary.difference(task, group, method, key) for key in keys],
        lambda value, column: mark(value, keys[column]),
        without=BASELINE,
    )


def costs(summary: Summary, task: str, keys: Sequence[str] = tuple(COSTS)) -> list[str]:
    """These costs of every method, the mean over the seeds."""
    return _by_method(
        summary,
        [COSTS[key][0] for key in keys],
        lambda method: [summary.cost(task, method, key) for key in keys],
        lambda value, column: NOTHING if value is None else f"{value.mean:{COSTS[keys[column]][1]}}",
    )


def ranks(summary: Summary) -> list[str]:
    """The mean rank over the tasks in which a method has a value, in distribution and under shift."""
    every = pd.DataFrame(
        {
            (f"{METRICS[key].title}, {group}", task): pd.Series(summary.ranking(task, group, key))
            for group in GROUPS
            for key in RANKED
            for task in summary.tasks
            if key in summary.metrics(task, group)
        },
        index=list(summary.methods),
    )
    mean = every.T.groupby(level=0, sort=False).mean().T if every.size else every
    rows = [
        [cell_text(summary.title(str(method))), *(NOTHING if pd.isna(rank) else f"{rank:.3g}" for rank in found)]
        for method, found in mean.iterrows()
    ]
    return table(["", *mean.columns], rows)


def lost(summary: Summary) -> list[str]:
    """Where a method that is not IVON's has a better mean than every method of IVON's."""
    rows = []
    for task, group, metric, ours, ahead in summary.lost():
        shown = {
            m: f"{cell_text(summary.title(m))} {number(summary.score(task, group, m, metric))}" for m in (ours, *ahead)
        }
        gaps = [f"{shown[m]} ({mark(summary.difference(task, group, ours, metric, m), metric)})" for m in ahead]
        rows.append([task, group, METRICS[metric].title, shown[ours], "; ".join(gaps)])
    return table(["task", "domains", "metric", "the best of IVON", "better ones (IVON less it)"], rows, left=5)


def tallies(summary: Summary) -> list[str]:
    """Each of IVON's methods against each other method: better, undecided and worse, over everything compared."""
    rows = [
        [cell_text(summary.title(other)), *(" / ".join(map(str, summary.tally(ours, other))) for ours in summary.ours)]
        for other in summary.methods
        if other not in summary.ours
    ]
    return table(["", *(cell_text(summary.title(ours)) for ours in summary.ours)], rows)


def domains(summary: Summary) -> list[str]:
    """What was tested on what, how many examples that are, and what chance alone does to an accuracy."""
    rows = []
    for (task, domain, shift), found in summary.domains.groupby(["task", "domain", "shift"], sort=False):
        accuracy, sizes = found["accuracy"].astype(float), found["examples"]
        error = (accuracy * (1 - accuracy) / sizes).max() ** 0.5
        floor = found["vote_entropy"].astype(float).mean()
        place = f"{domain} (shift)" if shift else str(domain)
        counts = " to ".join(str(size) for size in sorted(sizes.unique()))
        rows.append([str(task), place, counts, f"{error:.3f}", NOTHING if pd.isna(floor) else f"{floor:.3f}"])
    header = ["trained on", "tested on", "examples", "accuracy ±", "votes' entropy"]
    note = "accuracy ±: one standard error of an accuracy on this many examples; the largest of all methods and seeds."
    return [*table(header, rows, left=2), "", note]


def methods(summary: Summary) -> list[str]:
    """What the methods are and where they are described."""
    rows = []
    for name, about in summary.methods.items():
        base = summary.title(about["base"]) if about["base"] in summary.methods else about["base"] or NOTHING
        rows.append([cell_text(about["title"]), summary.kind(name), cell_text(base), cell_text(about["source"])])
    return table(["", "kind", "takes the training of", "source"], rows, left=4)


def tried(summary: Summary, task: str) -> list[str]:
    """Every candidate of every method with its scores on the validation split; the chosen one is bold."""
    rows = []
    for method, search in summary.record["hyperparameters"].get(task, {}).items():
        name = cell_text(summary.title(method)) if method in summary.methods else method
        if not search["tried"]:
            rows.append([name, f"**{settings(search['chosen'])}** (given)", *[NOTHING] * len(RANKED)])
        for candidate in search["tried"]:
            scores = candidate["scores"] or {}
            values = [NOTHING if (v := scores.get(key)) is None else f"{v:.3f}" for key in RANKED]
            reason = f": {cell_text(candidate['error'])}" if candidate["error"] else ""
            text = bold(settings(candidate["hyper"]), candidate["hyper"] == search["chosen"])
            rows.append([name, f"{text}{reason}", *values])
    return table(["", "candidate", *(METRICS[key].title for key in RANKED)], rows, left=2)


def dials(summary: Summary, task: str) -> list[str]:
    """The dials that were chosen for every trained model; no line if no method has any."""
    rows = []
    for method in summary.methods:
        cells = {seed: cell for seed in summary.seeds if (cell := summary.cells.get((task, method, seed)))}
        if any(cell["dials"] for cell in cells.values()):
            chosen = [f"seed {seed}: {settings(cell['dials'])}" for seed, cell in cells.items()]
            rows.append([cell_text(summary.title(method)), "; ".join(chosen)])
    return table(["", "chosen dials"], rows, left=2) if rows else []


def problems(summary: Summary, cells: Sequence[tuple[Any, ...]]) -> list[str]:
    """The cells without scores, with their reasons; seeds with the same one share a row."""
    frame = pd.DataFrame(cells, columns=["task", "method", "seed", "reason"]).astype({"seed": str})
    rows = []
    for (task, method, reason), found in frame.groupby(["task", "method", "reason"], sort=False):
        title = summary.title(method) if method in summary.methods else method
        rows.append([task, cell_text(title), ", ".join(found["seed"]), cell_text(reason)])
    return table(["task", "method", "seeds", "reason"], rows, left=4)
