"""The stacking benchmark's tables and plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.speed.plots import BASELINE_COLOR, OUR_COLOR, PEER_COLOR
from benchmarks.stacking.contenders import CONTENDERS, MEAN, SEPARATE, STACKED

_MEGABYTE = 2**20
_COLORS = {SEPARATE: BASELINE_COLOR, STACKED: OUR_COLOR, MEAN: PEER_COLOR}


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Time and memory of every batch size and contender."""
    title = (
        f"{record['samples']} samples, {record['tokens']} tokens a sequence, {record['model']}, rank {record['rank']}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ("p20 ms", "p50 ms", "p80 ms", "x separate", "peak MB"):
        table.add_column(header, justify="right", no_wrap=True)
    for batch, rows in record["timings_ms"].items():
        for number, row in enumerate(rows):
            peak = record["peak_bytes"].get(row["name"], {}).get(batch)
            table.add_row(
                "" if number else batch,
                row["name"],
                *(f"{row[key]:.1f}" for key in ("p20", "p50", "p80")),
                f"{row['ratio']:.2f}",
                "-" if peak is None else f"{peak / _MEGABYTE:.0f}",
                end_section=number == len(rows) - 1,
            )
    console.print(table)
    console.print(
        f"Stacked adapters: {record['adapter_bytes'] / _MEGABYTE:.2f} MB on a base of "
        f"{record['base_bytes'] / _MEGABYTE:.0f} MB; stacking and undoing it takes {record['stacking_ms']:.0f} ms. "
        f"Probabilities differ by {record['difference_in_spreads']:.1g} of the samples' spread from separate passes."
    )


def plot(path: Path, record: dict[str, Any]) -> None:
    """Time against separate passes, and peak memory, for every batch size."""
    peaks: dict[str, dict[str, int | None]] = record["peak_bytes"]
    with_memory = bool(peaks) and None not in [value for of in peaks.values() for value in of.values()]
    figure, grid = plt.subplots(
        1, 2 if with_memory else 1, figsize=(11 if with_memory else 6, 3.8), layout="constrained", squeeze=False
    )
    batches = list(record["timings_ms"])
    ratios = {
        name: [next(row["ratio"] for row in rows if row["name"] == name) for rows in record["timings_ms"].values()]
        for name in CONTENDERS
    }
    _bars(grid[0][0], batches, ratios, "{:.2f}")
    grid[0][0].axhline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
    grid[0][0].set_ylabel("time / time of separate passes")
    grid[0][0].set_title(f"{record['samples']} samples of {record['model']}", fontsize=10)
    if with_memory:
        sizes = {name: [(peaks[name][batch] or 0) / _MEGABYTE for batch in batches] for name in CONTENDERS}
        _bars(grid[0][1], batches, sizes, "{:.0f}")
        grid[0][1].set_ylabel("peak memory above the model's own, MB")
        grid[0][1].set_title(f"the model itself: {record['base_bytes'] / _MEGABYTE:.0f} MB", fontsize=10)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTENDERS))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Any, batches: list[str], values: dict[str, list[float]], label: str) -> None:
    width = 0.8 / len(values)
    for number, (name, heights) in enumerate(values.items()):
        at = [i + (number - (len(values) - 1) / 2) * width for i in range(len(batches))]
        bars = axis.bar(at, heights, width * 0.92, color=_COLORS[name], label=name)
        axis.bar_label(bars, [label.format(height) for height in heights], padding=2, fontsize=7)
    axis.set_xticks(range(len(batches)), batches)
    axis.set_xlabel("sequences in the batch")
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
