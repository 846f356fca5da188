"""The pictures of a record."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.speed import steps
from benchmarks.speed.clock import KERNEL
from benchmarks.speed.contender import BASELINE, IVON_OPT, STEP, bytes_per_element
from benchmarks.speed.record import Record
from benchmarks.speed.workloads import DTYPES, short

OUR_COLOR, PEER_COLOR, BASELINE_COLOR = "#dd8452", "#9aa5b1", "#4c72b0"
SPEED, ROOFLINE, ELEMENTS = "speed.png", "roofline.png", "elements.png"
_DTYPE = "float32"
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_OUR_COLORS = (OUR_COLOR, "#a8401c", "#e8b48f", "#6b3a1e", "#f2c14e", "#7a5c00")
_PEER_COLORS = (
    *("#8fb3de", "#1f3b73", "#c44e52", "#e377a2", "#8172b3"),
    *("#b9a3d6", "#55a868", "#2f6b3c", "#64b5cd", "#777777"),
)


def save(figure: Any, path: Path, dpi: int = 130) -> None:
    """Writes a picture and forgets it."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def speed(path: Path, record: Record) -> None:
    """Each workload's step against fused AdamW's: bars in float32, dots in bfloat16."""
    rows = record.measured(steps.PART).dropna(subset=["ratio", "elements"])
    rows = rows[rows.quantity == STEP]
    full, half = (rows[rows.dtype == dtype] for dtype in DTYPES)
    names = [name for name in record.workloads if name in set(full.workload)]
    if not names:
        return
    columns = min(3, len(names))
    contenders = list(full.contender.unique())
    lines = -(-len(names) // columns)
    size = (4.6 * columns + 2.4, (0.21 * len(contenders) + 0.9) * lines + 0.4)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, name in itertools.zip_longest(grid.flat, names):
        if name is None:
            axis.set_axis_off()
            continue
        _bars(axis, *(of[of.workload == name].set_index("contender").reindex(contenders) for of in (full, half)))
        axis.set_title(f"{record.workloads[name]['title']} ({short(record.workloads[name]['elements'])})", fontsize=9)
    grid[0][0].invert_yaxis()  # of all, as they share it
    marks = [
        Line2D([], [], color=OUR_COLOR, linewidth=6, label="ours, float32"),
        Line2D([], [], color=PEER_COLOR, linewidth=6, label="others, float32"),
        Line2D([], [], color="black", marker="o", linestyle="", markersize=4, label="bfloat16"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"Time of one optimizer step / {BASELINE}, on {record.device.get('name')}", fontsize=11)
    save(figure, path)


def _bars(axis: Any, full: pd.DataFrame, half: pd.DataFrame) -> None:
    places = range(len(full))
    colors = [PEER_COLOR if ours is not True else OUR_COLOR for ours in full.ours]
    colors[list(full.index).index(BASELINE)] = BASELINE_COLOR
    axis.barh(places, full.ratio.fillna(0), color=colors, height=0.75)
    axis.plot(half.ratio.where(full.ratio.notna()), places, "ko", markersize=3.5)
    both = pd.concat([full.ratio, half.ratio], axis=1)
    label: dict[str, Any] = {"fontsize": 7.5, "va": "center", "textcoords": "offset points", "bbox": _WHITE}
    for place, ratio, end in zip(places, full.ratio, both.max(axis=1), strict=True):
        if ratio > 0:
            axis.annotate(f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x", (end, place), (5, 0), **label)
    axis.axvline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlim(min(0.2, 0.8 * both.min(axis=None)), 3 * both.max(axis=None))
    axis.set_yticks(places, full.index, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(
    path: Path,
    record: Record,
    points: pd.DataFrame,
    labels: tuple[str, str, str],
    roof: Callable[[Any, float], object],
    linestyle: str = "-",
) -> None:
    """One line (or its marks alone) of `x` and `y` for each contender on logarithmic axes, the legend beside them."""
    ours, peers = itertools.cycle(_OUR_COLORS), itertools.cycle(_PEER_COLORS)
    figure, axis = plt.subplots(figsize=(10, 5.4), layout="constrained")
    whole = record.measured(steps.PART).query(f"quantity == '{STEP}'")
    for name, own in whole[["contender", "ours"]].drop_duplicates().itertuples(index=False):
        # The same style in every picture of the record, whether the contender is in it or not.
        color = BASELINE_COLOR if name == BASELINE else next(ours if own else peers)
        width = 1.8 if name in (BASELINE, IVON_OPT) or own else 1.0
        of = points[points.contender == name].sort_values("x")
        if len(of):
            style: dict[str, Any] = {"color": color, "linewidth": width, "linestyle": linestyle, "markersize": 5}
            axis.plot(of.x, of.y, label=name, marker="o" if own else "s", **style)
    for copied in record.copy_gbps.values():
        roof(axis, copied)
    axis.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axis.set_title(f"{labels[2]}, on {record.device.get('name')}", fontsize=11)
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    save(figure, path)


def roofline(path: Path, record: Record) -> None:
    """Achieved bandwidth against the bytes that a step moves, under that of a copy."""
    rows = record.measured(steps.PART)
    rows = rows[rows.quantity.isin([STEP, KERNEL]) & (rows.dtype == _DTYPE)].dropna(subset=["gbps", "elements"])
    points = rows.assign(x=rows.bytes_per_element * rows.elements / 1e6, y=rows.gbps)

    def roof(axis: Any, copied: float) -> None:
        axis.axhline(copied, color="black", linewidth=1.2, linestyle="--", label=f"a large copy: {copied:.3g} GB/s")

    if len(points):
        labels = ("MB that one step must move", "GB/s", f"Bandwidth of one optimizer step, {_DTYPE}")
        _lines(path, record, points, labels, roof, linestyle="")


def elements(path: Path, record: Record) -> None:
    """Time of a step of one tensor against its size."""
    rows = record.measured(steps.PART)
    rows = rows[(rows.quantity == STEP) & (rows.dtype == _DTYPE) & (rows.tensors == 1)]
    points = rows.assign(x=rows.elements, y=rows.p50)
    sizes = points.x.sort_values().unique()
    moved = bytes_per_element(("adamw",), DTYPES[_DTYPE])

    def roof(axis: Any, copied: float) -> None:
        label = f"AdamW's {moved} bytes at a large copy's speed"
        axis.plot(sizes, moved * sizes / copied / 1e6, "k--", linewidth=1.2, label=label)

    if len(sizes) > 1:
        _lines(path, record, points, ("elements", "ms", f"One optimizer step of one {_DTYPE} tensor"), roof)


def draw(out: Path, record: Record) -> None:
    """All of them; one that has nothing to show is removed."""
    for name, picture in ((SPEED, speed), (ROOFLINE, roofline), (ELEMENTS, elements)):
        (out / name).unlink(missing_ok=True)
        picture(out / name, record)
