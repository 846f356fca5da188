"""Runs the stacking benchmark: times, peak memory, tables and plot, and its targets."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.finetune.model import add_lora, load_model
from benchmarks.memory import PeakMemory, return_freed_memory
from benchmarks.speed.clock import clock
from benchmarks.speed.contender import Step
from benchmarks.speed.measure import Row, progress, take_turns, timing
from benchmarks.speed.plots import BASELINE_COLOR, OUR_COLOR, PEER_COLOR, save
from benchmarks.speed.record import write_json
from benchmarks.speed.report import form, show, targets_table, written
from benchmarks.speed.targets import Target, judge
from benchmarks.stacking.passes import MEAN, SEPARATE, STACKED, WAYS, Setup, check, prepare, token_batch

_COLORS = {SEPARATE: BASELINE_COLOR, STACKED: OUR_COLOR, MEAN: PEER_COLOR}
_MEGABYTE = 2**20


@dataclass(frozen=True)
class Options:
    """What to measure; see the command's help."""

    model: str | None
    device: str
    samples: int
    batches: Sequence[int]
    tokens: int
    rank: int
    rounds: int
    threads: int
    memory: bool


def run(options: Options, out: Path) -> dict[str, Any]:
    """Measures, prints the tables, and writes `stacking.json` and `stacking.png` to `out`.

    Returns:
        The record.

    Raises:
        UserError: If the model cannot be read, or stacked samples are not those of separate passes.
    """
    torch.set_num_threads(options.threads)
    console, device = Console(), clock(options.device, dry_run=False)
    with console.status("Loading the model"):
        base, _ = load_model(options.model, device=device.device, in_8bit=False)
        setup = prepare(add_lora(base, seed=0, rank=options.rank), options.samples)
    with progress(console) as bar:
        turns = len(WAYS) * ((options.rounds + 1) * len(options.batches) + options.memory)
        task = bar.add_task("checking", total=turns)
        difference = check(setup, token_batch(setup, min(options.batches), options.tokens))
        rows: list[dict[str, Any]] = []
        for batch in options.batches:
            bar.update(task, description=f"batch of {batch}")
            rows += compare(setup, batch, options.tokens, options.rounds, lambda: bar.advance(task))
        if options.memory:
            bar.update(task, description="memory")
            peaks = peak_memory(setup, options, lambda: bar.advance(task))
            rows = [{**row, "peak_bytes": peaks[row["name"]][row["batch"]]} for row in rows]
    stacking = Step(lambda: setup.stacked().remove())
    record = {
        **asdict(options),
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": str(setup.dtype),
        "rows": rows,
        "stacking_ms": device.wall_ms(stacking, 1)[0],
        "base_bytes": setup.base_bytes,
        "adapter_bytes": setup.adapter_bytes,
        "difference_in_spreads": difference,
        "targets": _targets(rows, setup.adapter_bytes / setup.base_bytes, options),
        "load_average": os.getloadavg()[0],
        "environment": environment(("torch", "ivon-kernels", "transformers", "peft")),
    }
    print_tables(console, record)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "stacking.json", record)
    plot(out / "stacking.png", record)
    console.print(f"Record and plot: {out / 'stacking.json'}, {out / 'stacking.png'}")
    return record


def _targets(rows: list[dict[str, Any]], share: float, options: Options) -> list[dict[str, Any]]:
    ratios = {f"batch {row['batch']}": row["ratio"] for row in rows if row["name"] == STACKED}
    first = {name: ratio for name, ratio in ratios.items() if name == "batch 1"}
    batches = ", ".join(map(str, options.batches))
    return [
        judge(Target(f"batch 1 of {options.tokens} tokens: stacked / separate passes", "", 0.6), first),
        judge(Target(f"batches of {batches}: the largest such ratio", "", 1.0), ratios),
        judge(Target("memory of the stacked adapters in % of the base", "", 1.0), {"": 100 * share}),
    ]


# ---- what is measured ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(setup: Setup, batch: int, tokens: int, rounds: int, after: Callable[[], None]) -> list[dict[str, Any]]:
    """Times the three ways in turn, round after round; the first round is not counted.

    Stacking and undoing it is done outside the measured time: once for all batches of a data set.

    Args:
        setup: Model and posterior.
        batch: Sequences in the batch.
        tokens: Of each sequence.
        rounds: Turns of each, after one that is not counted.
        after: Called after every turn.

    Returns:
        One row for each: milliseconds of all samples together; the ratio is to one pass for each sample.

    Raises:
        UserError: If one fails.
    """
    inputs, device = token_batch(setup, batch, tokens), clock(setup.model.device.type, dry_run=False)
    rows = [Row(name) for name in WAYS]

    def turn(number: int, done: int) -> dict[str, list[float]]:
        name = WAYS[number]
        with setup.stacked() if name == STACKED else contextlib.nullcontext() as stack:
            step = setup.step(name, inputs)
            return {name: device.wall_ms(Step(lambda: step(stack)), 1)}

    take_turns(rows, turn, rounds + 1, after=after)
    if failed := [row for row in rows if row.error]:
        raise UserError(f"{failed[0].name}: {failed[0].error}")
    times = {row.name: row.times[row.name][1:] for row in rows}
    found = {name: timing(own, times[SEPARATE]) for name, own in times.items()}
    return [
        {"batch": batch, "name": name, "p20": t.p20, "p50": t.p50, "p80": t.p80, "ratio": t.ratio}
        for name, t in found.items()
    ]


