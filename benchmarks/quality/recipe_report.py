"""What the search for IVON's settings leaves behind: tables, two pictures, and a Markdown page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.quality.methods.ivon import FROZEN
from benchmarks.quality.summary import METRICS
from benchmarks.quality.tables import RANKED, table
from ivon_kernels.report.plots import BLUE, GREY

AXES = {
    "step": "step: lr * clip_radius",
    "sigma": "sigma: 1 / sqrt(ess * hess_init)",
    "hess_init": "hess_init",
    "forgets": "1 - beta2",
    "clipped": "share of elements that the clip binds",
    "spread": "how far the Hessian moved: 95% / 5% quantile",
}
HEADERS = ("lr", "ess", "hess_init", "beta2", "sigma", "clipped", "hess 5% to 95%")
_HYPER = ["lr", "ess", "hess_init", "beta2", "clip_radius"]
_SCORES = [f"{part}: {METRICS[key].title}" for part in ("mean", "averaged") for key in RANKED]
_TERMINAL = [*HEADERS[:4], "clipped", "mean: NLL", "mean: ECE", "averaged: NLL", "averaged: ECE"]


def averaged(run: Mapping[str, Any]) -> Mapping[str, float]:
    """Scores of the predictions that average all samples of a run."""
    scores: Mapping[str, Mapping[str, float]] = run["samples"]
    return scores[max(scores, key=int)]


def frame(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for every run: its settings, what they did, and its scores."""
    rows = []
    for run in runs:
        hyper, (low, high) = run["hyper"], (run["hess_over_init"][level] for level in ("0.05", "0.95"))
        values = [scores[key] for scores in (run["mean"], averaged(run)) for key in RANKED]
        about = {
            "step": hyper["lr"] * hyper["clip_radius"],
            "sigma": 1.0 / math.sqrt(hyper["ess"] * hyper["hess_init"]),
            "forgets": 1.0 - hyper["beta2"],
            "clipped": run["clipped"],
            "low": low,
            "high": high,
            "spread": high / low if low > 0 else math.inf,
        }
        rows.append({**hyper, **about, **dict(zip(_SCORES, values, strict=True))})
    return pd.DataFrame(rows)


