"""The speed benchmark's table, plots and JSON record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.speed.contenders import BASELINE, REFERENCE
from benchmarks.speed.measure import Timing

OUR_COLOR, PEER_COLOR, BASELINE_COLOR = "#dd8452", "#9aa5b1", "#4c72b0"


def print_timings(console: Console, title: str, timings: list[Timing]) -> None:
    """One workload's table: milliseconds of one step (20, 50 and 80%), and the ratio to the baseline."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("one optimizer step")
    for header in ("p20 ms", "p50 ms", "p80 ms", "x AdamW (fused)"):
        table.add_column(header, justify="right", no_wrap=True)
    for t in timings:
        if t.error is not None:
            table.add_row(t.name, "-", "-", "-", f"failed: {t.error}")
        else:
            ratio = "-" if t.ratio is None else f"{t.ratio:.2f}"
            table.add_row(t.name, f"{t.p20:.2f}", f"{t.p50:.2f}", f"{t.p80:.2f}", ratio)
    console.print(table)


def print_targets(console: Console, targets: list[dict[str, Any]]) -> None:
    """What was promised and what was measured."""
    table = Table(title="Targets", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("target", "bound", "measured", ""):
        table.add_column(header, justify="left" if header in ("target", "") else "right")
    for target in targets:
        measured = target["measured"]
        shown = "not measured" if measured is None else f"{measured:.2f}"
        verdict = "" if measured is None else ("met" if target["met"] else "missed")
        table.add_row(target["name"], f"{target['bound']:g}", shown, verdict)
    console.print(table)


def plot(path: Path, workloads: dict[str, list[Timing]], scaling: list[dict[str, float]]) -> None:
    """Each workload's step times against fused AdamW (the reference backend aside), and time against elements."""
    columns = 3
    rows = -(-(len(workloads) + 1) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(13, 3.4 * rows), layout="constrained")
    axes = list(grid.flat)
    for number, (title, timings) in enumerate(workloads.items()):
        axis = axes[number]
        shown = [t for t in timings if t.ratio is not None and t.name != REFERENCE]
        names, ratios = [t.name for t in shown], [t.ratio or 0.0 for t in shown]
        colors = [BASELINE_COLOR if n == BASELINE else OUR_COLOR if "ivon_kernels" in n else PEER_COLOR for n in names]
        bars = axis.barh(names, ratios, color=colors)
        axis.bar_label(bars, [f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=8)
        axis.axvline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
        axis.set_xlim(0, 1.18 * max(ratios))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("time of one step / AdamW (fused)", fontsize=8)
        axis.invert_yaxis()
        if number % columns:
            axis.set_yticklabels([])
    for axis in axes[len(workloads) + 1 :]:
        axis.set_axis_off()
    axis = axes[len(workloads)]
    if scaling:
        axis.loglog([row["elements"] for row in scaling], [row["ms"] for row in scaling], "o-", color=OUR_COLOR)
    axis.set_title("ivon_kernels, sample + step, one tensor", fontsize=9)
    axis.set_xlabel("elements", fontsize=8)
    axis.set_ylabel("ms", fontsize=8)
    axis.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """The record that a figure needs to exist."""
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
