"""The tables of a record, for the terminal and for the Markdown report alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from benchmarks import tables
from benchmarks.speed import host, model, plots, steps
from benchmarks.speed.clock import HOST, KERNEL
from benchmarks.speed.contender import BASELINE, LOAD, OPERATIONS, SAVE, STEP, Traffic
from benchmarks.speed.peers import EVALUATION, ONE_LAUNCH, PLAIN, RESTORE, SAMPLE, UPDATE
from benchmarks.speed.record import FILE, Record
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
    return lambda value: tables.NOTHING if pd.isna(value) else format(value, spec)


def ms(value: float) -> str:
    """With three significant digits."""
    return form(".0f" if value >= 100 else ".3g")(value)


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
    return tables.markdown(table, left) + "\n" if len(table) else ""


def show(console: Console, title: str, table: pd.DataFrame, left: int = 1) -> None:
    """A table on the terminal; nothing if it has no rows."""
    if len(table):
        console.print(f"{title}\n\n{markdown(table, left)}", markup=False, highlight=False, soft_wrap=True)


# ---- the tables ------------------------------------------------------------------------------------------------------


def step_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every contender's step on one workload; on a GPU the host's and the kernels' time beside it."""
    by = {quantity: of.set_index("contender") for quantity, of in rows.groupby("quantity")}
    whole = by[STEP].assign(contender=by[STEP].index)
    moving = by.get(KERNEL, whole).reindex(whole.index)
    table = written(whole, {"one optimizer step": ("contender", str), **_TIMES, **_RATIO})
    if KERNEL in by:
        kernel: Columns = {"kernel ms": ("p50", ms), "kernel x AdamW": ("ratio", form(".2f"))}
        table = table.join(written(moving, kernel)).join(written(by[HOST], {"host ms": ("p50", ms)})).fillna("-")
    return table.join(written(moving, _BYTES))


def parts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What a step is made of, evaluation samples and checkpoints."""
    places = {quantity: place for place, quantity in enumerate((SAMPLE, UPDATE, RESTORE, EVALUATION, SAVE, LOAD))}
    rows = rows.assign(order=rows.quantity.map(places)).dropna(subset="order").sort_values("order", kind="stable")
    return written(rows, {"one call": ("quantity", str), "contender": ("contender", str), **_TIMES, **_RATIO, **_BYTES})


def memory_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Peak memory per element of every contender and workload."""
    rows = rows[rows.quantity == STEP].dropna(subset="peak_bytes_per_element")
    rows = rows.assign(place=rows.workload + ", " + rows.dtype.map({"float32": "f32", "bfloat16": "bf16"}))
    table = rows.pivot(index="contender", columns="place", values="peak_bytes_per_element")
    table = table.reindex(index=rows.contender.unique(), columns=rows.place.unique()).map(form(".1f"))
    return table.rename_axis("peak bytes per element").reset_index()


def dispatch_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Which of our backends was the faster one, by wall time, where several were measured."""
    rows = rows.assign(**rows.contender.str.extract(r"^ivon_kernels (?P<backend>\w+), (?P<mode>.*)$"))
    cases = rows[rows["mode"].isin([PLAIN, ONE_LAUNCH]) & (rows.quantity == STEP) & rows.ours].groupby(
        ["workload", "dtype", "mode"], sort=False
    )
    cells = [
        (*case, of.backend[of.p50.idxmin()], f"{of.p50.max() / of.p50.min() - 1:.0%}")
        for case, of in cases
        if len(of) > 1
    ]
    return pd.DataFrame(cells, columns=["workload", "dtype", "mode", "backend", "slower by"])


def model_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The whole training step, and the optimizer's share of it: of the medians of its two parts."""
    passes = rows[rows.quantity == model.PASSES].set_index("contender").p50
    own = rows.p50.where(rows.quantity == model.OPTIMIZER)
    rows = rows.assign(share=own / (own + rows.contender.map(passes)))
    columns: Columns = {"optimizer": ("contender", str), "quantity": ("quantity", str), **_TIMES}
    columns |= {"x AdamW": ("ratio", form(".4f")), "share": ("share", form(".2%"))}
    return written(rows, columns | {"peak B/LoRA element": ("peak_bytes_per_element", form(".1f"))})


def host_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The host's microseconds."""
    columns: Columns = {"optimizer": ("contender", str), "tensors": ("workload", str), "quantity": ("quantity", str)}
    return written(rows, columns | {f"p{q} us": (f"p{q}", ms) for q in (20, 50, 80)})


def targets_table(targets: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was promised, what was measured, and by how much it is met or missed."""
    rows = pd.DataFrame(targets, columns=["name", "where", "verdict", "at_least", "bound", "measured"])
    rows["bound"] = [f"{'>=' if row.at_least else '<='} {row.bound:g}" for row in rows.itertuples()]
    columns: Columns = {"target": ("name", str), "case": ("where", str), "verdict": ("verdict", str)}
    return written(rows, columns | {"bound": ("bound", str), "measured": ("measured", form(".3g"))})


def missing_table(record: Record) -> pd.DataFrame:
    """What was not measured, and why."""
    rows = record.frame()
    everywhere = len(rows[rows.part == steps.PART][["workload", "dtype"]].drop_duplicates())
    rows = rows[rows.error.notna()]
    what = rows.contender + (": " + rows.quantity).mask(rows.quantity.isin([STEP, HOST]), "")
    rows = rows.assign(what=what, on=rows.workload + " " + rows.dtype)
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
    table = pd.DataFrame(OPERATIONS.values(), list(OPERATIONS), Traffic._fields).astype(str).reset_index()
    table = table[["index", "why", "weights", "grads", "state", "quantized"]]
    return table.set_axis(["operation", "why", "weights", "grads", "float32 state", "bytes"], axis=1)


# ---- the report ------------------------------------------------------------------------------------------------------

_PIECES = "Parts of a step, evaluation and checkpoints"


def _tables(record: Record, parts: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame, int]]:
    """Those of the parts, and what was not measured: title, table, and how many of its columns are text."""
    rows = {part: record.measured(part) for part in parts}
    if (of := rows.get(steps.PART)) is not None:
        for (workload, dtype), case in of.groupby(["workload", "dtype"], sort=False):
            if workload in record.workloads and STEP in set(case.quantity):
                title, count, elements = (record.workloads[workload][key] for key in ("title", "tensors", "elements"))
                title = f"{title}, {dtype}: {count} tensor{'s' * (count > 1)}, {short(elements)} elements"
                yield title, step_table(case), 1
                yield _PIECES, parts_table(case), 2
        yield "Peak memory in a step, with weights and gradients, bytes per element", memory_table(of), 1
        yield "Faster backend (wall time)", dispatch_table(of), 4
    if (of := rows.get(model.PART)) is not None:
        named = f": {of.workload.iloc[0]}, {of.dtype.iloc[0]}" if len(of) else ""
        yield f"Whole training step{named}", model_table(of), 2
    if (of := rows.get(host.PART)) is not None:
        yield "Host cost apart from the device's, one thread", host_table(of), 3
    yield "Not measured", missing_table(record), 3


def print_tables(console: Console, record: Record, parts: Sequence[str]) -> None:
    """Those of the parts that ran, what was not measured, and the targets."""
    title = f"Targets (the worst case of each){': a dry run, figures mean nothing' if record.dry_run else ''}"
    for table in (*_tables(record, parts), (title, targets_table(record.targets), 3)):
        show(console, *table)


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
    every = (*_tables(record, (steps.PART, model.PART, host.PART)), ("Values moved per element", traffic_table(), 2))
    for title, table, left in every:
        heading = "" if title == _PIECES else f"## {title}\n"  # of the workload above it
        sections += [heading, markdown(table, left)] if len(table) else []
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
