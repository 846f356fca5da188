"""The report of a study that reports several numbers of passes: ``report.md``, from its record alone.

What the page says is in ``passes.md.jinja``; here are its tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.quality import pictures
from benchmarks.quality.passes import Row, expand, rows_of
from benchmarks.quality.report import PAGE, render, table
from benchmarks.quality.settings import kind_of
from benchmarks.quality.summary import (
    COST,
    GROUPS,
    HIGHER,
    IN,
    METRICS,
    SHIFT,
    Estimate,
    Summary,
    bold,
    heading,
    mark,
    number,
)
from benchmarks.tables import NOTHING

TEMPLATE = "passes.md"
DECIDED_BY = ("accuracy", "nll", "ece", "brier")  # what wins are counted in
PICTURE = "passes.png"
FOR_LORA = "ivon_for_lora"  # what variants of IVON are compared with


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """The wins and the scores for a terminal."""
    ways = Ways(record)
    console.print(Markdown(render(TEMPLATE, record, summary=ways.summary, ways=ways, page=False)))


def write_report(record: dict[str, Any], folder: Path) -> None:
    """Writes ``report.md`` and its picture, from a record that may be unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    ways = Ways(record)
    draw(ways).savefig(folder / PICTURE, dpi=pictures.DPI)
    text = render(TEMPLATE, record, summary=ways.summary, ways=ways, page=True, picture=PICTURE)
    (folder / PAGE).write_text(text + "\n", encoding="utf-8")


