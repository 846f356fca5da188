"""The tables of a record, for the terminal and for the Markdown report alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from benchmarks.speed import host, model, plots, steps
from benchmarks.speed.clock import HOST, KERNEL
from benchmarks.speed.contender import BASELINE, LOAD, SAVE, STEP
from benchmarks.speed.lineup import EVALUATION, ONE_LAUNCH, PLAIN, RESTORE, SAMPLE, UPDATE
from benchmarks.speed.record import FILE, Record
from benchmarks.speed.traffic import OPERATIONS
from benchmarks.speed.workloads import short

REPORT = "report.md"
_METHOD = f"""\
Every contender takes its turns on fresh tensors, round after round. Before it is timed its result is checked: ours must
have the bits of the reference backend; the others must change the weights, leave them finite, and, where they compute
AdamW's update, agree with torch's. *x AdamW* is the median over the rounds of its median over that of {BASELINE} in the
same round; for a part that AdamW does not have, over its whole step. *B/el* is what must move per element (last table),
*GB/s* those bytes over the median time, *of copy* its share of a large copy's bandwidth (bytes read and written). It
can be exceeded: small tensors stay in caches, and a processor may read what a copy overwrites, which is not counted and
which a step in place does not need.
"""
Columns = dict[str, tuple[str, Callable[[Any], str]]]  # by header: a column of the frame, and how its cells are written


def form(spec: str) -> Callable[[Any], str]:
    """Writes a figure, and what is missing as a dash."""
    return lambda value: "-" if pd.isna(value) else format(value, spec)


def ms(value: float) -> str:
    """With three significant digits."""
    return "-" if pd.isna(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


_TIMES: Columns = {f"p{q} ms": (f"p{q}", ms) for q in (20, 50, 80)}
_RATIO: Columns = {"x AdamW": ("ratio", form(".2f"))}
_BYTES: Columns = {
    "B/el": ("bytes_per_element", form(".0f")),
    "GB/s": ("gbps", form(".1f")),
    "of copy": ("copy_share", form(".0%")),
}


def written(rows: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """A table of text."""
    return pd.DataFrame({header: rows[column].map(write) for header, (column, write) in columns.items()}, dtype=object)


def markdown(table: pd.DataFrame, left: int = 1) -> str:
    """A table of text in Markdown, of which the first `left` columns are no figures; an empty one is nothing."""
    if not len(table):
        return ""
    align = ["left" if number < left else "right" for number in range(table.shape[1])]
    cells = table.map(lambda cell: cell.replace("|", "\\|"))
    return str(cells.to_markdown(index=False, disable_numparse=True, colalign=align)) + "\n"


def show(console: Console, title: str, table: pd.DataFrame, left: int = 1) -> None:
    """A table on the terminal; nothing if it has no rows."""
    if text := markdown(table, left):
        console.print(f"{title}\n\n{text}", markup=False, highlight=False, soft_wrap=True)


# ---- the tables ------------------------------------------------------------------------------------------------------


def step_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every contender's step on one workload; on a GPU the host's and the kernels' time beside it."""
    by = {quantity: of.set_index("contender") for quantity, of in rows.groupby("quantity")}
    whole = by[STEP]
    moving = by[KERNEL].reindex(whole.index) if KERNEL in by else whole
    columns = {"one optimizer step": whole.index, **{h: whole[c].map(w) for h, (c, w) in (_TIMES | _RATIO).items()}}
    if KERNEL in by:
        columns["kernel ms"] = moving.p50.map(ms)
        columns["kernel x AdamW"] = moving.ratio.map(form(".2f"))
        columns["host ms"] = by[HOST].p50.reindex(whole.index).map(ms)
    return pd.DataFrame({**columns, **{h: moving[c].map(w) for h, (c, w) in _BYTES.items()}}, dtype=object)