def peak_memory(setup: Setup, options: Options, after: Callable[[], None]) -> dict[str, dict[int, int | None]]:
    """Peak bytes above the model's own by way and batch size, each way in a process of its own.

    Raises:
        UserError: If a process ends before it has answered.
    """
    result = {}
    for name in WAYS:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                peaks = pool.submit(peaks_of, name, setup.config, setup.dtype, options).result()
            except BrokenProcessPool as error:
                raise UserError(f"a process that measured memory ended: {error}") from error
        result[name] = dict(zip(options.batches, peaks, strict=True))
        after()
    return result


@torch.inference_mode()
def peaks_of(way: str, config: Any, dtype: torch.dtype, options: Options) -> list[int | None]:
    """Peak bytes of one way in this process, over what a model of this configuration and its posterior take.

    Returns:
        One figure for each batch size; None where the system does not tell.
    """
    import transformers

    torch.set_num_threads(options.threads)
    base: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    setup = prepare(add_lora(base.to(options.device), seed=0, rank=options.rank), options.samples)
    setup.step(MEAN, token_batch(setup, 1, 2))(None)  # what the libraries allocate once
    return_freed_memory()
    result = []
    with PeakMemory(setup.model.device) as peak:
        for batch in options.batches:
            inputs = token_batch(setup, batch, options.tokens)
            peak.restart()
            with setup.stacked() if way == STACKED else contextlib.nullcontext() as stack:
                setup.step(way, inputs)(stack)
            result.append(peak.so_far())
    return result


# ---- what is shown ---------------------------------------------------------------------------------------------------


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Time and memory of every batch size and way, and the targets."""
    rows = pd.DataFrame(record["rows"]).reindex(columns=["batch", "name", "p20", "p50", "p80", "ratio", "peak_bytes"])
    rows["megabytes"] = rows.peak_bytes / _MEGABYTE
    times = {f"{name} ms": (name, form(".1f")) for name in ("p20", "p50", "p80")}
    further = {"x separate": ("ratio", form(".2f")), "peak MB": ("megabytes", form(".0f"))}
    table = written(rows, {"": ("name", str), "batch": ("batch", str), **times, **further})
    title = f"{record['samples']} samples, {record['tokens']} tokens a sequence, {record['model']}"
    show(console, f"{title}, rank {record['rank']}", table)
    console.print(
        f"Stacked adapters: {record['adapter_bytes'] / _MEGABYTE:.2f} MB on a base of "
        f"{record['base_bytes'] / _MEGABYTE:.0f} MB; stacking and undoing it takes {record['stacking_ms']:.0f} ms. "
        f"Probabilities differ by {record['difference_in_spreads']:.1g} of the samples' spread from separate passes.\n"
    )
    show(console, "Targets", targets_table(record["targets"]), left=3)


def plot(path: Path, record: dict[str, Any]) -> None:
    """Time against separate passes, and peak memory, for every batch size."""
    rows = pd.DataFrame(record["rows"])
    titles = [f"{record['samples']} samples of {record['model']}"]
    figures = [("ratio", rows.ratio, "time / time of separate passes", "%.2f")]
    if "peak_bytes" in rows and rows.peak_bytes.notna().all():
        titles.append(f"the model itself: {record['base_bytes'] / _MEGABYTE:.0f} MB")
        figures.append(("peak", rows.peak_bytes / _MEGABYTE, "peak memory above the model's own, MB", "%.0f"))
    width = 5.5 * len(figures)
    figure, grid = plt.subplots(1, len(figures), figsize=(width, 3.8), layout="constrained", squeeze=False)
    for axis, title, (name, values, label, text) in zip(grid[0], titles, figures, strict=True):
        bars = rows.assign(**{name: values}).pivot(index="batch", columns="name", values=name)[list(WAYS)]
        bars.plot.bar(ax=axis, color=_COLORS, width=0.8, rot=0, legend=False)
        for container in axis.containers:
            axis.bar_label(container, fmt=text, padding=2, fontsize=7)
        axis.set(xlabel="sequences in the batch", ylabel=label)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    grid[0][0].axhline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
    save(figure, path, dpi=150)
