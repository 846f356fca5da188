"""The tables of a record, for the terminal and for the report alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.speed.clock import HOST, KERNEL
from benchmarks.speed.contenders import LOAD, SAVE, STEP
from benchmarks.speed.host import PART as HOST_PART
from benchmarks.speed.measure import PART as STEPS_PART
from benchmarks.speed.ours import EVALUATION, RESTORE, SAMPLE, UPDATE
from benchmarks.speed.record import Measurement, Record
from benchmarks.speed.targets import dispatch_table
from benchmarks.speed.traffic import OPERATIONS
from benchmarks.speed.workloads import short

PARTS_OF_A_STEP = (SAMPLE, UPDATE, RESTORE, EVALUATION, SAVE, LOAD)


@dataclass(frozen=True)
class Grid:
    """A table: its first column and those named in `left` are text, the others figures."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()

    def show(self, console: Console) -> None:
        """On the terminal; nothing if it has no rows."""
        if not self.rows:
            return
        table = Table(title=escape(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, header in enumerate(self.headers):
            text = number == 0 or header in self.left
            table.add_column(header, justify="left" if text else "right", no_wrap=not text)
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)

    def markdown(self) -> str:
        """For the report; an empty string if it has no rows."""
        if not self.rows:
            return ""
        marks = ["---" if not number or header in self.left else "---:" for number, header in enumerate(self.headers)]
        lines = [self.headers, marks, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _quantiles(m: Measurement | None) -> list[str]:
    return ["-"] * 3 if m is None else [_ms(value) for value in (m.p20, m.p50, m.p80)]


def _ms(value: float | None) -> str:
    """With three significant digits."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bandwidth(m: Measurement) -> list[str]:
    moved = "-" if m.bytes_per_element is None else str(m.bytes_per_element)
    return [moved, _number(m.gbps, ".1f"), _number(m.copy_share, ".0%")]


def workload_title(record: Record, workload: str, dtype: str) -> str:
    """What the tensors are."""
    info = record.workloads[workload]
    count, elements = info["tensors"], info["elements"]
    return f"{info['title']}, {dtype}: {count} tensor{'s' * (count > 1)}, {short(elements)} elements"


def step_grid(record: Record, workload: str, dtype: str) -> Grid:
    """Every contender's step on one workload."""
    rows = [m for m in record.of(workload, dtype, STEP) if m.part == STEPS_PART]
    kernels = {m.contender: m for m in record.of(workload, dtype, KERNEL)}
    hosts = {m.contender: m for m in record.of(workload, dtype, HOST) if m.part == STEPS_PART}
    device = ["kernel ms", "x AdamW", "host ms"] if kernels else []
    headers = ["one optimizer step", "p20 ms", "p50 ms", "p80 ms", "x AdamW", *device]
    cells = []
    for m in rows:
        kernel, host = kernels.get(m.contender), hosts.get(m.contender)
        further = [_ms(kernel.p50), _number(kernel.ratio), _ms(host.p50)] if kernel and host else ["-"] * len(device)
        moving = _bandwidth(kernel or m)
        cells.append([m.contender, *_quantiles(m), _number(m.ratio), *further, *moving])
    return Grid(workload_title(record, workload, dtype), [*headers, "B/el", "GB/s", "of copy"], cells)


def parts_grid(record: Record, workload: str, dtype: str) -> Grid:
    """What a step is made of, evaluation samples and checkpoints."""
    rows = [m for q in PARTS_OF_A_STEP for m in record.of(workload, dtype, q)]
    cells = [[m.quantity, m.contender, *_quantiles(m), _number(m.ratio), *_bandwidth(m)] for m in rows]
    headers = ["one call", "contender", "p20 ms", "p50 ms", "p80 ms", "x AdamW", "B/el", "GB/s", "of copy"]
    return Grid("Parts of a step, evaluation and checkpoints", headers, cells, left=("contender",))


def memory_grid(record: Record) -> Grid:
    """Peak memory per element of every contender and workload."""
    rows = [m for m in record.measurements if m.quantity == STEP and m.peak_bytes_per_element is not None]
    pairs = list(dict.fromkeys((m.workload, m.dtype) for m in rows))
    peaks = {(m.contender, m.workload, m.dtype): m.peak_bytes_per_element for m in rows}
    names = list(dict.fromkeys(m.contender for m in rows))
    cells = [[name, *(_number(peaks.get((name, *pair)), ".1f") for pair in pairs)] for name in names]
    headers = ["peak bytes per element", *(f"{w}, {'f32' if d == 'float32' else 'bf16'}" for w, d in pairs)]
    return Grid("Peak memory in a step, with weights and gradients, bytes per element", headers, cells)


def model_grid(record: Record) -> Grid:
    """The whole training step."""
    rows = [m for m in record.measurements if m.part == "model" and m.error is None]
    cells = [
        [m.contender, m.quantity, *_quantiles(m), _number(m.ratio, ".4f"), _number(m.peak_bytes_per_element, ".1f")]
        for m in rows
    ]
    headers = ["optimizer", "quantity", "p20 ms", "p50 ms", "p80 ms", "x AdamW", "peak B/LoRA element"]
    title = f"Whole training step: {rows[0].workload}, {rows[0].dtype}" if rows else ""
    return Grid(title, headers, cells, left=("quantity",))


def host_grid(record: Record) -> Grid:
    """The host's microseconds."""
    rows = [m for m in record.measurements if m.part == HOST_PART and m.error is None]
    cells = [[m.contender, m.workload, m.quantity, *_quantiles(m)] for m in rows]
    headers = ["optimizer", "tensors", "quantity", "p20 us", "p50 us", "p80 us"]
    return Grid("Host cost apart from the device's, one thread", headers, cells, left=("tensors", "quantity"))


def targets_grid(targets: Iterable[dict[str, Any]], title: str = "Targets (the worst case of each)") -> Grid:
    """What was promised, what was measured, and by how much it is met or missed."""
    cells = [
        [
            t["name"],
            f"{'>=' if t['at_least'] else '<='} {t['bound']:g}",
            _number(t["measured"], ".3g"),
            t["verdict"],
            t["where"],
        ]
        for t in targets
    ]
    return Grid(title, ["target", "bound", "measured", "verdict", "case"], cells, left=("verdict", "case"))


def missing_grid(record: Record) -> Grid:
    """What was not measured, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for m in record.measurements:
        if m.error is not None:
            what = m.contender if m.quantity in (STEP, HOST) else f"{m.contender}: {m.quantity}"
            where.setdefault((what, m.error), []).append(f"{m.workload} {m.dtype}")
    everywhere = len({(m.workload, m.dtype) for m in record.measurements if m.part == STEPS_PART})
    together: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (what, why), places in where.items():
        together.setdefault((tuple(places), why), []).append(what)
    cells = [
        ["; ".join(whats), "everywhere" if len(places) >= everywhere else ", ".join(places), why]
        for (places, why), whats in together.items()
    ]
    cells += [[row["part"], row["what"], row["why"]] for row in record.left_out]
    return Grid("Not measured", ["contender or part", "on", "why"], cells, left=("on", "why"))


def traffic_grid() -> Grid:
    """What every byte count is made of."""
    cells = [
        [name, str(moved.weights), str(moved.grads), str(moved.state), str(moved.quantized), moved.why]
        for name, moved in OPERATIONS.items()
    ]
    headers = ["operation", "weights", "grads", "float32 state", "bytes", "why"]
    return Grid("Values moved per element", headers, cells, left=("why",))


def dispatch_grid(record: Record) -> Grid:
    """Which backend was faster where."""
    cells = [
        [row["workload"], row["dtype"], row["mode"], row["backend"], f"{row['margin'] - 1:.0%}"]
        for row in dispatch_table(record)
    ]
    headers = ["workload", "dtype", "mode", "backend", "slower by"]
    return Grid("Faster backend (wall time)", headers, cells, left=("dtype", "mode", "backend"))


def show(console: Console, record: Record, parts: Sequence[str]) -> None:
    """Those of the parts that ran, what was not measured, and the targets."""
    if STEPS_PART in parts:
        for workload, dtype in record.pairs():
            if workload in record.workloads and record.of(workload, dtype, STEP):
                step_grid(record, workload, dtype).show(console)
                parts_grid(record, workload, dtype).show(console)
        for grid in (memory_grid, dispatch_grid):
            grid(record).show(console)
    if HOST_PART in parts:
        host_grid(record).show(console)
    if "model" in parts:
        model_grid(record).show(console)
    missing_grid(record).show(console)
    title = "Targets (the worst case of each)"
    if record.dry_run:
        title += ": a dry run, figures mean nothing"
    targets_grid(record.targets, title).show(console)
