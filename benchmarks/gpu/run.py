"""Runs the parts of the GPU benchmark and holds what the folder has of them against the targets."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.gpu import host, model, report
from benchmarks.gpu.clock import CpuClock, clock
from benchmarks.gpu.contenders import GpuContender, contenders
from benchmarks.gpu.dispatch import dispatch_table
from benchmarks.gpu.measure import KINDS, Comparison, Row, compare
from benchmarks.gpu.targets import Target, host_targets, model_targets, step_targets
from benchmarks.gpu.verify import Reference
from benchmarks.gpu.workloads import DRY_WORKLOADS, DTYPES, WORKLOADS
from benchmarks.speed.contenders import silence_known_warnings
from benchmarks.speed.measure import Timing
from benchmarks.speed.report import write_json
from benchmarks.speed.workloads import Workload

PARTS = ("kernels", "model", "host")
PACKAGES = ("torch", "triton", "ivon-kernels", "ivon-opt", "torch-optimi", "transformers", "peft")
TARGETS = "targets.json"


class Budget:
    """The time that a part may take; what has begun is finished."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> bool:
        """Whether more may begin."""
        return time.monotonic() < self._end


def run(*, parts: tuple[str, ...], rounds: int, turn_ms: float, seconds: float, dry_run: bool, out: Path) -> bool:
    """Measures the parts, prints their tables, and writes one JSON for each, a plot, and the targets.

    Args:
        parts: Some of :data:`PARTS`.
        rounds: Turns of each contender.
        turn_ms: About how long a turn measures.
        seconds: For each part: nothing begins after it, and what is left out is named in the record.
        dry_run: Tiny sizes on CPU tensors.
        out: Folder; results of parts that ran before are kept and count for the targets.

    Returns:
        Whether every contender of ours that is available was right and ran.

    Raises:
        UserError: For an unknown part, or without a GPU unless it is a dry run.
    """
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if not dry_run and {"kernels", "model"} & set(parts) and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --dry-run runs everything with tiny sizes on the CPU")
    silence_known_warnings()
    console = Console(width=None if Console().is_terminal else 160)
    out.mkdir(parents=True, exist_ok=True)
    sound = True
    for part in parts:
        budget = Budget(seconds)
        if part == "host":
            record: dict[str, Any] = host.measure(repeats=5 if dry_run else 1000)
            report.print_host(console, record)
        else:
            device = clock(dry_run)
            if part == "kernels":
                record = _kernels(console, device, dry_run, rounds, turn_ms, budget, out)
            else:
                shape = model.TOY if dry_run else model.LLAMA_2_7B
                steps = 2 if dry_run else 10
                record = model.measure(shape, device, rounds=rounds, steps=steps, enough_time=budget.left)
                report.print_model(console, record)
            record = {**device.describe(), **record}
        sound = sound and not record.get("wrong")
        write_json(out / f"{part}.json", {"dry_run": dry_run, **record, "environment": environment(PACKAGES)})
    targets = collect_targets(out, dry_run)
    write_json(out / TARGETS, {"targets": [target.record() for target in targets]})
    report.print_targets(console, targets, dry_run)
    return sound


def _kernels(
    console: Console, device: CpuClock, dry_run: bool, rounds: int, turn_ms: float, budget: Budget, out: Path
) -> dict[str, Any]:
    workloads = DRY_WORKLOADS if dry_run else WORKLOADS
    all_contenders = contenders(device.device)
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    wrong: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads) * len(DTYPES) * len(all_contenders) * rounds)
        for workload in workloads:
            for dtype in DTYPES:
                name = f"{workload.name}, {dtype}"
                if comparisons and not budget.left():
                    left_out.append(name)
                    continue
                progress.update(task, description=name)
                refused = _refused(workload, dtype, device, all_contenders)
                wrong.update({f"{name}, {contender}": reason for contender, reason in refused.items()})
                comparison = compare(
                    workload,
                    dtype,
                    all_contenders,
                    device,
                    rounds=rounds,
                    turn_ms=turn_ms,
                    refused=refused,
                    enough_time=budget.left,
                    tick=lambda: progress.advance(task),
                )
                comparisons.append(comparison)
                wrong.update({f"{name}, {row}": error for row, error in _failed(comparison, all_contenders).items()})
                report.print_comparison(console, comparison)
    report.print_traffic(console)
    table = dispatch_table(comparisons)
    report.print_dispatch(console, table)
    for name in left_out:
        console.print(f"Not measured, the time was up: {name}")
    for name, reason in wrong.items():
        console.print(f"WRONG: {name}: {reason}")
    report.plot(out / "kernels.png", comparisons)
    return {
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "dispatch": table,
        "left_out": left_out,
        "wrong": wrong,
    }


def _refused(workload: Workload, dtype: str, device: CpuClock, among: Sequence[GpuContender]) -> dict[str, str]:
    """Contenders of ours that are not right, with what is wrong."""
    ours = [c for c in among if c.backend is not None and c.missing() is None]
    if not ours:
        return {}
    reference = Reference(workload, DTYPES[dtype], device.device)
    found = {}
    for contender in ours:
        if reason := reference.check(contender):
            found[contender.name] = reason
        device.release()
    return found


def _failed(comparison: Comparison, among: Sequence[GpuContender]) -> dict[str, str]:
    """What went wrong in rows of ours, other than a missing backend."""
    available = {c.name for c in among if c.backend is not None and c.missing() is None}
    return {row.name: row.error for row in comparison.rows if row.error and row.name in available}


def collect_targets(out: Path, dry_run: bool) -> list[Target]:
    """The targets from what the folder's records of this kind of run hold; other parts are not measured."""
    records = {part: _read(out / f"{part}.json", dry_run) for part in PARTS}
    comparisons = [comparison_from(c) for c in (records["kernels"] or {}).get("comparisons", ())]
    return [*step_targets(comparisons), *model_targets(records["model"]), *host_targets(records["host"])]


def _read(path: Path, dry_run: bool) -> dict[str, Any] | None:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record if record.get("dry_run") == dry_run else None


def comparison_from(record: dict[str, Any]) -> Comparison:
    """A comparison as the JSON holds it."""
    rows = []
    for row in record["rows"]:
        times = {kind: None if row[kind] is None else Timing(**row[kind]) for kind in KINDS}
        rows.append(Row(**{**row, **times}))
    return Comparison(**{**record, "rows": rows})
