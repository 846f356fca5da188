"""The plots of the quality report: each function draws one picture of a summary and returns the figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from benchmarks.quality.summary import IN, METRICS, SHIFT, Estimate, Kind, Summary
from ivon_kernels.report.plots import BLUE, GREY, ORANGE, PURPLE

DPI = 110
COLORS: dict[Kind, str] = {"baseline": BLUE, "IVON": ORANGE, "ablation": PURPLE, "peer": GREY}
MARKERS: dict[Kind, str] = {"baseline": "D", "IVON": "o", "ablation": "^", "peer": "s"}
_COSTS = {
    "predict_ms_per_example": "prediction, ms per example",
    "ready_seconds": "training and fit, seconds (base included)",
}
_OFFSETS = sorted(
    product((9, -9, 26, -26, 50, -50, 80, -80), range(-160, 161, 4)),
    key=lambda offset: abs(offset[0]) + abs(offset[1]) + 3 * (offset[0] < 0),
)
"""Where a label may be, in points from its point: the nearest first, right before left."""
_TIMES_WORSE = 6.0  # than the best: from here on, a linear axis would squeeze the others together
_SPREAD = 2.5  # of times: a logarithmic axis over less than this might have no round number on it


def pareto(summary: Summary, task: str, group: str) -> Figure:
    """ECE and NLL against the time of a prediction and of training, with the Pareto front: lower left is better.

    Args:
        summary: Of the record.
        task: One of its views.
        group: In distribution or under shift.
    """
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for (row, metric), (column, cost) in product(enumerate(("ece", "nll")), enumerate(_COSTS)):
        ax = axes[row][column]
        points = {}
        for method in summary.methods:
            x, y = summary.cost(task, method, cost), summary.score(task, group, method, metric)
            if x is not None and y is not None and x.mean > 0:
                points[method] = (x, y)
                _point(ax, summary, method, x, y)
        _stretch(ax, "x", [x.mean for x, _ in points.values()], _SPREAD)
        _stretch(ax, "y", [y.mean for _, y in points.values()])
        _front(ax, [(x.mean, y.mean) for x, y in points.values()])
        ax.grid(alpha=0.2, which="both")
        ax.margins(0.12)
        if row == 1:
            ax.set_xlabel(_COSTS[cost])
        if column == 0:
            ax.set_ylabel(f"{METRICS[metric].title}, {group}")
    _kinds(figure, summary, Line2D([], [], color="0.55", linewidth=1, linestyle="--", label="Pareto front"))
    figure.draw_without_rendering()  # settles the layout, which the labels are placed in
    for ax in axes.flat:
        _place_labels(ax)
    return figure


def scores(summary: Summary, task: str) -> Figure:
    """NLL and ECE of every method, a dot and its error bar: filled in distribution, hollow under shift."""
    keys = ("nll", "ece")
    groups = summary.groups(task)
    order = list(summary.ranking(task, IN, "nll"))[::-1]
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(order)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key in zip(axes, keys, strict=True):
        means = []
        for place, method in enumerate(order):
            for group in groups:
                value = summary.score(task, group, method, key)
                if value is not None:
                    means.append(value.mean)
                    aside = 0 if len(groups) == 1 else 0.14 if group == IN else -0.14
                    _dot(ax, summary, method, value, place + aside, hollow=group == SHIFT)
        ax.set_yticks(range(len(order)), [summary.title(method) for method in order])
        ax.set(xlabel=f"{METRICS[key].title} (lower is better)", ylim=(-0.7, len(order) - 0.3))
        _stretch(ax, "x", means)
        ax.grid(axis="x", alpha=0.2)
        ax.set_axisbelow(True)
        ax.hlines(range(len(order)), 0, 1, transform=ax.get_yaxis_transform(), color="0.93", linewidth=0.8, zorder=0)
    _kinds(figure, summary, *(_group_mark(group, "") for group in groups))
    return figure


def reliability(summary: Summary, task: str) -> Figure:
    """A reliability diagram for each method, over all seeds together; a dot's area is the share of the examples."""
    methods = [m for m in summary.methods if summary.score(task, IN, m, "ece") is not None]
    columns = min(6, max(len(methods), 2))
    rows = max(-(-len(methods) // columns), 1)
    figure = Figure(figsize=(2.3 * columns, 2.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    groups = summary.groups(task)
    for number, method in enumerate(methods):
        ax = axes[number // columns][number % columns]
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", zorder=1)
        color = COLORS[summary.kind(method)]
        lines = []
        for group in groups:
            confidence, accuracy, counts = summary.reliability(task, group, method)
            fill, line = (color, "-") if group == IN else ("white", ":")
            ax.plot(confidence, accuracy, color=color, linewidth=1.1, linestyle=line, zorder=2)
            ax.scatter(
                confidence, accuracy, 140 * counts / counts.sum() + 4, fill, edgecolors=color, zorder=3, clip_on=False
            )
            value = summary.score(task, group, method, "ece")
            if value is not None:
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
    _kinds(figure, summary, *(_group_mark(group, "-" if group == IN else ":") for group in groups))
    return figure


def _point(ax: Axes, summary: Summary, method: str, x: Estimate, y: Estimate) -> None:
    """A point with its error bars, and its label where `_place_labels` finds it."""
    kind = summary.kind(method)
    ax.errorbar(
        x.mean, y.mean, xerr=x.error, yerr=y.error, color=COLORS[kind], marker=MARKERS[kind], markersize=6, elinewidth=1
    )
    weight = "bold" if kind in ("IVON", "baseline") else "normal"
    ax.annotate(
        summary.title(method),
        (x.mean, y.mean),
        (9, 0),
        textcoords="offset points",
        fontsize=8,
        color=COLORS[kind],
        weight=weight,
        va="center",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        arrowprops={
            "arrowstyle": "-",
            "color": COLORS[kind],
            "linewidth": 0.5,
            "alpha": 0.6,
            "shrinkA": 0,
            "shrinkB": 3,
        },
    )


def _dot(ax: Axes, summary: Summary, method: str, value: Estimate, y: float, *, hollow: bool) -> None:
    color = COLORS[summary.kind(method)]
    marker = MARKERS[summary.kind(method)]
    fill = "white" if hollow else color
    ax.errorbar(
        value.mean,
        y,
        xerr=value.error,
        color=color,
        marker=marker,
        markersize=5.5,
        markerfacecolor=fill,
        elinewidth=1.2,
    )


def _front(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """A dashed step line through the points that no other is below and left of."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    if front:
        ax.step(*zip(*front, strict=True), where="post", color="0.55", linewidth=1, linestyle="--", zorder=0)


def _place_labels(ax: Axes) -> None:
    """Move the labels of the points so that none covers another, a point, or the edge, as far as there is room."""
    labels = sorted((t for t in ax.texts if isinstance(t, Annotation)), key=lambda t: ax.transData.transform(t.xy)[1])
    scale = ax.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    points = [ax.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in points]
    for label, (x, y) in zip(labels, points, strict=True):
        size = Text.get_window_extent(label)  # without the arrow, which an annotation's own extent includes
        for dx, dy in _OFFSETS:
            left, middle = x + dx * scale - (size.width if dx < 0 else 0), y + dy * scale
            box = Bbox.from_bounds(left, middle - size.height / 2, size.width, size.height)
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                label.set_position((dx, dy))
                label.set_horizontalalignment("left" if dx > 0 else "right")
                taken.append(box)
                break


def _stretch(ax: Axes, name: Literal["x", "y"], means: Sequence[float], times: float = _TIMES_WORSE) -> None:
    """A logarithmic axis with plain numbers where the largest is more than `times` the smallest."""
    if means and min(means) > 0 and max(means) > times * min(means):
        (ax.set_xscale if name == "x" else ax.set_yscale)("log")
        axis = ax.xaxis if name == "x" else ax.yaxis
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _group_mark(group: str, line: Literal["-", ":", ""]) -> Line2D:
    """For the legend: filled in distribution, hollow under shift."""
    fill = "0.3" if group == IN else "white"
    return Line2D([], [], color="0.3", marker="o", linestyle=line, markerfacecolor=fill, label=group)


def _kinds(figure: Figure, summary: Summary, *more: Line2D) -> None:
    """A legend over the panels."""
    names: dict[Kind, str] = {"baseline": "AdamW", "IVON": "IVON", "ablation": "ablations", "peer": "other methods"}
    present = {summary.kind(method) for method in summary.methods}
    shapes = [
        Line2D([], [], color=COLORS[kind], marker=MARKERS[kind], linestyle="", label=name)
        for kind, name in names.items()
        if kind in present
    ]
    figure.legend(handles=[*shapes, *more], loc="outside upper center", ncols=len(shapes) + len(more), frameon=False)