def parts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What a step is made of, evaluation samples and checkpoints."""
    places = {quantity: place for place, quantity in enumerate((SAMPLE, UPDATE, RESTORE, EVALUATION, SAVE, LOAD))}
    rows = rows.assign(order=rows.quantity.map(places)).dropna(subset="order").sort_values("order", kind="stable")
    names: Columns = {"one call": ("quantity", str), "contender": ("contender", str)}
    return written(rows, names | _TIMES | _RATIO | _BYTES)


def memory_table(record: Record) -> pd.DataFrame:
    """Peak memory per element of every contender and workload."""
    rows = record.measured(steps.PART).dropna(subset="peak_bytes_per_element")
    rows = rows[rows.quantity == STEP]
    rows = rows.assign(place=rows.workload + ", " + rows.dtype.map({"float32": "f32", "bfloat16": "bf16"}))
    table = rows.pivot(index="contender", columns="place", values="peak_bytes_per_element")
    table = table.reindex(index=rows.contender.unique(), columns=rows.place.unique()).map(form(".1f"))
    return table.rename_axis("peak bytes per element").reset_index()


def dispatch_table(record: Record) -> pd.DataFrame:
    """Which of our backends was the faster one, by wall time, where several were measured."""
    rows = record.measured(steps.PART)
    named = rows.contender.str.extract(r"^ivon_kernels (?P<backend>\w+), (?P<mode>.*)$")
    rows = rows.assign(**named)[named["mode"].isin([PLAIN, ONE_LAUNCH]) & (rows.quantity == STEP) & rows.ours]
    cells = []
    for (workload, dtype, mode), of in rows.groupby(["workload", "dtype", "mode"], sort=False):
        if len(of) > 1:
            slower = of.p50.max() / of.p50.min() - 1
            cells.append((workload, dtype, mode, of.backend[of.p50.idxmin()], f"{slower:.0%}"))
    return pd.DataFrame(cells, columns=["workload", "dtype", "mode", "backend", "slower by"])


def model_table(record: Record) -> pd.DataFrame:
    """The whole training step, and the optimizer's share of it: of the medians of its two parts."""
    rows = record.measured(model.PART)
    passes = rows[rows.quantity == model.PASSES].set_index("contender").p50
    own = rows.p50.where(rows.quantity == model.OPTIMIZER)
    rows = rows.assign(share=own / (own + rows.contender.map(passes)))
    columns: Columns = {"optimizer": ("contender", str), "quantity": ("quantity", str), **_TIMES}
    columns |= {"x AdamW": ("ratio", form(".4f")), "share": ("share", form(".2%"))}
    return written(rows, columns | {"peak B/LoRA element": ("peak_bytes_per_element", form(".1f"))})


def host_table(record: Record) -> pd.DataFrame:
    """The host's microseconds."""
    columns: Columns = {"optimizer": ("contender", str), "tensors": ("workload", str), "quantity": ("quantity", str)}
    columns |= {header.replace("ms", "us"): column for header, column in _TIMES.items()}
    return written(record.measured(host.PART), columns)