class Ways:
    """A record of passes, summarised: `methods` by name in the order of tables, and the rows of each.

    `ours` are IVON's and `rivals` the others; `variants` are what was tried on top of `FOR_LORA`, and of these the
    ablations are not among `ours`.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record, self.summary = record, Summary(expand(record))
        self.rows = sorted({row for cell in record["cells"] for row, _ in rows_of(cell)})
        self._sampling = {row.method for row in self.rows if row.samples > 1}
        with_rows = {row.method for row in self.rows}
        order = sorted(record["methods"], key=lambda name: (name.startswith("ivon"), name != "adamw", name))
        self.methods = [name for name in order if name in with_rows]
        ivon, about = [name for name in self.methods if name.startswith("ivon")], record["methods"]
        self.ours = [name for name in ivon if not about[name]["ablation"]]
        self.rivals = [name for name in self.methods if name not in ivon]
        on_top = [name for name in ivon if about[name]["ablation"] or about[name]["base"] == FOR_LORA]
        self.variants = on_top if FOR_LORA in ivon else []

    @cached_property
    def counts(self) -> list[int]:
        """All the numbers of passes that some method was judged with."""
        return sorted({row.samples for row in self.rows})

    def at(self, method: str, passes: int, scaled: bool) -> Row:
        """The method with so many passes, or the most that it has below that; scaled where it is nothing else."""
        have = [row for row in self.rows if row.method == method and row.samples <= passes]
        return max(have, key=lambda row: (row.scaled == scaled, row.samples))

    def has(self, row: Row) -> bool:
        return row in self.rows

    def name(self, row: Row) -> str:
        """What the summary calls it."""
        return row.name(row.method in self._sampling)

    def called(self, row: Row) -> str:
        """What tables call it."""
        return self.summary.title(self.name(row))

    def brief(self, view: str, row: Row) -> str:
        """The method, and in brackets the passes of a prediction where they are several."""
        passes = round(self.score(view, COST, row, "passes").mean)
        return self.title(row.method) + (f" ({passes})" if passes > 1 else "")

    def title(self, method: str) -> str:
        return str(self.record["methods"][method]["title"])

    def seen(self, view: str) -> list[str]:
        """The methods that have scores there: of a mean over tasks, on all of them."""
        rows = {method: self.at(method, max(self.counts), False) for method in self.methods}
        return [method for method, row in rows.items() if self.score(view, IN, row, "nll").seeds]

    def score(self, view: str, group: str, row: Row, key: str) -> Estimate:
        return self.summary.score(view, group, self.name(row), key)

    @property
    def chosen_on(self) -> list[str]:
        """The tasks on whose validation splits hyperparameters were chosen."""
        tasks = self.summary.tasks
        if not self.record["settings"]["amounts"].get("shares"):
            return tasks
        return [task for task in tasks if task == kind_of(task)] or tasks

    # ---- tables ------------------------------------------------------------------------------------------------------

    def scores(self, view: str) -> str:
        """Every method at its most passes, without and with a temperature; the best of all seeds is bold."""
        columns = [(group, key) for group in GROUPS for key in DECIDED_BY if key in self.summary.metrics(view, group)]
        asked = product(self.seen(view), (False, True))
        rows = list(dict.fromkeys(self.at(name, max(self.counts), scaled) for name, scaled in asked))
        leaders = {}
        for group, key in columns:
            ranks = self.summary.ranking(view, group, key)
            whole = [self.name(row) for row in rows if not self.of_seeds(view, row)]
            leaders[group, key] = next((name for name in ranks if name in whole), None)
        lines = []
        for row in rows:
            found = {column: self.score(view, column[0], row, column[1]) for column in columns}
            cells = [bold(number(value), self.name(row) == leaders[column]) for column, value in found.items()]
            passes = self.score(view, COST, row, "passes")
            called = self.called(row) + self.of_seeds(view, row)
            lines.append([called, *cells, f"{passes.mean:.0f}" if passes.seeds else NOTHING])
        heads = [heading(key, group) for group, key in columns]
        return table(["", *heads, "passes"], lines)

    def at_a_glance(self, view: str, group: str, counts: Sequence[int], without: Sequence[str] = ()) -> str:
        """A line for each method (passes); NLL and ECE also with a temperature; the best of each column is bold.

        `counts` are the numbers of passes that IVON's samples have a line for; other methods have their most. Methods
        of `without` are left out.
        """
        columns = [("accuracy", None), *((key, scaled) for key in ("nll", "ece") for scaled in (False, True))]
        lines = [
            self.at(method, count, False)
            for method in self.seen(view)
            if method not in without
            for count in (counts if method in self._sampling and method in self.ours else counts[-1:])
        ]
        values = [
            [self.score(view, group, row if s is None else replace(row, scaled=s), key) for key, s in columns]
            for row in lines
        ]
        whole = [found for row, found in zip(lines, values, strict=True) if not self.of_seeds(view, row)]
        means = [[value.mean for value in column if value.seeds] for column in zip(*(whole or values), strict=True)]
        best = [(max if key in HIGHER else min)(column) for (key, _), column in zip(columns, means, strict=True)]
        rows = []
        for row, found in zip(lines, values, strict=True):
            cells = [bold(number(value), value.mean == top) for value, top in zip(found, best, strict=True)]
            rows.append([self.brief(view, row) + self.of_seeds(view, row), *cells])
        return table(["", *(heading(key, scaled=bool(scaled)) for key, scaled in columns)], rows)

    def of_seeds(self, view: str, row: Row) -> str:
        """A warning where a mean is of fewer seeds than the others': seeds differ by more than methods do."""
        have, all_of_them = len(self.score(view, IN, row, "nll").seeds), len(self.summary.seeds)
        return "" if have == all_of_them else f", {have} of {all_of_them} seeds"

    def by_passes(self, view: str, group: str, key: str) -> str:
        """A metric of what samples, by the number of passes."""
        lines = []
        for method in (name for name in self.seen(view) if name in self._sampling):
            for scaled in (False, True):
                found = [Row(method, count, scaled) for count in self.counts]
                cells = [number(self.score(view, group, row, key)) if self.has(row) else NOTHING for row in found]
                if any(map(self.has, found)):
                    lines.append([f"{self.title(method)}{', scaled' if scaled else ''}", *cells])
        return table([METRICS[key], *map(str, self.counts)], lines)

    def differences(self, view: str, method: str) -> str:
        """One of IVON's methods, at its most passes, less every rival with as many and the same scaling, by seed."""
        columns = [(group, key) for group in GROUPS for key in DECIDED_BY if key in self.summary.metrics(view, group)]
        lines = []
        for scaled in (False, True):
            ours = self.at(method, max(self.counts), scaled)
            for rival in (name for name in self.seen(view) if name in self.rivals):
                other = self.at(rival, max(self.counts), scaled)
                found = [(self.less(view, group, ours, other, key), key) for group, key in columns]
                lines.append(
                    [f"{self.called(ours)} less {self.called(other)}", *(mark(gap, key) for gap, key in found)]
                )
        heads = [heading(key, group) for group, key in columns]
        return table(["", *heads], lines)

    def tried(self, view: str, counts: Sequence[int]) -> str:
        """What was tried on top of `FOR_LORA`, less it with as many passes and the same scaling, paired by seed."""
        asked = [(IN, "accuracy", None), *product((IN,), ("nll", "ece"), (False, True))]
        asked += [(SHIFT, "accuracy", None), (SHIFT, "nll", True)]
        columns = [column for column in asked if column[1] in self.summary.metrics(view, column[0])]
        lines = []
        for method in (name for name in self.variants if name in self.seen(view)):
            wanted = counts if method in self._sampling else (1,)
            for row in (row for row in self.rows if row.method == method and row.scaled and row.samples in wanted):
                cells = []
                for group, key, scaled in columns:
                    ours, other = (Row(name, row.samples, scaled is not False) for name in (method, FOR_LORA))
                    cells.append(mark(self.less(view, group, ours, other, key), key) if self.has(ours) else NOTHING)
                lines.append([self.brief(view, row), *cells])
        heads = [heading(key, group, scaled=bool(scaled)) for group, key, scaled in columns]
        return table([f"less {self.title(FOR_LORA)}", *heads], lines)

    def wins(self, counts: Sequence[int] = ()) -> str:
        """Every row of IVON's against every rival with as many passes and the same scaling: won, lost and open.

        With `counts`, samples have rows for these numbers of passes alone.
        """
        lines = []
        for method in self.ours:
            for row in (row for row in self.rows if row.method == method):
                if counts and method in self._sampling and row.samples not in counts:
                    continue
                found = [self.tally(row, self.at(rival, row.samples, row.scaled)) for rival in self.rivals]
                total = [sum(each) for each in zip(*found, strict=True)]
                lines.append([self.called(row), *(" / ".join(map(str, each)) for each in (*found, total))])
        return table(["", *map(self.title, self.rivals), "all"], lines)

    def tally(self, ours: Row, other: Row) -> tuple[int, int, int]:
        """Over all tasks, groups of domains and metrics of `DECIDED_BY`: decidedly better, decidedly worse, open."""
        verdicts = [
            gap.verdict(key)
            for task, group, key in self.summary.comparisons()
            if key in DECIDED_BY and (gap := self.less(task, group, ours, other, key)).seeds
        ]
        return verdicts.count(1), verdicts.count(-1), verdicts.count(0)

    def pooled(self, group: str) -> str:
        """As `differences` over the tasks together, with errors that are pooled: of every task from its own seeds."""
        keys = [
            key for key in DECIDED_BY if any(key in self.summary.metrics(task, group) for task in self.summary.tasks)
        ]
        lines = []
        for method in dict.fromkeys((*self.ours, *self.variants)):
            rivals = [*self.rivals, FOR_LORA] if method in self.variants else self.rivals
            for scaled in (False, True):
                ours = self.at(method, max(self.counts), scaled)
                for rival in rivals:
                    other = self.at(rival, max(self.counts), scaled)
                    found = [(self._pool(group, ours, other, key), key) for key in keys]
                    text = [mark(gap, key) for gap, key in found]
                    lines.append([f"{self.called(ours)} less {self.called(other)}", *text])
        return table(["", *(METRICS[key] for key in keys)], lines)

    def less(self, view: str, group: str, ours: Row, other: Row, key: str) -> Estimate:
        """One row less another, paired by seed."""
        return self.summary.difference(view, group, self.name(ours), key, self.name(other))

    def _pool(self, group: str, ours: Row, other: Row, key: str) -> Estimate:
        """The mean over the tasks of the differences; its variance is the sum of theirs over the squared number."""
        found = [self.less(task, group, ours, other, key) for task in self.summary.tasks]
        gaps = [gap for gap in found if gap.seeds]
        if not gaps:
            return Estimate(float("nan"), None, ())
        errors = [gap.error for gap in gaps if gap.error is not None]
        error = sum(value**2 for value in errors) ** 0.5 / len(gaps) if len(errors) == len(gaps) else None
        return Estimate(sum(gap.mean for gap in gaps) / len(gaps), error, gaps[0].seeds)

    def costs(self) -> str:
        """What every method costs on every task, the mean over seeds."""
        keys, lines = ("train_seconds", "fit_seconds", "tune_seconds", "predict_ms_per_example"), []
        for task in self.summary.tasks:
            for method in self.seen(task):
                row = self.at(method, max(self.counts), False)
                found = [self.score(task, COST, row, key).mean for key in keys]
                lines.append([task, self.called(row), *(f"{value:.0f}" for value in found)])
        heads = ("training, s", "fit after it, s", "choosing dials, s", "prediction, ms per example")
        return table(["task", "", *heads], lines)

    def unfinished(self) -> list[str]:
        """Tasks, methods and seeds that have no scores, in words."""
        known = {(cell["task"], cell["method"], cell["seed"]): cell["error"] for cell in self.record["cells"]}
        found = []
        for task in self.summary.tasks:
            for seed in self.summary.seeds:
                names = [name for name in self.record["methods"] if (task, name, seed) not in known]
                if names:
                    whole = len(names) == len(self.record["methods"])
                    found.append(f"{task}, seed {seed}: {'all methods' if whole else ', '.join(names)} have not run")
        failed = ((key, error) for key, error in known.items() if error is not None)
        return found + [f"{task}, seed {seed}: {name} failed: {error}" for (task, name, seed), error in failed]


