"""What the search for IVON's settings leaves behind: tables, two pictures, and a Markdown page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.quality.methods.ivon_frozen import FROZEN
from benchmarks.quality.recipe import averaged_nll
from ivon_kernels.report.plots import BLUE, GREY

Run = Mapping[str, Any]
SETTINGS: dict[str, tuple[str, Callable[[Run], float]]] = {
    "step": ("step: lr * clip_radius", lambda run: run["hyper"]["lr"] * run["hyper"]["clip_radius"]),
    "sigma": ("sigma: 1 / sqrt(ess * hess_init)", lambda run: _sigma(run["hyper"])),
    "hess_init": ("hess_init", lambda run: run["hyper"]["hess_init"]),
    "beta2": ("1 - beta2", lambda run: 1.0 - run["hyper"]["beta2"]),
    "clipped": ("share of elements that the clip binds", lambda run: run["clipped"]),
    "learned": ("how far the Hessian moved: 95% / 5% quantile", lambda run: _spread(run)),
}
HEADERS = ("lr", "ess", "hess_init", "beta2", "sigma", "clipped", "hess 5% to 95%")
SCORES = ("accuracy", "NLL", "ECE")
NAMES = ("accuracy", "nll", "ece")


def _sigma(hyper: Mapping[str, float]) -> float:
    return 1.0 / math.sqrt(hyper["ess"] * hyper["hess_init"])


def _spread(run: Run) -> float:
    quantiles = run["hess_over_init"]
    return float(quantiles["0.95"] / quantiles["0.05"]) if quantiles["0.05"] > 0 else math.inf


def _averaged(run: Run) -> Mapping[str, float]:
    scores: Mapping[str, Mapping[str, float]] = run["samples"]
    return scores[max(scores, key=int)]


def _settings_of(run: Run) -> list[str]:
    hyper, quantiles = run["hyper"], run["hess_over_init"]
    beta2 = "frozen" if hyper["beta2"] == FROZEN else f"{hyper['beta2']:g}"
    return [
        *(f"{hyper[name]:g}" for name in ("lr", "ess", "hess_init")),
        beta2,
        f"{_sigma(hyper):.3f}",
        f"{run['clipped']:.0%}",
        f"{quantiles['0.05']:.2f} to {quantiles['0.95']:.2f}",
    ]


def _scores_of(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[name]:.3f}" for name in NAMES]


def tried_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row for every setting that was tried, the best averaged likelihood first."""
    runs = sorted(record["tried"], key=averaged_nll)
    return [[*_settings_of(run), *_scores_of(run["mean"]), *_scores_of(_averaged(run))] for run in runs]


def confirmed_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row for every setting that was run with other seeds: mean and standard error over them."""
    rows = []
    for runs in _by_setting(record["confirmed"]).values():
        parts = ([run["mean"] for run in runs], [_averaged(run) for run in runs])
        cells = [_with_error([scores[name] for scores in part]) for part in parts for name in NAMES]
        rows.append([*_settings_of(runs[0]), *cells])
    return rows


def _by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[str(sorted(run["hyper"].items()))].append(run)
    return found


def _with_error(values: Sequence[float]) -> str:
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def print_tables(console: Console, record: Mapping[str, Any]) -> None:
    """What was tried and what was confirmed, for a terminal of 80 columns; the page has every column."""
    kept = [0, 1, 2, 3, 5, 8, 9, 11, 12]
    headers = [*HEADERS, *(f"{score}, mean" for score in SCORES), *(f"{score}, samples" for score in SCORES)]
    for title, rows in (("Tried", tried_rows(record)), ("Confirmed with other seeds", confirmed_rows(record))):
        if rows:
            lines = [f"# {title}, validation split", "", *_table([[row[i] for i in kept] for row in [headers, *rows]])]
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
    for title, rows in (
        ("Run again with other seeds (mean and standard error over the seeds)", confirmed_rows(record)),
        ("Every setting that was tried, one seed", tried_rows(record)),
    ):
        if rows:
            headers = [*HEADERS, *(f"mean: {s}" for s in SCORES), *(f"averaged: {s}" for s in SCORES)]
            lines += [f"## {title}", "", *_table([headers, *rows]), ""]
    (folder / "recipe.md").write_text("\n".join(lines), encoding="utf-8")


def _command(settings: Mapping[str, Any]) -> str:
    parts = [f"python -m benchmarks recipe --task {settings['tasks'][0]} --size {settings['size']}"]
    parts += [f"--steps {settings['amounts']['steps']} --seeds {len(settings['seeds'])} --best {settings['best']}"]
    parts += [f"--{name} {settings[name]}" for name in ("trials", "refine") if name in settings]
    return " ".join([*parts, *(f"--try {text}" for text in settings.get("given", []))])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown of a table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|{' ---: |' * len(rows[0])}", *body]


def draw_tried(record: Mapping[str, Any]) -> Figure:
    """The likelihood of every setting that was tried against each of the settings, at the mean and averaged."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for number, (axis, (title, value)) in enumerate(zip(figure.subplots(2, 3).flat, SETTINGS.values(), strict=True)):
        xs = [value(run) for run in record["tried"]]
        axis.scatter(xs, [run["mean"]["nll"] for run in record["tried"]], s=16, color=GREY, label="at the mean")
        axis.scatter(xs, [averaged_nll(run) for run in record["tried"]], s=16, color=BLUE, label="averaged")
        if "share" not in title:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(title, fontsize=9)
        axis.set_ylabel("NLL (nats)", fontsize=9)
        axis.grid(visible=True, alpha=0.3)
        if number == 0:
            axis.legend(fontsize=8)
    return figure


def draw_confirmed(record: Mapping[str, Any]) -> Figure:
    """NLL and ECE against the number of samples, and against the temperature; one line for each setting."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    colors: dict[str, str] = {}
    for runs in _by_setting(record["confirmed"]).values():
        hyper = runs[0]["hyper"]
        name = f"lr {hyper['lr']:g}, sigma {_sigma(hyper):.2g}, hess_init {hyper['hess_init']:g}"
        color = colors.setdefault(name, f"C{len(colors)}")
        style = {"color": color, "linestyle": ":" if hyper["beta2"] == FROZEN else "-", "marker": "o", "markersize": 4}
        for row, score in enumerate(("nll", "ece")):
            for column, kind in enumerate(("samples", "temperatures")):
                _line(axes[row][column], runs, kind, score, style)
    for column, label in enumerate(("samples that a prediction averages", "temperature")):
        for row, score in enumerate(("NLL (nats)", "ECE")):
            axes[row][column].set_xscale("log")
            axes[row][column].set_xlabel(label, fontsize=9)
            axes[row][column].set_ylabel(score, fontsize=9)
            axes[row][column].grid(visible=True, alpha=0.3)
    for name, color in colors.items():
        axes[0][0].plot([], [], color=color, label=name)
    for line, label in (("-", "Hessian learned"), (":", "Hessian frozen")):
        axes[0][0].plot([], [], color=GREY, linestyle=line, label=label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _line(axis: Axes, runs: Sequence[Run], kind: str, score: str, style: Mapping[str, Any]) -> None:
    positions = sorted({float(key) for run in runs for key in run[kind]})
    if positions:
        values = [
            mean(run[kind][key][score] for run in runs for key in run[kind] if float(key) == x) for x in positions
        ]
        axis.plot(positions, values, **style)
