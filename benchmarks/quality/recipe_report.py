"""What the search for IVON's settings leaves behind: tables, two pictures, and a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.quality.methods.ivon import FROZEN
from benchmarks.quality.report import RANKED, render, table
from benchmarks.quality.summary import METRICS
from ivon_kernels.report.plots import BLUE, GREY

PAGE = "recipe.md"
AXES = {
    "step": "step: lr * clip_radius",
    "sigma": "sigma: 1 / sqrt(ess * hess_init)",
    "hess_init": "hess_init",
    "forgets": "1 - beta2",
    "clipped": "share of elements that the clip binds",
    "spread": "how far the Hessian moved: 95% / 5% quantile",
}
_HYPER = ["lr", "ess", "hess_init", "beta2", "clip_radius"]
_SCORES = [f"{part}: {METRICS[key]}" for part in ("mean", "averaged") for key in RANKED]
_TERMINAL = [*_HYPER[:4], "clipped", "mean: NLL", "mean: ECE", "averaged: NLL", "averaged: ECE"]


def averaged(run: Mapping[str, Any]) -> Mapping[str, float]:
    """Scores of the predictions that average all samples of a run."""
    scores: Mapping[str, Mapping[str, float]] = run["samples"]
    return scores[max(scores, key=int)]


def frame(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for every run: its settings, what they did, and its scores."""
    rows = []
    for run in runs:
        scores = [part[key] for part in (run["mean"], averaged(run)) for key in RANKED]
        moved = {"low": run["hess_over_init"]["0.05"], "high": run["hess_over_init"]["0.95"]}
        rows.append({**run["hyper"], "clipped": run["clipped"], **moved, **dict(zip(_SCORES, scores, strict=True))})
    found = pd.DataFrame(rows)
    found["step"] = found["lr"] * found["clip_radius"]
    found["sigma"] = 1.0 / (found["ess"] * found["hess_init"]) ** 0.5
    found["forgets"] = 1.0 - found["beta2"]
    found["spread"] = found["high"] / found["low"]
    return found


def tables_of(record: Mapping[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and table, as text: confirmed settings with the error over their seeds, and tried ones, the best first."""
    if record["confirmed"]:
        groups = frame(record["confirmed"]).groupby(_HYPER, sort=False)
        mean, error = groups[_SCORES].mean(), groups[_SCORES].sem()
        scores = mean.map("{:.3f}".format) + error.map(" ± {:.3f}".format, na_action="ignore").fillna("")
        yield "Run again with other seeds (mean and standard error over the seeds)", _text(groups.head(1), scores)
    if record["tried"]:
        runs = frame(record["tried"]).sort_values("averaged: NLL", kind="stable")
        yield "Every setting that was tried, one seed", _text(runs, runs[_SCORES].map("{:.3f}".format))


def _text(runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    shown = runs[["lr", "ess", "hess_init"]].map("{:g}".format)
    shown["beta2"] = runs["beta2"].map(lambda value: "frozen" if value == FROZEN else f"{value:g}")
    shown["sigma"] = runs["sigma"].map("{:.3f}".format)
    shown["clipped"] = runs["clipped"].map("{:.0%}".format)
    shown["hess 5% to 95%"] = runs["low"].map("{:.2f}".format) + " to " + runs["high"].map("{:.2f}".format)
    return shown.assign(**{name: scores[name].to_numpy() for name in _SCORES})


def print_tables(console: Console, record: Mapping[str, Any]) -> None:
    """What was tried and what was confirmed, for a terminal of 80 columns; the page has every column."""
    for title, rows in reversed(list(tables_of(record))):
        shown = rows[_TERMINAL].rename(columns=lambda name: name.replace("averaged", "samples"))
        console.print(Markdown(f"# {title.partition(' (')[0]}, validation split\n\n{_markdown(shown)}"))


def _markdown(rows: pd.DataFrame) -> str:
    return table(list(rows), rows.to_numpy().tolist(), left=0)


def write_report(record: Mapping[str, Any], folder: Path) -> None:
    """Writes `recipe.md` with its pictures."""
    if record["tried"]:
        draw_tried(record).savefig(folder / "recipe_tried.png", dpi=150)
    if record["confirmed"]:
        draw_confirmed(record).savefig(folder / "recipe_confirmed.png", dpi=150)
    tables = [(title, _markdown(rows)) for title, rows in tables_of(record)]
    (folder / PAGE).write_text(render(PAGE, record, tables=tables) + "\n", encoding="utf-8")


def draw_tried(record: Mapping[str, Any]) -> Figure:
    """The likelihood of every setting that was tried against each of the settings, at the mean and averaged."""
    runs = frame(record["tried"])
    figure = Figure(figsize=(11, 6), layout="constrained")
    for ax, (name, title) in zip(figure.subplots(2, 3).flat, AXES.items(), strict=True):
        for part, color, label in (("mean", GREY, "at the mean"), ("averaged", BLUE, "averaged")):
            ax.scatter(runs[name], runs[f"{part}: NLL"], s=16, color=color, label=label)
        if name != "clipped":
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(title, fontsize=9)
        ax.set_ylabel("NLL (nats)", fontsize=9)
        ax.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def draw_confirmed(record: Mapping[str, Any]) -> Figure:
    """NLL and ECE against the number of samples, and against the temperature; one line for each setting."""
    long = pd.DataFrame(
        {"kind": kind, "x": float(key), **scores, **run["hyper"]}
        for run in record["confirmed"]
        for kind in ("samples", "temperatures")
        for key, scores in run[kind].items()
    )
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels: dict[tuple[str, str], Axes] = dict(
        zip(product(("nll", "ece"), ("samples", "temperatures")), figure.subplots(2, 2).flat, strict=True)
    )
    colors: dict[str, str] = {}
    for (lr, ess, hess_init, beta2, *_), runs in long.groupby(_HYPER, sort=False):
        name = f"lr {lr:g}, sigma {1.0 / (ess * hess_init) ** 0.5:.2g}, hess_init {hess_init:g}"
        line = ":" if beta2 == FROZEN else "-"
        style: dict[str, Any] = {"color": colors.setdefault(name, f"C{len(colors)}"), "linestyle": line}
        for (score, kind), ax in panels.items():
            means = runs[runs["kind"] == kind].groupby("x")[score].mean()
            ax.plot(means.index, means, marker="o", markersize=4, **style)
    for (score, kind), ax in panels.items():
        label = "samples that a prediction averages" if kind == "samples" else "temperature"
        ax.set(xscale="log", xlabel=label, ylabel="NLL (nats)" if score == "nll" else "ECE")
        ax.grid(visible=True, alpha=0.3)
    first = figure.axes[0]
    for name, color in colors.items():
        first.plot([], [], color=color, label=name)
    for line, label in (("-", "Hessian learned"), (":", "Hessian frozen")):
        first.plot([], [], color=GREY, linestyle=line, label=label)
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure
