"""The pictures of a record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.speed.contenders import BASELINE, IVON_OPT, STEP
from benchmarks.speed.record import Measurement, Record
from benchmarks.speed.traffic import bytes_per_element
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


def _color(m: Measurement) -> str:
    return BASELINE_COLOR if m.contender == BASELINE else OUR_COLOR if m.ours else PEER_COLOR


def speed(path: Path, record: Record) -> None:
    """Each workload's step against fused AdamW's: bars in float32, dots in bfloat16."""
    names = [name for name in record.workloads if _with_ratio(record, name, _DTYPE)]
    if not names:
        return
    columns = min(3, len(names))
    contenders = list(dict.fromkeys(m.contender for name in names for m in _with_ratio(record, name, _DTYPE)))
    rows = -(-len(names) // columns)
    size = (4.6 * columns + 2.4, (0.21 * len(contenders) + 0.9) * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, name in zip(grid.flat, names, strict=False):
        _bars(axis, record, name, contenders)
    for axis in list(grid.flat)[len(names) :]:
        axis.set_axis_off()
    grid[0][0].invert_yaxis()  # of all, as they share it
    marks = [
        Line2D([], [], color=OUR_COLOR, linewidth=6, label="ours, float32"),
        Line2D([], [], color=PEER_COLOR, linewidth=6, label="others, float32"),
        Line2D([], [], color="black", marker="o", linestyle="", markersize=4, label="bfloat16"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"Time of one optimizer step / {BASELINE}, on {record.device.get('name')}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _with_ratio(record: Record, workload: str, dtype: str) -> list[Measurement]:
    return [m for m in record.of(workload, dtype, STEP) if m.ratio is not None and m.part == "steps"]


def _bars(axis: Any, record: Record, workload: str, contenders: list[str]) -> None:
    info = record.workloads[workload]
    rows = {m.contender: m for m in _with_ratio(record, workload, _DTYPE)}
    half = {m.contender: m.ratio for m in _with_ratio(record, workload, "bfloat16")}
    shown = [(place, rows[name]) for place, name in enumerate(contenders) if name in rows]
    ratios = [m.ratio or 0.0 for _, m in shown]
    bars = axis.barh([place for place, _ in shown], ratios, color=[_color(m) for _, m in shown], height=0.75)
    dots = [(half[name], place) for place, name in enumerate(contenders) if half.get(name)]
    axis.plot([x for x, _ in dots], [y for _, y in dots], "ko", markersize=3.5)
    ends = [max(m.ratio or 0.0, half.get(m.contender) or 0.0) for _, m in shown]
    for bar, ratio, end in zip(bars, ratios, ends, strict=True):
        place = (end, bar.get_y() + bar.get_height() / 2)
        text = f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"
        axis.annotate(text, place, (5, 0), fontsize=7.5, va="center", textcoords="offset points", bbox=_WHITE)
    axis.axvline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
    axis.set_xscale("log")
    everything = [*ratios, *(x for x, _ in dots if x)]
    axis.set_xlim(min(0.2, 0.8 * min(everything)), 3 * max(everything))
    axis.set_yticks(range(len(contenders)), contenders, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(f"{info['title']} ({short(info['elements'])})", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _styles(rows: Iterable[Measurement]) -> dict[str, dict[str, Any]]:
    """A line style for each contender, the same in every picture of the record."""
    ours, peers = iter(_OUR_COLORS * 3), iter(_PEER_COLORS * 3)
    styles: dict[str, dict[str, Any]] = {}
    for m in rows:
        if m.contender not in styles:
            named = BASELINE_COLOR if m.contender == BASELINE else next(ours if m.ours else peers)
            wide = m.contender in (BASELINE, IVON_OPT) or m.ours
            styles[m.contender] = {"color": named, "linewidth": 1.8 if wide else 1.0, "marker": "o" if m.ours else "s"}
    return styles


def _lines(
    path: Path,
    record: Record,
    points: dict[str, list[tuple[float, float]]],
    labels: tuple[str, str, str],
    roof: Any,
    linestyle: str = "-",
) -> None:
    """One line (or its marks alone) for each contender on logarithmic axes, the legend beside them."""
    steps = [m for m in record.measurements if m.quantity == STEP and m.part == "steps"]
    styles = _styles(steps)
    figure, axis = plt.subplots(figsize=(10, 5.4), layout="constrained")
    for name in (name for name in styles if name in points):
        xs, ys = zip(*sorted(points[name]), strict=True)
        axis.plot(xs, ys, label=name, markersize=5, linestyle=linestyle, **styles[name])
    roof(axis)
    axis.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axis.set_title(f"{labels[2]}, on {record.device.get('name')}", fontsize=11)
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def roofline(path: Path, record: Record) -> None:
    """Achieved bandwidth against the bytes that a step moves, under that of a copy."""
    points: dict[str, list[tuple[float, float]]] = {}
    for m in record.measurements:
        info = record.workloads.get(m.workload)
        whole = m.quantity == STEP or m.quantity == "kernel"
        if whole and m.part == "steps" and m.dtype == _DTYPE and info and m.gbps and m.bytes_per_element:
            points.setdefault(m.contender, []).append((m.bytes_per_element * info["elements"] / 1e6, m.gbps))

    def roof(axis: Any) -> None:
        for copied in record.copy_gbps.values():
            axis.axhline(copied, color="black", linewidth=1.2, linestyle="--", label=f"a large copy: {copied:.3g} GB/s")

    if points:
        labels = ("MB that one step must move", "GB/s", f"Bandwidth of one optimizer step, {_DTYPE}")
        _lines(path, record, points, labels, roof, linestyle="")


def elements(path: Path, record: Record) -> None:
    """Time of a step of one tensor against its size."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, info in record.workloads.items():
        if info["tensors"] == 1:
            for m in record.of(name, _DTYPE, STEP):
                if m.p50 is not None:
                    points.setdefault(m.contender, []).append((info["elements"], m.p50))
    sizes = sorted({x for found in points.values() for x, _ in found})
    moved = bytes_per_element(("adamw",), DTYPES[_DTYPE])

    def roof(axis: Any) -> None:
        for copied in record.copy_gbps.values():
            floor = [moved * size / copied / 1e6 for size in sizes]
            axis.plot(sizes, floor, "k--", linewidth=1.2, label=f"AdamW's {moved} bytes at a large copy's speed")

    if len(sizes) > 1:
        _lines(path, record, points, ("elements", "ms", f"One optimizer step of one {_DTYPE} tensor"), roof)


PICTURES = {SPEED: speed, ROOFLINE: roofline, ELEMENTS: elements}


def draw(out: Path, record: Record) -> None:
    """All of them; one that has nothing to show is removed."""
    for name, picture in PICTURES.items():
        (out / name).unlink(missing_ok=True)
        picture(out / name, record)
