"""The GPU benchmark's tables and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.contenders import BASELINE
from benchmarks.gpu.measure import Comparison, Row
from benchmarks.gpu.targets import Target
from benchmarks.gpu.traffic import OPERATIONS
from benchmarks.speed.measure import Timing
from benchmarks.speed.report import BASELINE_COLOR, OUR_COLOR, PEER_COLOR


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(headers[0])
    for header in headers[1:]:
        table.add_column(header, justify="right")
    return table


def _micro(time: Timing | None) -> str:
    return "-" if time is None else f"{time.p20 * 1e3:.0f} {time.p50 * 1e3:.0f} {time.p80 * 1e3:.0f}"


def _ratio(time: Timing | None) -> str:
    return "-" if time is None or time.ratio is None else f"{time.ratio:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_errors(console: Console, rows: Sequence[tuple[str, str | None]]) -> None:
    for name, error in rows:
        if error is not None:
            console.print(f" not measured: {name}: {error}", markup=False, highlight=False)


def print_traffic(console: Console) -> None:
    """What every byte count is made of."""
    table = _table("Values moved per element", "operation", "weights", "grads", "float32 state", "why")
    table.columns[-1].justify = "left"
    for name, moved in OPERATIONS.items():
        table.add_row(name, str(moved.weights), str(moved.grads), str(moved.state), moved.why)
    console.print(table)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """One workload's table."""
    c = comparison
    title = (
        f"{c.title}, {c.dtype}: {c.tensors} tensors, {c.elements / 1e6:.2f}M elements; "
        f"copy {c.copy_bandwidth:.0f} GB/s; {c.rounds} rounds"
    )
    headers = ("kernel us", "x AdamW", "wall us", "x AdamW", "host us", "B/el", "GB/s", "of copy", "peak B/el")
    table = _table(title, "p20 p50 p80 of one step", *headers)
    for row in (row for row in c.rows if row.error is None):
        table.add_row(
            *(row.name, _micro(row.kernel), _ratio(row.kernel), _micro(row.wall), _ratio(row.wall), _micro(row.host)),
            *(str(row.bytes_per_element), _number(row.bandwidth, ".0f"), _number(row.copy_share, ".1%")),
            _number(row.peak_bytes_per_element, ".1f"),
        )
    console.print(table)
    _print_errors(console, [(row.name, row.error) for row in c.rows])


def print_dispatch(console: Console, table: Sequence[dict[str, Any]]) -> None:
    """Which backend was faster where."""
    shown = _table("Faster backend (wall time)", "workload", "dtype", "mode", "backend", "slower by")
    for row in table:
        margin = "-" if row["margin"] is None else f"{row['margin'] - 1:.0%}"
        shown.add_row(row["workload"], row["dtype"], row["mode"], row["backend"] or "not measured", margin)
    console.print(shown)


def print_model(console: Console, record: dict[str, Any]) -> None:
    """The whole training step."""
    if "skipped" in record:
        console.print(f"Training step of the whole model: not measured: {record['skipped']}")
        return
    lora = record["lora"]
    title = (
        f"Whole training step: {lora['tensors']} {record['lora_dtype']} LoRA tensors, {lora['elements']} elements; "
        f"checkpointing {record['checkpointing']}; {record['rounds']} rounds"
    )
    table = _table(title, "optimizer", "p20 ms", "p50 ms", "p80 ms", "x AdamW", "peak MB", "extra B/element")
    for row in (row for row in record["rows"] if not row["error"]):
        times = (_number(row["ms"][key], ".2f") for key in ("p20", "p50", "p80"))
        extra = _number(row["extra_bytes_per_element"], ".1f")
        table.add_row(row["name"], *times, _number(row["ratio"], ".4f"), f"{row['peak_bytes'] / 2**20:.1f}", extra)
    console.print(table)
    _print_errors(console, [(row["name"], row["error"]) for row in record["rows"]])


def print_host(console: Console, record: dict[str, Any]) -> None:
    """The host's microseconds."""
    table = _table(
        "Host cost, median us of one step", "optimizer", "tensors", "train()", "step()", "both", "fresh grads"
    )
    for row in (row for row in record["rows"] if not row["error"]):
        same = (f"{row['same'][key]['p50']:.1f}" for key in ("train", "step", "both"))
        table.add_row(row["name"], str(row["tensors"]), *same, f"{row['fresh']['both']['p50']:.1f}")
    console.print(table)
    _print_errors(console, [(f"{row['name']}, {row['tensors']} tensors", row["error"]) for row in record["rows"]])


def print_targets(console: Console, targets: Sequence[Target], dry_run: bool) -> None:
    """What was promised, what was measured, and by how much it is met or missed."""
    table = _table(
        f"Targets (the worst case of each){': a dry run, figures mean nothing' if dry_run else ''}",
        "target",
        "bound",
        "measured",
        "verdict",
        "case",
    )
    table.columns[-1].justify = "left"
    for t in targets:
        bound = f"{'>=' if t.at_least else '<='} {t.bound:g}"
        if t.measured is None:
            table.add_row(t.name, bound, "-", "not measured")
        else:
            verdict = f"{'met' if t.met else 'missed'} by {abs(t.margin):.1%}"
            table.add_row(t.name, bound, f"{t.measured:.3g}", verdict, t.where)
    console.print(table)


def _color(row: Row) -> str:
    return BASELINE_COLOR if row.name == BASELINE else OUR_COLOR if row.backend is not None else PEER_COLOR


def plot(path: Path, comparisons: Sequence[Comparison]) -> None:
    """For each workload: kernel (bar) and wall time (dot) against fused AdamW, and the share of the copy's speed."""
    columns = 2
    rows = max(-(-len(comparisons) // columns), 1)
    figure, grid = plt.subplots(rows, columns, figsize=(14, 3.2 * rows), layout="constrained", squeeze=False)
    for axis, comparison in zip(grid.flat, comparisons, strict=False):
        shown = [row for row in comparison.rows if row.kernel is not None and row.kernel.ratio is not None]
        ratios = [row.kernel.ratio or 0.0 for row in shown if row.kernel is not None]
        walls = [row.wall.ratio or 0.0 for row in shown if row.wall is not None]
        places = range(len(shown))
        bars = axis.barh(places, ratios, color=[_color(row) for row in shown])
        labels = [f"{ratio:.2f}x, {row.copy_share or 0:.0%} of copy" for ratio, row in zip(ratios, shown, strict=True)]
        axis.bar_label(bars, labels, padding=3, fontsize=7)
        axis.plot(walls, places, "k.", markersize=5)
        axis.axvline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
        axis.set_xscale("log")
        axis.set_yticks(places, [row.name for row in shown], fontsize=7)
        axis.set_title(f"{comparison.title}, {comparison.dtype}", fontsize=9)
        axis.set_xlabel("kernel time (bar), wall time (dot) / AdamW (fused)", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.3)
    for axis in list(grid.flat)[len(comparisons) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