def draw(ways: Ways) -> Figure:
    """NLL and ECE against the number of passes, a row for each task; IVON's lines are thick."""
    tasks = [task for task in ways.summary.tasks if ways.seen(task)]
    figure = Figure(figsize=(15, 1 + 3.4 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 4, sharex=True, squeeze=False)
    for task, row in zip(tasks, axes, strict=True):
        for ax, (key, scaled) in zip(row, product(("nll", "ece"), (False, True)), strict=True):
            for place, method in enumerate(ways.methods):
                rows = [row for row in ways.rows if row.method == method and row.scaled == scaled]
                values = [ways.score(task, IN, row, key).mean for row in rows]
                ours = method in ways.ours
                few = ways.of_seeds(task, ways.at(method, 1, False)) if method in ways.seen(task) else ""
                style: dict[str, Any] = {"color": colormaps["tab20"](place % 20), "label": ways.title(method) + few}
                style |= {"marker": "o" if ours else "s", "markersize": 4, "linewidth": 2.2 if ours else 1}
                ax.plot([row.samples for row in rows], values, **style)
            ax.set(xscale="log", ylabel=heading(key, scaled=scaled), xlabel="passes")
            ax.set_title(f"{task}, in distribution", fontsize=9)
            ax.set_xticks(ways.counts, list(map(str, ways.counts)))
            ax.minorticks_off()
            ax.grid(alpha=0.2)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure
