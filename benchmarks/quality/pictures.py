"""The plots of the quality report: each function draws one picture of a summary and returns the figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.quality.summary import COST, IN, METRICS, READY, SHIFT, Summary
from ivon_kernels.report.plots import BLUE, GREY, ORANGE, PURPLE

DPI = 110
_KINDS = {
    "baseline": ("AdamW", BLUE, "D"),
    "IVON": ("IVON", ORANGE, "o"),
    "ablation": ("ablations", PURPLE, "^"),
    "peer": ("other methods", GREY, "s"),
}
"""What each kind of method is called in legends, its color and its marker."""
_COSTS = {
    "predict_ms_per_example": "prediction, ms per example",
    READY: "training and fit, seconds (base included)",
}
_TIMES_WORSE = 6.0  # than the best: from here on, a linear axis would squeeze the others together
_SPREAD = 2.5  # of times: a logarithmic axis over less than this might have no round number on it


def of_view(summary: Summary, task: str) -> Iterator[tuple[str, Figure]]:
    """Name and figure of every picture of a view."""
    groups = summary.groups(task)
    for group in groups:
        yield "pareto" if group == IN else "pareto_shift", pareto(summary, task, group)
    if IN in groups:
        yield "scores", scores(summary, task)
        yield "reliability", reliability(summary, task)


def pareto(summary: Summary, task: str, group: str) -> Figure:
    """ECE and NLL against the time of a prediction and of training, with the Pareto front: lower left is better."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for (row, metric), (column, cost) in product(enumerate(("ece", "nll")), enumerate(_COSTS)):
        ax = axes[row][column]
        points = []
        for place, method in enumerate(summary.methods):
            x, y = summary.score(task, COST, method, cost), summary.score(task, group, method, metric)
            if x.mean > 0 and y.seeds:
                points.append((x.mean, y.mean))
                style: dict[str, Any] = {"color": colormaps["tab20"](place % 20), "label": summary.title(method)}
                style |= {"marker": _KINDS[summary.kind(method)][2], "markersize": 7, "elinewidth": 1}
                ax.errorbar(x.mean, y.mean, y.error, x.error, **style)
        _stretch(ax, "x", [x for x, _ in points], _SPREAD)
        _stretch(ax, "y", [y for _, y in points])
        front: list[tuple[float, float]] = []
        for point in sorted(points):
            if not front or point[1] < front[-1][1]:
                front.append(point)
        if front:
            ax.step(*zip(*front, strict=True), where="post", color="0.55", linewidth=1, linestyle="--", zorder=0)
        ax.grid(alpha=0.2, which="both")
        ax.margins(0.12)
        if row == 1:
            ax.set_xlabel(_COSTS[cost])
        if column == 0:
            ax.set_ylabel(f"{METRICS[metric]}, {group}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def scores(summary: Summary, task: str) -> Figure:
    """NLL and ECE of every method, a dot and its error bar: filled in distribution, hollow under shift."""
    groups = summary.groups(task)
    order = list(summary.ranking(task, IN, "nll"))[::-1]
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(order)), layout="constrained")
    for ax, key in zip(figure.subplots(1, 2, sharey=True), ("nll", "ece"), strict=True):
        means = []
        for (place, method), group in product(enumerate(order), groups):
            value = summary.score(task, group, method, key)
            if value.seeds:
                means.append(value.mean)
                aside = 0 if len(groups) == 1 else 0.14 if group == IN else -0.14
                _, color, marker = _KINDS[summary.kind(method)]
                style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5.5, "elinewidth": 1.2}
                style["markerfacecolor"] = "white" if group == SHIFT else color
                ax.errorbar(value.mean, place + aside, xerr=value.error, **style)
        ax.set_yticks(range(len(order)), [summary.title(method) for method in order])
        ax.set(xlabel=f"{METRICS[key]} (lower is better)", ylim=(-0.7, len(order) - 0.3))
        _stretch(ax, "x", means)
        ax.grid(alpha=0.2)
        ax.set_axisbelow(True)
    _legend(figure, summary, groups, "")
    return figure


def reliability(summary: Summary, task: str) -> Figure:
    """A reliability diagram for each method, over all seeds together; a dot's area is the share of the examples."""
    methods = [m for m in summary.methods if summary.score(task, IN, m, "ece").seeds]
    columns = min(6, max(len(methods), 2))
    rows = max(-(-len(methods) // columns), 1)
    figure = Figure(figsize=(2.3 * columns, 2.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    groups = summary.groups(task)
    for ax, method in zip(axes.flat, methods, strict=False):
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", zorder=1)
        _, color, _ = _KINDS[summary.kind(method)]
        lines = []
        for group in groups:
            points = summary.reliability(task, group, method)
            x, y, area = points["confidence"], points["accuracy"], 140 * points["count"] / points["count"].sum() + 4
            fill, line = (color, "-") if group == IN else ("white", ":")
            ax.plot(x, y, color=color, linewidth=1.1, linestyle=line, zorder=2)
            ax.scatter(x, y, area, fill, edgecolors=color, zorder=3, clip_on=False)
            value = summary.score(task, group, method, "ece")
            if value.seeds:
                lines.append(f"ECE {value.mean:.3f}" + (" under shift" if group == SHIFT else ""))
        ax.text(0.04, 0.96, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=7.5)
        ax.set_title(summary.title(method), fontsize=8.5)
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
        ax.grid(alpha=0.2)
    for number, ax in enumerate(axes.flat):
        ax.tick_params(labelbottom=number + columns >= len(methods))
        if number >= len(methods):
            ax.set_axis_off()
    figure.supxlabel("confidence", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    _legend(figure, summary, groups, "-:")
    return figure


def _stretch(ax: Axes, name: Literal["x", "y"], means: Sequence[float], times: float = _TIMES_WORSE) -> None:
    """A logarithmic axis with plain numbers where the largest is more than `times` the smallest."""
    if means and min(means) > 0 and max(means) > times * min(means):
        ax.set(**{f"{name}scale": "log"})
        axis = ax.xaxis if name == "x" else ax.yaxis
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, summary: Summary, groups: Sequence[str], lines: str) -> None:
    """A legend over the panels: colors by kind, and filled in distribution, hollow under shift."""
    present = {summary.kind(method) for method in summary.methods}
    looks: list[dict[str, Any]] = [
        {"color": color, "marker": marker, "linestyle": "", "label": name}
        for kind, (name, color, marker) in _KINDS.items()
        if kind in present
    ]
    for place, group in enumerate(groups):
        fill = "0.3" if group == IN else "white"
        line = {"linestyle": lines[place : place + 1], "label": group}
        looks.append({"color": "0.3", "marker": "o", "markerfacecolor": fill, **line})
    handles = [Line2D([], [], **look) for look in looks]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(looks), frameon=False)
