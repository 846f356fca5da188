"""The tables and pictures of a record, for the terminal and for the Markdown report alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from rich.console import Console

from benchmarks import tables
from benchmarks.speed import host, model, steps
from benchmarks.speed.clock import HOST, KERNEL
from benchmarks.speed.contender import BASELINE, IVON_OPT, LOAD, OPERATIONS, SAVE, STEP, Traffic, bytes_per_element
from benchmarks.speed.peers import EVALUATION, ONE_LAUNCH, PLAIN, RESTORE, SAMPLE, UPDATE
from benchmarks.speed.record import FILE, Record
from benchmarks.speed.workloads import DTYPES, short

REPORT = "report.md"
OUR_COLOR, PEER_COLOR, BASELINE_COLOR = "#dd8452", "#9aa5b1", "#4c72b0"
SPEED, ROOFLINE, ELEMENTS = "speed.png", "roofline.png", "elements.png"
_DTYPE = "float32"
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_OUR_COLORS = (OUR_COLOR, "#a8401c", "#e8b48f", "#6b3a1e", "#f2c14e", "#7a5c00")
_PEER_COLORS = (
    *("#8fb3de", "#1f3b73", "#c44e52", "#e377a2", "#8172b3"),
    *("#b9a3d6", "#55a868", "#2f6b3c", "#64b5cd", "#777777"),
)
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
_BYTES: Columns = {"B/el": ("bytes_per_element", form(".0f")), "GB/s": ("gbps", form(".1f"))}
_BYTES |= {"of copy": ("copy_share", form(".0%"))}


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
    rows = rows[rows["mode"].isin([PLAIN, ONE_LAUNCH]) & (rows.quantity == STEP) & rows.ours]
    case = ["workload", "dtype", "mode"]
    found = [
        (*name, of.backend[of.p50.idxmin()], f"{of.p50.max() / of.p50.min() - 1:.0%}")
        for name, of in rows.groupby(case, sort=False)
        if len(of) > 1
    ]
    return pd.DataFrame(found, columns=[*case, "backend", "slower by"])


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


# ---- the pictures ---------------------------------------------------------------------------------------------------


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
    sections += [picture(SPEED, f"time of one optimizer step against {BASELINE}"), _METHOD]
    sections += ["## Targets\n", markdown(targets_table(record.targets), 3), "## Bandwidth and size\n"]
    sections.append(picture(ROOFLINE, "bandwidth of one step, under that of a copy"))
    sections.append(picture(ELEMENTS, "time of one step against the number of elements"))
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