def targets_table(targets: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was promised, what was measured, and by how much it is met or missed."""
    rows = pd.DataFrame(targets)
    if len(rows):
        rows["bound"] = [f"{'>=' if t['at_least'] else '<='} {t['bound']:g}" for t in targets]
    columns: Columns = {"target": ("name", str), "case": ("where", str), "verdict": ("verdict", str)}
    columns |= {"bound": ("bound", str), "measured": ("measured", form(".3g"))}
    return written(rows, columns) if len(rows) else rows


def missing_table(record: Record) -> pd.DataFrame:
    """What was not measured, and why."""
    rows = record.frame()
    everywhere = len(rows[rows.part == steps.PART][["workload", "dtype"]].drop_duplicates())
    rows = rows[rows.error.notna()]
    alone = rows.quantity.isin([STEP, HOST])
    rows = rows.assign(
        what=rows.contender + (": " + rows.quantity).mask(alone, ""), on=rows.workload + " " + rows.dtype
    )
    rows = rows.groupby(["what", "error"], sort=False).on.agg(tuple).reset_index()
    rows = rows.groupby(["on", "error"], sort=False).what.agg("; ".join).reset_index()
    cells = [
        (what, "everywhere" if len(places) >= everywhere else ", ".join(places), why)
        for places, why, what in rows.itertuples(index=False)
    ]
    cells += [(row["part"], row["what"], row["why"]) for row in record.left_out]
    return pd.DataFrame(cells, columns=["contender or part", "on", "why"])


def traffic_table() -> pd.DataFrame:
    """What every byte count is made of."""
    headers = ["operation", "why", "weights", "grads", "float32 state", "bytes"]
    cells = [(name, t.why, t.weights, t.grads, t.state, t.quantized) for name, t in OPERATIONS.items()]
    return pd.DataFrame(cells, columns=headers).astype(str)


# ---- the report ------------------------------------------------------------------------------------------------------


def _steps_tables(record: Record) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Title, steps and parts of every workload."""
    for (workload, dtype), rows in record.measured(steps.PART).groupby(["workload", "dtype"], sort=False):
        if workload in record.workloads and STEP in set(rows.quantity):
            count, elements = record.workloads[workload]["tensors"], record.workloads[workload]["elements"]
            title = f"{record.workloads[workload]['title']}, {dtype}: {count} tensor{'s' * (count > 1)}, "
            yield title + f"{short(elements)} elements", step_table(rows), parts_table(rows)


def _tables(record: Record, parts: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame, int]]:
    """Those of the parts: title, table, and how many of its columns are text."""
    if steps.PART in parts:
        yield "Peak memory in a step, with weights and gradients, bytes per element", memory_table(record), 1
        yield "Faster backend (wall time)", dispatch_table(record), 4
    if model.PART in parts:
        rows = record.measured(model.PART)
        named = f": {rows.workload.iloc[0]}, {rows.dtype.iloc[0]}" if len(rows) else ""
        yield f"Whole training step{named}", model_table(record), 2
    if host.PART in parts:
        yield "Host cost apart from the device's, one thread", host_table(record), 3
    yield "Not measured", missing_table(record), 3


def print_tables(console: Console, record: Record, parts: Sequence[str]) -> None:
    """Those of the parts that ran, what was not measured, and the targets."""
    for title, whole, pieces in _steps_tables(record) if steps.PART in parts else ():
        show(console, title, whole)
        show(console, "Parts of a step, evaluation and checkpoints", pieces, 2)
    for title, table, left in _tables(record, parts):
        show(console, title, table, left)
    title = f"Targets (the worst case of each){': a dry run, figures mean nothing' if record.dry_run else ''}"
    show(console, title, targets_table(record.targets), 3)


def write(out: Path, record: Record) -> None:
    """`report.md`, from the record alone."""

    def picture(name: str, text: str) -> str:
        return f"![{text}]({name})\n" if (out / name).exists() else ""

    sections = [f"# One optimizer step on {record.device.get('name')}\n", _facts(record)]
    sections.append("**A dry run: the figures mean nothing.**\n" if record.dry_run else "")
    sections += [picture(plots.SPEED, f"time of one optimizer step against {BASELINE}"), _METHOD]
    sections += ["## Targets\n", markdown(targets_table(record.targets), 3), "## Bandwidth and size\n"]
    sections.append(picture(plots.ROOFLINE, "bandwidth of one step, under that of a copy"))
    sections.append(picture(plots.ELEMENTS, "time of one step against the number of elements"))
    for title, whole, pieces in _steps_tables(record):
        sections += [f"## {title}\n", markdown(whole), markdown(pieces, 2)]
    every = (steps.PART, model.PART, host.PART)
    for title, table, left in (*_tables(record, every), ("Values moved per element", traffic_table(), 2)):
        sections += [f"## {title}\n", markdown(table, left)] if len(table) else []
    (out / REPORT).write_text("\n".join(filter(None, sections)), encoding="utf-8")


def _facts(record: Record) -> str:
    environment, device = record.environment, record.device
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    copied = ", ".join(f"{gbps:.1f} GB/s ({where})" for where, gbps in record.copy_gbps.items())
    details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("kind", "name"))
    parts = ", ".join(f"{name} ({part['date']}, {part['commit']})" for name, part in record.settings["parts"].items())
    return (
        f"- device: {device['name']} ({details}); a large copy moves {copied or 'not measured'}\n"
        f"- versions: Python {environment['python']}, {versions}\n"
        f"- measured: {parts}\n"
        f"- record: [{FILE}]({FILE})\n"
    )
