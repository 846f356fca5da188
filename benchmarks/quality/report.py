"""The report of the quality suite: tables in the terminal, and ``report.md`` with its pictures, from a record alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

from benchmarks.quality import pictures, tables
from benchmarks.quality.summary import ALL, BASELINE, ERRORS, GROUPS, METRICS, VOTES, Summary

PAGE = "report.md"
_SIZES = {
    "steps": "{} training steps",
    "batch_size": "batches of {}",
    "train_size": "{} training examples",
    "validation_size": "{} validation examples",
    "test_size": "{} test examples",
    "shift_size": "{} of every shifted domain",
    "samples": "{} samples where a method samples",
}
_TERMINAL = (*tables.RANKED, VOTES)
_TERMINAL_COSTS = ("extra_parameters", "predict_ms_per_example", "train_seconds", "fit_seconds")
_COSTS = "Training is the base's where a method takes a base's training. Passes of the model are those of one example."
_SEED_LIMIT = 30  # from here on, Student's distribution is the normal one


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """The report's main tables for a terminal of 80 columns: scores, differences to AdamW, costs, and what failed."""
    summary = Summary(record)
    parts = [*_head(summary), "", *tables.domains(summary)]
    for view in summary.views:
        parts += ["", f"## {view}", *_scores(summary, view, _TERMINAL, tables.RANKED)]
        parts += ["", "### Costs", "", *tables.costs(summary, view, _TERMINAL_COSTS)]
    console.print(Markdown("\n".join([*parts, *_problems(summary)])))


def write_report(record: dict[str, Any], folder: Path) -> None:
    """Write ``report.md`` and its pictures.

    Args:
        record: A ``quality.json``, schema 1; it need not be finished.
        folder: Where to write; made if it is not there. Files of an earlier report in it are replaced.

    Raises:
        ValueError: The record has another schema.
    """
    summary = Summary(record)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [*_head(summary), *_what_was_run(summary)]
    for view in summary.views:
        parts += ["", f"## {view}"]
        if view == ALL:
            parts += ["", f"The mean over {len(summary.tasks)} tasks: {', '.join(summary.tasks)}."]
        parts += _scores(summary, view, list(METRICS), list(METRICS))
        if view == summary.views[0]:
            count = f"mean over {len(summary.tasks)} tasks, " if len(summary.tasks) > 1 else ""
            parts += ["", f"### Ranks ({count}1 is best)", "", *tables.ranks(summary)]
        parts += ["", "### Costs", "", *tables.costs(summary, view), "", _COSTS]
        suffix = "" if view == summary.views[0] else f"_{view}"
        for name, caption, figure in pictures.of_view(summary, view):
            figure.savefig(folder / f"{name}{suffix}.png", dpi=pictures.DPI)
            parts += ["", f"![{name.replace('_', ' ')}, {view}]({name}{suffix}.png)", "", caption]
    parts += ["", "## Where IVON does not win", *_lost(summary)]
    parts += ["", "## Hyperparameters", *_hyperparameters(summary)]
    parts += [*_problems(summary), "", "## Environment", *_environment(summary)]
    (folder / PAGE).write_text("\n".join(parts) + "\n", encoding="utf-8")


def _head(summary: Summary) -> Iterator[str]:
    yield "# Quality of predictions"
    if summary.missing or not summary.record["finished"]:
        yield from ("", f"**Not finished: {len(summary.missing)} combinations of task, method and seed have not run.**")


def _what_was_run(summary: Summary) -> Iterator[str]:
    """Sizes and their consequences in words, the domains, and the methods."""
    record, given = summary.record, summary.record["settings"]
    known = {**given, **given.get("amounts", {})}
    sizes = [words.format(known[key]) for key, words in _SIZES.items() if known.get(key) is not None]
    yield from ("", "## What was run", "")
    yield (
        f"{len(summary.methods)} methods on {len(summary.tasks)} tasks, seeds {', '.join(map(str, summary.seeds))}, "
        f"size '{given.get('size')}': {', '.join(sizes)}. What is not named is as the task's recipe has it. Model: "
        f"{given.get('model') or 'SmolLM2-135M'}. Device: {record['device']}, {record['threads']} threads."
    )
    yield from ("", *tables.domains(summary), "")
    yield _meaning_of_errors(len(summary.seeds))
    yield from ("", *tables.methods(summary))


