"""Runs the sharding benchmark: the slowest rank's step over 1, 2 and 4 ranks, against a 1 / ranks share of one's."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.sharding.ranks import IVON, OPTIMIZERS, World
from benchmarks.speed.plots import BASELINE_COLOR, OUR_COLOR
from benchmarks.speed.record import write_json
from benchmarks.speed.workloads import Workload, lora
from ivon_kernels import available_backends

WORKLOADS = (
    Workload("full", "full finetuning, 12 matrices of 2048x1024", ((2048, 1024),) * 12),
    Workload("llama-2-7b", "Llama-2-7B, LoRA r=8 on q, v", lora(32, 4096, 4096, 4096, 8)),
)


def run(*, worlds: Sequence[int], rounds: int, out: Path) -> list[dict[str, Any]]:
    """Measures, prints the table, and writes `sharding.json` and `sharding.png` to `out`.

    Returns:
        One row for each workload, optimizer and world size: ``ms`` (the slowest rank's median step), and ``share`` (its
        ratio to one rank's, median over the rounds, times the number of ranks: 1 is perfect).

    Raises:
        UserError: If the cpu backend is missing or a rank fails.
    """
    if reason := available_backends()["cpu"]:
        raise UserError(f"the cpu backend is missing: {reason}")
    console = Console()
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(WORKLOADS) * rounds)
        for workload in WORKLOADS:
            progress.update(task, description=workload.title)
            with contextlib.ExitStack() as stack:
                groups = {size: stack.enter_context(World(size, workload.shapes)) for size in worlds}
                measured = []
                for _ in range(rounds):
                    measured.append(_round(groups))
                    progress.advance(task)
            rows += _rows(workload, measured)
    _print(console, rows)
    out.mkdir(parents=True, exist_ok=True)
    record = {"rounds": rounds, "rows": rows, "environment": environment(("torch", "ivon-kernels"))}
    write_json(out / "sharding.json", record)
    _plot(out / "sharding.png", rows)
    console.print(f"Record and plot: {out / 'sharding.json'}, {out / 'sharding.png'}")
    return rows


_Round = dict[tuple[str, int], float]  # (optimizer, ranks): the slowest rank's median step, ms


def _round(groups: dict[int, World]) -> _Round:
    """Every rank of every world takes its turn, so that a drift of the machine meets all of them."""
    return {
        (optimizer, size): max(statistics.median(world.turn(rank, optimizer)) for rank in range(size))
        for optimizer in OPTIMIZERS
        for size, world in groups.items()
    }


def _rows(workload: Workload, measured: list[_Round]) -> list[dict[str, Any]]:
    alone = min(size for _, size in measured[0])
    return [
        {
            "workload": workload.title,
            "optimizer": optimizer,
            "ranks": size,
            "ms": statistics.median(one[optimizer, size] for one in measured),
            "share": statistics.median(one[optimizer, size] / one[optimizer, alone] for one in measured) * size / alone,
        }
        for optimizer, size in measured[0]
    ]


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="One rank's optimizer step", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("workload", "optimizer", "ranks", "ms", "x perfect share"):
        table.add_column(header, justify="left" if header in ("workload", "optimizer") else "right")
    for row in rows:
        table.add_row(row["workload"], row["optimizer"], str(row["ranks"]), f"{row['ms']:.2f}", f"{row['share']:.2f}")
    console.print(table)


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Each workload's step time against the number of ranks, with the perfect 1 / ranks."""
    titles = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axes = plt.subplots(1, len(titles), figsize=(5.5 * len(titles), 3.6), layout="constrained")
    for axis, title in zip(axes, titles, strict=True):
        for optimizer in OPTIMIZERS:
            shown = [row for row in rows if (row["workload"], row["optimizer"]) == (title, optimizer)]
            ranks, times = [row["ranks"] for row in shown], [row["ms"] for row in shown]
            color = OUR_COLOR if optimizer == IVON else BASELINE_COLOR
            axis.plot(ranks, times, "o-", color=color, label=optimizer)
            axis.plot(ranks, [times[0] * ranks[0] / n for n in ranks], ":", color=color, label="1 / ranks")
        axis.set(title=title, xlabel="ranks", ylabel="ms per step and rank", xscale="log", yscale="log")
        axis.set_xticks(ranks, [str(n) for n in ranks])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