def tables_of(record: Mapping[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and table, as text: confirmed settings with the error over their seeds, and tried ones, the best first."""
    if record["confirmed"]:
        groups = frame(record["confirmed"]).groupby(_HYPER, sort=False)
        mean, error = groups[_SCORES].mean(), groups[_SCORES].sem()
        scores = mean.map("{:.3f}".format) + error.map(lambda value: "" if pd.isna(value) else f" ± {value:.3f}")
        yield "Run again with other seeds (mean and standard error over the seeds)", _text(groups.head(1), scores)
    if record["tried"]:
        runs = frame(record["tried"]).sort_values("averaged: NLL", kind="stable")
        yield "Every setting that was tried, one seed", _text(runs, runs[_SCORES].map("{:.3f}".format))


def _text(runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    shown = runs[["lr", "ess", "hess_init"]].map("{:g}".format)
    shown["beta2"] = runs["beta2"].map(lambda value: "frozen" if value == FROZEN else f"{value:g}")
    shown["sigma"] = runs["sigma"].map("{:.3f}".format)
    shown["clipped"] = runs["clipped"].map("{:.0%}".format)
    shown[HEADERS[-1]] = runs["low"].map("{:.2f}".format) + " to " + runs["high"].map("{:.2f}".format)
    return shown.assign(**{name: scores[name].to_numpy() for name in _SCORES})


def print_tables(console: Console, record: Mapping[str, Any]) -> None:
    """What was tried and what was confirmed, for a terminal of 80 columns; the page has every column."""
    header = [name.replace("averaged", "samples") for name in _TERMINAL]
    for title, rows in reversed(list(tables_of(record))):
        title = f"# {title.partition(' (')[0]}, validation split"
        lines = [title, "", *table(header, rows[_TERMINAL].to_numpy().tolist(), left=0)]
        console.print(Markdown("\n".join(lines)))


def write_report(record: Mapping[str, Any], folder: Path) -> None:
    """Writes `recipe.md` with its pictures."""
    settings = record["settings"]
    lines = [
        "# Which settings make IVON good?",
        "",
        f"{settings['tasks'][0]}, {settings['amounts']['steps']} steps, {record['device']}. Judged on the validation "
        "split; the test split was not looked at.",
        *(["The settings were chosen by hand; the main job's are among them."] if settings.get("given") else []),
        "To repeat it:",
        "",
        *["```bash", _command(settings), "```", ""],
    ]
    if record["tried"]:
        draw_tried(record).savefig(folder / "recipe_tried.png", dpi=150)
        lines += ["![likelihood against every setting](recipe_tried.png)", ""]
    if record["confirmed"]:
        draw_confirmed(record).savefig(folder / "recipe_confirmed.png", dpi=150)
        lines += ["![likelihood against samples and temperature](recipe_confirmed.png)", ""]
    for title, rows in tables_of(record):
        lines += [f"## {title}", "", *table([*HEADERS, *_SCORES], rows.to_numpy().tolist(), left=0), ""]
    (folder / "recipe.md").write_text("\n".join(lines), encoding="utf-8")


def _command(settings: Mapping[str, Any]) -> str:
    parts = [f"python -m benchmarks recipe --task {settings['tasks'][0]} --size {settings['size']}"]
    parts += [f"--steps {settings['amounts']['steps']} --seeds {len(settings['seeds'])} --best {settings['best']}"]
    parts += [f"--{name} {settings[name]}" for name in ("trials", "refine") if name in settings]
    return " ".join([*parts, *(f"--try {text}" for text in settings.get("given", []))])


def draw_tried(record: Mapping[str, Any]) -> Figure:
    """The likelihood of every setting that was tried against each of the settings, at the mean and averaged."""
    runs = frame(record["tried"])
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).flat, AXES.items(), strict=True):
        for part, color, label in (("mean", GREY, "at the mean"), ("averaged", BLUE, "averaged")):
            axis.scatter(runs[name], runs[f"{part}: NLL"], s=16, color=color, label=label)
        if name != "clipped":
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(title, fontsize=9)
        axis.set_ylabel("NLL (nats)", fontsize=9)
        axis.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def draw_confirmed(record: Mapping[str, Any]) -> Figure:
    """NLL and ECE against the number of samples, and against the temperature; one line for each setting."""
    long = pd.DataFrame(
        {"kind": kind, "x": float(key), "nll": scores["nll"], "ece": scores["ece"], **run["hyper"]}
        for run in record["confirmed"]
        for kind in ("samples", "temperatures")
        for key, scores in run[kind].items()
    )
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    colors: dict[str, str] = {}
    for (lr, ess, hess_init, beta2, *_), runs in long.groupby(_HYPER, sort=False):
        name = f"lr {lr:g}, sigma {1.0 / math.sqrt(ess * hess_init):.2g}, hess_init {hess_init:g}"
        line = ":" if beta2 == FROZEN else "-"
        style: dict[str, Any] = {"color": colors.setdefault(name, f"C{len(colors)}"), "linestyle": line}
        for column, kind in enumerate(("samples", "temperatures")):
            means = runs[runs["kind"] == kind].groupby("x")[["nll", "ece"]].mean()
            for row, score in enumerate(means):
                axes[row][column].plot(means.index, means[score], marker="o", markersize=4, **style)
    for column, label in enumerate(("samples that a prediction averages", "temperature")):
        for row, score in enumerate(("NLL (nats)", "ECE")):
            axes[row][column].set(xscale="log", xlabel=label, ylabel=score)
            axes[row][column].grid(visible=True, alpha=0.3)
    for name, color in colors.items():
        axes[0][0].plot([], [], color=color, label=name)
    for line, label in (("-", "Hessian learned"), (":", "Hessian frozen")):
        axes[0][0].plot([], [], color=GREY, linestyle=line, label=label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure
