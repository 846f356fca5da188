"""Runs the speed benchmark and holds it against its targets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.speed import report
from benchmarks.speed.contenders import CONTENDERS, IVON_OPT, ONE_PASS, OURS, check, silence_known_warnings
from benchmarks.speed.measure import Timing, compare, memory, scaling
from benchmarks.speed.workloads import WORKLOADS
from ivon_kernels import available_backends
from ivon_kernels.backends import cpu

_SIZES = (4_000_000, 40_000_000, 400_000_000)
_MEGABYTE = 2**20


def run(*, threads: int, rounds: int, max_elements: int, out: Path) -> dict[str, Any]:
    """Measures everything, prints the tables and writes `speed.json` and `speed.png` to `out`.

    Raises:
        UserError: If the cpu backend is missing.
    """
    if reason := available_backends()["cpu"]:
        raise UserError(f"the cpu backend is missing: {reason}")
    torch.set_num_threads(threads)
    silence_known_warnings()
    console = Console()
    sizes = [size for size in _SIZES if size <= max_elements]
    results: dict[str, list[Timing]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(WORKLOADS) * rounds * len(CONTENDERS) + len(sizes) + 1
        task = progress.add_task("", total=total)

        def tick() -> None:
            progress.advance(task)

        for workload in WORKLOADS:
            progress.update(task, description=workload.title)
            check(workload)
            results[workload.name] = compare(workload, CONTENDERS, rounds, tick)
        progress.update(task, description="memory")
        footprint = memory(10_000_000)
        tick()
        progress.update(task, description="scaling")
        sizes_and_times = scaling(sizes, repeats=5, tick=tick)
    targets = _targets(results, footprint, sizes_and_times)
    for workload in WORKLOADS:
        title = f"{workload.title}: {len(workload.shapes)} tensors, {workload.elements / 1e6:.2f}M elements"
        report.print_timings(console, title, results[workload.name])
    report.print_targets(console, targets)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "threads": threads,
        "rounds": rounds,
        "simd": cpu.simd_level(),
        "timings_ms": {name: [asdict(t) for t in timings] for name, timings in results.items()},
        "memory": footprint,
        "scaling": sizes_and_times,
        "targets": targets,
        "environment": environment(("torch", "ivon-kernels", "ivon-opt")),
    }
    report.write_json(out / "speed.json", record)
    titles = {workload.title: results[workload.name] for workload in WORKLOADS}
    report.plot(out / "speed.png", titles, sizes_and_times)
    console.print(f"Record and plot: {out / 'speed.json'}, {out / 'speed.png'}")
    return record


def _ratio(timings: list[Timing], name: str, to: str | None = None) -> float | None:
    """Ratio of a contender to fused AdamW, or to another contender."""
    ratios = {t.name: t.ratio for t in timings}
    own, other = ratios.get(name), 1.0 if to is None else ratios.get(to)
    return None if own is None or not other else own / other


def _targets(
    results: dict[str, list[Timing]], footprint: dict[str, Any], scales: list[dict[str, float]]
) -> list[dict[str, Any]]:
    llama = results["llama-2-7b"]
    growth = footprint["peak_growth_bytes"]
    rows: list[tuple[str, float, float | None, bool]] = [
        ("Llama-2-7B shape: ivon-opt / sample + step, at least", 10.0, _ratio(llama, IVON_OPT, OURS), True),
        ("Llama-2-7B shape: sample + step / fused AdamW, at most", 3.0, _ratio(llama, OURS), False),
        ("Llama-2-7B shape: one pass / fused AdamW, at most", 2.3, _ratio(llama, ONE_PASS), False),
        ("128 tensors of 16x64: sample + step / fused AdamW, at most", 0.7, _ratio(results["128-tiny"], OURS), False),
        ("450 tensors of 16x64: sample + step / fused AdamW, at most", 0.7, _ratio(results["450-tiny"], OURS), False),
        ("state bytes per float32 element, at most", 16.0, footprint["state_bytes_per_element"], False),
        ("peak RSS growth over a step in MB, at most", 1.0, None if growth is None else growth / _MEGABYTE, False),
    ]
    rows += [
        (f"{row['elements'] / 1e6:g}M elements against a tenth of them, at most", 11.0, row["growth"], False)
        for row in scales
        if "growth" in row
    ]
    return [
        {
            "name": name,
            "bound": bound,
            "measured": measured,
            "met": measured is not None and (measured >= bound if least else round(measured, 3) <= bound),
        }
        for name, bound, measured, least in rows
    ]