def _meaning_of_errors(seeds: int) -> str:
    """How often chance alone makes a difference "decided", by Student's distribution."""
    if seeds < 2:
        return "One seed has no standard error over seeds: no difference here is decided."
    chance = 2 * stats.t.sf(ERRORS, seeds - 1)
    text = (
        f"± is one standard error over {seeds} seeds: what start, batches and noise change; what other test examples "
        f"would change is not in it. Two methods that are equally good differ by more than {ERRORS:g} standard errors "
        f"in {chance:.0%} of all comparisons"
    )
    if seeds < _SEED_LIMIT:
        text += f" with {seeds} seeds ({2 * stats.norm.sf(ERRORS):.0%} with many)"
    return f"{text}; there are many comparisons here, so some marks are chance."


def _scores(summary: Summary, task: str, wanted: Sequence[str], compared: Sequence[str]) -> Iterator[str]:
    """Scores of a view in the wanted metrics and differences to AdamW in the compared ones, where there are any."""
    if not summary.groups(task):
        yield from ("", "No method has scores.")
        return
    for group in summary.groups(task):
        keys = [key for key in wanted if key in summary.metrics(task, group)]
        yield from ("", f"### Scores {group}", "", *tables.scores(summary, task, group, keys))
        if any(summary.score(task, group, BASELINE, key) for key in keys):
            yield from ("", f"### Difference to AdamW {group}, paired by seed", "")
            yield from tables.differences(summary, task, group, [key for key in compared if key in keys])
    yield from ("", _legend(summary, task))


def _legend(summary: Summary, task: str) -> str:
    """What the numbers and marks of a score table are."""
    text = (
        "Mean over seeds ± its standard error; the best mean of each column is bold. NLL in nats; ECE over 10 equal "
        "bins of the confidence, adaptive ECE over 10 bins of equally many examples; Brier summed over the classes (0 "
        "to 2); AUROC of errors: does confidence tell right from wrong (0.5: not at all); selective accuracy: on the "
        "most confident 80%."
    )
    if any(VOTES in summary.metrics(task, group) for group in GROUPS):
        text += " Votes: cross-entropy to the shares of the raters' votes, in nats; at least the votes' own entropy."
    if task == ALL:
        text += " A seed of a method counts here only with a value in every task that has the metric."
    return text + (
        f" {tables.BETTER} better, {tables.WORSE} worse than AdamW by more than {ERRORS:g} standard errors of the "
        "paired difference."
    )


def _lost(summary: Summary) -> Iterator[str]:
    """What is better than IVON, and the whole of the comparisons."""
    if not summary.ours:
        yield from ("", "No method of IVON's was run.")
        return
    found = list(summary.lost())
    total = len(summary.comparisons())
    decided = 0
    for task, group, metric, ours, ahead in found:
        gaps = [summary.difference(task, group, ours, metric, method) for method in ahead]
        decided += any(gap is not None and gap.decided for gap in gaps)
    yield ""
    yield (
        f"Of {total} combinations of task, domains and metric, another method has a better mean than every method of "
        f"IVON's in {len(found)}, and in {decided} of these one is better by more than {ERRORS:g} standard errors "
        f"({tables.WORSE}). Taking the best of IVON's methods after the fact favours IVON; the second table does not "
        "do that."
    )
    if found:
        yield from ("", *tables.lost(summary))
    yield ""
    yield (
        "Each of IVON's methods (columns) against each other method (rows), over the same combinations: better by more "
        f"than {ERRORS:g} standard errors / undecided / worse by more than that."
    )
    yield from ("", *tables.tallies(summary))


def _hyperparameters(summary: Summary) -> Iterator[str]:
    """What was tried on the validation split, and what was chosen."""
    yield from ("", "Scores on the validation split; the chosen candidate is bold.")
    for task in summary.tasks:
        yield from ("", f"### {task}", "", *tables.tried(summary, task))
        chosen = tables.dials(summary, task)
        if chosen:
            yield from ("", *chosen)


def _problems(summary: Summary) -> Iterator[str]:
    if summary.failed:
        yield from ("", "## What failed", "", *tables.problems(summary, summary.failed))
    if summary.missing:
        yield from ("", "## What has not run", "", *tables.problems(summary, summary.missing))


def _environment(summary: Summary) -> Iterator[str]:
    """What it ran on, and all settings."""
    known = {name: value for name, value in summary.record["environment"].items() if name != "versions"}
    versions = summary.record["environment"].get("versions", {})
    yield ""
    for name, value in known.items():
        yield f"- {name}: {value}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield from ("", "```json", json.dumps(summary.record["settings"], indent=2), "```")
