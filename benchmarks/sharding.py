"""What a rank pays for a step on DTensor shards: over 1, 2 and 4 ranks (CPU, one thread), against 1 / ranks of one."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.ranks import ADAMW, IVON, answer, turn_of, world
from benchmarks.speed.measure import Row, progress, take_turns
from benchmarks.speed.record import write_json
from benchmarks.speed.report import BASELINE_COLOR, OUR_COLOR, form, save, show, written
from benchmarks.speed.workloads import Workload, lora
from ivon_kernels import available_backends

OPTIMIZERS = {IVON: OUR_COLOR, ADAMW: BASELINE_COLOR}
WORKLOADS = (
    Workload("full", "full finetuning, 12 matrices of 2048x1024", ((2048, 1024),) * 12),
    Workload("llama-2-7b", "Llama-2-7B, LoRA r=8 on q, v", lora(32, 4096, 4096, 4096, 8)),
)


def run(*, worlds: Sequence[int], rounds: int, out: Path) -> list[dict[str, Any]]:
    """Measures, prints the table, and writes `sharding.json` and `sharding.png` to `out`.

    A row is one workload, optimizer and world size, with ``ms`` (the slowest rank's median step) and ``share`` (its
    ratio to one rank's, median over the rounds, times the number of ranks: 1 is perfect).
    """
    if missing := available_backends()["cpu"]:
        raise UserError(f"the cpu backend is missing: {missing}")
    console = Console()
    rows: list[dict[str, Any]] = []
    with progress(console) as bar:
        task = bar.add_task("", total=len(WORKLOADS) * rounds * len(worlds) * len(OPTIMIZERS))
        for workload in WORKLOADS:
            bar.update(task, description=workload.title)
            rows += _measure(workload, worlds, rounds, lambda: bar.advance(task))
    columns = {"workload": ("workload", str), "optimizer": ("optimizer", str), "ranks": ("ranks", str)}
    figures = {"ms": ("ms", form(".2f")), "x perfect share": ("share", form(".2f"))}
    show(console, "One rank's optimizer step", written(pd.DataFrame(rows), {**columns, **figures}), left=2)
    out.mkdir(parents=True, exist_ok=True)
    record = {"rounds": rounds, "rows": rows, "environment": environment(("torch", "ivon-kernels"))}
    write_json(out / "sharding.json", record)
    plot(out / "sharding.png", rows)
    console.print(f"Record and plot: {out / 'sharding.json'}, {out / 'sharding.png'}")
    return rows


def _measure(workload: Workload, worlds: Sequence[int], rounds: int, after: Callable[[], None]) -> list[dict[str, Any]]:
    """Every rank of every world takes its turn, so that a drift of the machine meets all of them."""
    entries = list(itertools.product(OPTIMIZERS, worlds))
    rows = [Row(f"{optimizer}, {size} ranks") for optimizer, size in entries]
    with contextlib.ExitStack() as stack:
        groups = {size: stack.enter_context(world(size, workload.shapes)) for size in worlds}

        def turn(number: int, done: int) -> dict[str, list[float]]:
            optimizer, size = entries[number]
            ranks = enumerate(groups[size])  # one after the other: never two at a time
            times = [answer(rank.submit(turn_of, optimizer), index, size) for index, rank in ranks]
            return {"step": [max(map(statistics.median, times))]}

        take_turns(rows, turn, rounds, after=after)
    if failed := [row for row in rows if row.error]:
        raise UserError(f"{failed[0].name}: {failed[0].error}")
    times = {entry: [value for (value,) in row.times["step"]] for entry, row in zip(entries, rows, strict=True)}
    alone = min(worlds)
    found = []
    for (optimizer, size), own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times[optimizer, alone], strict=True))
        what = {"workload": workload.title, "optimizer": optimizer, "ranks": size}
        found.append({**what, "ms": statistics.median(own), "share": ratio * size / alone})
    return found


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Each workload's step time against the number of ranks, with the perfect 1 / ranks."""
    workloads = pd.DataFrame(rows).groupby("workload", sort=False)
    figure, axes = plt.subplots(1, len(workloads), figsize=(5.5 * len(workloads), 3.6), layout="constrained")
    for axis, (title, of) in zip(axes, workloads, strict=True):
        for optimizer, shown in of.groupby("optimizer", sort=False):
            axis.plot(shown.ranks, shown.ms, "o-", color=OPTIMIZERS[optimizer], label=optimizer)
            perfect = shown.ms.iloc[0] * shown.ranks.iloc[0] / shown.ranks
            axis.plot(shown.ranks, perfect, ":", color=OPTIMIZERS[optimizer], label="1 / ranks")
        axis.set(title=title, xlabel="ranks", ylabel="ms per step and rank", xscale="log", yscale="log")
        axis.set_xticks(of.ranks.unique(), of.ranks.unique().astype(str))
        axis.minorticks_off()
        axis.legend()
    save(figure, path, dpi=120)
