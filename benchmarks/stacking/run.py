"""Runs the stacking benchmark and holds it against its targets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.finetune.model import add_lora, load_model
from benchmarks.speed.record import write_json
from benchmarks.speed.tables import targets_grid
from benchmarks.speed.targets import target
from benchmarks.speed.timing import Timing
from benchmarks.stacking import report
from benchmarks.stacking.contenders import CONTENDERS, STACKED, Setup, check, prepare, token_batch
from benchmarks.stacking.measure import compare, peak_memory, stacking_ms

_PACKAGES = ("torch", "ivon-kernels", "transformers", "peft")


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
    console = Console()
    with console.status("Loading the model"):
        base, _ = load_model(options.model, device=_device(options.device), in_8bit=False)
        setup = prepare(add_lora(base, seed=0, rank=options.rank), options.samples)
    measured = _measure(setup, options, console)
    record = {
        **asdict(options),
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": str(setup.dtype),
        "timings_ms": {str(batch): [asdict(t) for t in rows] for batch, rows in measured.timings.items()},
        "peak_bytes": {
            name: dict(zip(map(str, options.batches), values, strict=True)) for name, values in measured.peaks.items()
        },
        "stacking_ms": stacking_ms(setup),
        "base_bytes": setup.base_bytes,
        "adapter_bytes": setup.adapter_bytes,
        "difference_in_spreads": measured.difference,
        "targets": _targets(measured.timings, setup.adapter_bytes / setup.base_bytes, options.tokens),
        "load_average": os.getloadavg()[0],
        "environment": environment(_PACKAGES),
    }
    report.print_tables(console, record)
    targets_grid(record["targets"], "Targets").show(console)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "stacking.json", record)
    report.plot(out / "stacking.png", record)
    console.print(f"Record and plot: {out / 'stacking.json'}, {out / 'stacking.png'}")
    return record


class _Measured(NamedTuple):
    difference: float
    timings: dict[int, list[Timing]]
    peaks: dict[str, list[int | None]]


def _measure(setup: Setup, options: Options, console: Console) -> _Measured:
    """Checks, times and weighs, behind a progress bar."""
    timings: dict[int, list[Timing]] = {}
    peaks: dict[str, list[int | None]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        turns = len(CONTENDERS) * (options.rounds * len(options.batches) + options.memory)
        task = progress.add_task("checking", total=turns)

        def tick() -> None:
            progress.advance(task)

        difference = check(setup, token_batch(setup, min(options.batches), options.tokens))
        for batch in options.batches:
            progress.update(task, description=f"batch of {batch}")
            timings[batch] = compare(setup, batch, options.tokens, options.rounds, tick)
        if options.memory:
            progress.update(task, description="memory")
            try:
                peaks = peak_memory(setup, options.batches, options.tokens, options.rank, options.threads, tick)
            except BrokenProcessPool as error:
                raise UserError(f"a process that measured memory ended: {error}") from error
    return _Measured(difference, timings, peaks)


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here")
    return torch.device(name)


def _targets(timings: dict[int, list[Timing]], share: float, tokens: int) -> list[dict[str, Any]]:
    ratios = {batch: next(t.ratio for t in rows if t.name == STACKED) for batch, rows in timings.items()}
    cases = [(f"batch {batch}", ratio) for batch, ratio in ratios.items() if ratio is not None]
    first = [case for case in cases if case[0] == "batch 1"]
    rows = [
        target(f"batch 1 of {tokens} tokens: stacked / separate passes", 0.6, first),
        target(f"batches of {', '.join(map(str, timings))}: the largest such ratio", 1.0, cases),
        target("memory of the stacked adapters in % of the base", 1.0, [("", 100 * share)]),
    ]
    return [row.record() for row in rows]
