"""The table of what changed."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.compare.changes import (
    BASELINE,
    FAILED,
    FASTER,
    LESS_MEMORY,
    NOT_JUDGED,
    PEER,
    RUNS,
    SAME,
    Change,
    Comparison,
)
from benchmarks.compare.records import Key, Record


def print_comparison(console: Console, comparison: Comparison, old: Record, new: Record, *, everything: bool) -> None:
    """The regressions (or everything), what only one record has, and the counts."""
    shown = comparison.changes if everything else comparison.regressions
    if shown:
        console.print(_table(shown, "All measurements" if everything else "Regressions"))
    for verdict in (RUNS, NOT_JUDGED) if not everything else ():
        for change in (change for change in comparison.changes if change.verdict == verdict):
            console.print(escape(f"{verdict}: {_name(change.key)}: {change.reason}"), highlight=False)
    _print_missing(console, f"only in {old.path}", comparison.only_old)
    _print_missing(console, f"only in {new.path}", comparison.only_new)
    for package in sorted(old.versions.keys() | new.versions.keys()):
        before, after = (record.versions.get(package) or "none" for record in (old, new))
        if before != after:
            console.print(f"note: {package} {before} -> {after}", markup=False, highlight=False)
    _print_summary(console, comparison, old, new)


def _table(changes: Sequence[Change], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("workload", "dtype", "contender", "quantity", "figure"):
        table.add_column(header)
    for header in ("old", "new", "change", "95% interval"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict")
    for c in changes:
        interval = "" if c.interval is None else f"{c.interval[0]:+.1%} {c.interval[1]:+.1%}"
        change = "" if c.change is None else f"{c.change:+.1%}"
        verdict = f"{c.verdict}: {c.reason}" if c.reason else c.verdict
        cells = (*c.key, c.figure, _figure(c.old), _figure(c.new), change, interval, verdict)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _name(key: Key) -> str:
    return ", ".join(key)


def _print_missing(console: Console, title: str, keys: Sequence[Key]) -> None:
    for key in keys:
        console.print(escape(f"{title}: {_name(key)}"), highlight=False)


def _print_summary(console: Console, comparison: Comparison, old: Record, new: Record) -> None:
    counts = comparison.count()
    noise = comparison.noise["ratios"]
    if noise is None:
        noise = comparison.noise["rounds"]
    allowed = (
        "too few measurements of peers to tell the noise from run to run, which is not allowed for"
        if noise is None
        else f"noise from run to run, told by {comparison.peers} measurements of peers: {noise:.1%}"
    )
    beyond = [c for c in comparison.changes if c.verdict == PEER and abs(c.change or 0.0) > comparison.threshold]
    slower = sum((c.change or 0.0) > 0 for c in beyond)
    lines = [
        f"{old.commit} -> {new.commit}, threshold {comparison.threshold:.0%}; {allowed}.",
        f"Peers that differ by more than the threshold: {slower} slower, {len(beyond) - slower} faster, "
        f"of {counts[PEER]}.",
        f"Ours: {len(comparison.regressions)} regressions; {counts[FASTER]} faster, {counts[LESS_MEMORY]} with less "
        f"memory, {counts[RUNS]} that run now, {counts[SAME]} the same within threshold and noise; "
        f"{counts[NOT_JUDGED]} not judged, {counts[FAILED]} failed in both, {counts[BASELINE]} baselines.",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
