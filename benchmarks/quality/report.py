"""The report of the quality suite: tables in the terminal, and ``report.md`` with its pictures, from a record alone.

What the page says is in ``report.md.jinja``; here are its tables.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

from benchmarks.quality import pictures
from benchmarks.quality.summary import (
    BASELINE,
    BETTER,
    COST,
    COSTS,
    ERRORS,
    GROUPS,
    METRICS,
    VOTES,
    WORSE,
    Estimate,
    Summary,
    bold,
    mark,
    number,
)
from benchmarks.tables import NOTHING

PAGE = "report.md"
RANKED = ("accuracy", "nll", "ece")  # metrics of the tables that have no room for all
_SIZES = {
    "steps": "{} training steps",
    "batch_size": "batches of {}",
    "train_size": "{} training examples",
    "validation_size": "{} validation examples",
    "test_size": "{} test examples",
    "shift_size": "{} of every shifted domain",
    "samples": "{} samples where a method samples",
}


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """The report's main tables for a terminal of 80 columns: scores, differences to AdamW, costs, and what failed."""
    priced = ("extra_parameters", "predict_ms_per_example", "train_seconds", "fit_seconds")
    options = {"page": False, "wanted": (*RANKED, VOTES), "compared": RANKED, "priced": priced}
    console.print(Markdown(render(PAGE, record, summary=Summary(record), **options)))


def write_report(record: dict[str, Any], folder: Path) -> None:
    """Writes ``report.md`` and its pictures over those of an earlier report, from a record that may be unfinished."""
    summary = Summary(record)
    folder.mkdir(parents=True, exist_ok=True)
    shown = defaultdict(list)
    for view in summary.views:
        for name, figure in pictures.of_view(summary, view):
            file = f"{name}.png" if view == summary.views[0] else f"{name}_{view}.png"
            figure.savefig(folder / file, dpi=pictures.DPI)
            shown[view].append((name, file))
    options = {"page": True, "wanted": METRICS, "compared": METRICS, "priced": COSTS, "pictures": shown}
    (folder / PAGE).write_text(render(PAGE, record, summary=summary, **options) + "\n", encoding="utf-8")


def render(name: str, record: Mapping[str, Any], **options: Any) -> str:
    """A page by its template, which may call the tables below."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters["paragraph"] = lambda text: " ".join(text.split()) + "\n"
    words = (chance, costs, dials, differences, domains, lost, methods, problems, ranks, scores, sizes, tallies, tried)
    environment.globals |= {function.__name__: function for function in words}
    environment.globals |= {"json": partial(json.dumps, indent=2), "errors": f"{ERRORS:g}"}
    environment.globals |= {"votes": VOTES, "better": BETTER, "worse": WORSE}
    template = environment.get_template(f"{name}.jinja")
    return template.render(record=record, settings=record["settings"], **options).strip()


def chance(seeds: int | None) -> str:
    """How often chance alone makes a difference "decided", by Student's distribution; None is for many seeds."""
    return f"{2 * (stats.norm.sf(ERRORS) if seeds is None else stats.t.sf(ERRORS, seeds - 1)):.0%}"


def sizes(settings: Mapping[str, Any]) -> str:
    """How much was trained and judged, in words."""
    known = {**settings, **settings.get("amounts", {})}
    return ", ".join(words.format(known[key]) for key, words in _SIZES.items() if known.get(key) is not None)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others are numbers. No text can break a row."""
    rule = [":---" if number < left else "---:" for number in range(len(header))]
    cells = [[" ".join(text.split()).replace("|", r"\|") for text in row] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def settings(values: Mapping[str, float]) -> str:
    """Hyperparameters in a line."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items()) or "none"


def _by_method(
    summary: Summary,
    titles: Mapping[str, str],
    find: Callable[[str, str], Estimate],
    show: Callable[[Estimate, str], str],
    without: str | None = None,
) -> str:
    """A row for every method, which says how many seeds it is about if some are missing; a column for every title."""
    rows = []
    for method in summary.methods:
        found = [find(method, key) for key in titles]
        seeds, title = len({seed for value in found for seed in value.seeds}), summary.title(method)
        if seeds < len(summary.seeds):
            title += f" ({seeds} of {len(summary.seeds)} seeds)" if seeds else " (no scores)"
        if method != without:
            rows.append([title, *map(show, found, titles)])
    return table(["", *titles.values()], rows)


def scores(summary: Summary, task: str, group: str, keys: Sequence[str]) -> str:
    """These metrics of every method; the best of each column is bold."""
    find = partial(summary.score, task, group)
    best = {key: find(next(iter(summary.ranking(task, group, key))), key).mean for key in keys}
    titles = {key: METRICS[key] for key in keys}
    return _by_method(summary, titles, find, lambda value, key: bold(number(value), value.mean == best[key]))


def differences(summary: Summary, task: str, group: str, keys: Sequence[str]) -> str:
    """Every method less AdamW, where that has scores, paired by seed; marked where it is decided."""
    if not any(summary.score(task, group, BASELINE, key).seeds for key in keys):
        return ""
    titles = {key: METRICS[key] for key in keys}
    return _by_method(summary, titles, partial(summary.difference, task, group), mark, without=BASELINE)


def costs(summary: Summary, task: str, keys: Sequence[str] = tuple(COSTS)) -> str:
    """These costs of every method, the mean over the seeds."""

    def show(value: Estimate, key: str) -> str:
        return f"{value.mean:{COSTS[key][1]}}" if value.seeds else NOTHING

    return _by_method(summary, {key: COSTS[key][0] for key in keys}, partial(summary.score, task, COST), show)


def ranks(summary: Summary) -> str:
    """The mean rank over the tasks in which a method has a value, in distribution and under shift."""
    found = {}
    for group in GROUPS:
        for key in RANKED:
            ranks = [summary.ranking(task, group, key) for task in summary.tasks if key in summary.metrics(task, group)]
            if ranks:
                found[f"{METRICS[key]}, {group}"] = pd.DataFrame(ranks).mean().map("{:.3g}".format)
    shown = pd.DataFrame(found, index=list(summary.methods)).fillna(NOTHING)
    return table(["", *shown], [[summary.title(str(method)), *row] for method, row in shown.iterrows()])


def domains(summary: Summary) -> str:
    """What was tested on what, how many examples that are, and what chance alone does to an accuracy."""
    rows = []
    for (task, domain, shift), found in summary.domains.groupby(["task", "domain", "shift"], sort=False):
        accuracy, sizes = found["accuracy"].astype(float), found["examples"].astype(int)
        error = (accuracy * (1 - accuracy) / sizes).max() ** 0.5
        floor = found["vote_entropy"].astype(float).mean()
        counts = " to ".join(str(size) for size in sorted(sizes.unique()))
        entropy = NOTHING if pd.isna(floor) else f"{floor:.3f}"
        rows.append([task, f"{domain} (shift)" if shift else domain, counts, f"{error:.3f}", entropy])
    header = ["trained on", "tested on", "examples", "accuracy ±", "votes' entropy"]
    return table(header, rows, left=2)


def tried(summary: Summary, task: str) -> str:
    """Every candidate of every method with its scores on the validation split; the chosen one is bold."""
    rows = []
    for method, search in summary.record["hyperparameters"].get(task, {}).items():
        if not search["tried"]:
            rows.append([summary.title(method), f"**{settings(search['chosen'])}** (given)", *[NOTHING] * len(RANKED)])
        for candidate in search["tried"]:
            scores = candidate["scores"] or {}
            values = [NOTHING if (v := scores.get(key)) is None else f"{v:.3f}" for key in RANKED]
            reason = f": {candidate['error']}" if candidate["error"] else ""
            text = bold(settings(candidate["hyper"]), candidate["hyper"] == search["chosen"])
            rows.append([summary.title(method), f"{text}{reason}", *values])
    return table(["", "candidate", *(METRICS[key] for key in RANKED)], rows, left=2)


def lost(summary: Summary) -> dict[str, Any]:
    """Where others are better than the best of IVON: the table, how many rows it has, and how many are decided."""
    rows, decided = [], 0
    for task, group, metric, ours, ahead in summary.lost():
        shown = {m: f"{summary.title(m)} {number(summary.score(task, group, m, metric))}" for m in (ours, *ahead)}
        gaps = {m: summary.difference(task, group, ours, metric, m) for m in ahead}
        decided += any(gap.verdict(metric) for gap in gaps.values())
        better = "; ".join(f"{shown[m]} ({mark(gap, metric)})" for m, gap in gaps.items())
        rows.append([task, group, METRICS[metric], shown[ours], better])
    header = ["task", "domains", "metric", "the best of IVON", "better ones (IVON less it)"]
    return {"count": len(rows), "decided": decided, "table": table(header, rows, left=5)}


def tallies(summary: Summary) -> str:
    """Each of IVON's methods against each other method: better, undecided and worse, over everything compared."""
    rows = [
        [summary.title(other), *(" / ".join(map(str, summary.tally(ours, other))) for ours in summary.ours)]
        for other in summary.methods
        if other not in summary.ours
    ]
    return table(["", *map(summary.title, summary.ours)], rows)


def methods(summary: Summary) -> str:
    """What the methods are and where they are described."""
    rows = [
        (
            about["title"],
            summary.kind(name),
            summary.title(about["base"]) if about["base"] else NOTHING,
            about["source"],
        )
        for name, about in summary.methods.items()
    ]
    return table(["", "kind", "takes the training of", "source"], rows, left=4)


def dials(summary: Summary, task: str) -> str:
    """The dials that were chosen for every trained model; empty if no method has any."""
    rows = []
    for method in summary.methods:
        cells = {seed: cell for seed in summary.seeds if (cell := summary.cells.get((task, method, seed)))}
        if any(cell["dials"] for cell in cells.values()):
            chosen = [f"seed {seed}: {settings(cell['dials'])}" for seed, cell in cells.items()]
            rows.append([summary.title(method), "; ".join(chosen)])
    return table(["", "chosen dials"], rows, left=2) if rows else ""


def problems(summary: Summary, cells: Sequence[tuple[Any, ...]]) -> str:
    """The cells without scores, with their reasons; seeds with the same one share a row."""
    frame = pd.DataFrame(cells, columns=["task", "method", "seed", "reason"]).astype({"seed": str})
    rows = [
        [task, summary.title(method), ", ".join(found["seed"]), reason]
        for (task, method, reason), found in frame.groupby(["task", "method", "reason"], sort=False)
    ]
    return table(["task", "method", "seeds", "reason"], rows, left=4)
