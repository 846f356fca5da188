"""Runs the parts of the speed benchmark and holds what the folder has of them against the targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.speed import host, measure, memory, model, tables
from benchmarks.speed.clock import CpuClock, clock
from benchmarks.speed.contenders import Contender, all_contenders
from benchmarks.speed.measure import Budget, Comparer
from benchmarks.speed.record import Measurement, Record, read
from benchmarks.speed.targets import targets
from benchmarks.speed.workloads import DTYPES, Workload, chosen, flat, short

STEPS, HOST, MODEL = measure.PART, host.PART, "model"
PACKAGES = ("torch", "triton", "ivon-kernels", "transformers", "peft")
_SLOW_ELEMENTS = 1_000_000  # that --quick gives to a contender of which one turn is enough


@dataclass(frozen=True)
class Options:
    """What to measure; see the command's help."""

    parts: tuple[str, ...] = (STEPS, HOST, MODEL)
    device: str = ""
    threads: int = 2
    rounds: int = 10
    turn_ms: float = 50.0
    seconds: float = 600.0
    max_elements: int = 1_000_000_000
    quick: bool = False
    compiling: bool = True
    report: bool = True
    dry_run: bool = False


def run(options: Options, out: Path) -> bool:
    """Measures the parts, prints their tables, and writes `speed.json`, `report.md` and its pictures to `out`.

    Measurements of the same device that `out` holds of other parts are kept, and count for the targets.

    The record is written after every workload, so that a run that is ended leaves what it had.

    Returns:
        Whether every contender of ours that is available was right and ran.

    Raises:
        UserError: For an unknown part or device.
    """
    if unknown := set(options.parts) - {STEPS, HOST, MODEL}:
        raise UserError(f"there is no part {', '.join(sorted(unknown))}; choose from {STEPS}, {HOST}, {MODEL}")
    torch.set_num_threads(options.threads)
    device = clock(options.device or ("cuda" if torch.cuda.is_available() else "cpu"), options.dry_run)
    console = Console(width=None if Console().is_terminal else 160)
    out.mkdir(parents=True, exist_ok=True)
    record = _kept(out, device, options)
    record.environment = environment((*PACKAGES, *_packages(device)))
    session = Session(record, device, options, Budget(options.seconds), console, out)
    for part in options.parts:
        session.budget = Budget(options.seconds)
        _PARTS[part](session)
        session.save(part)
    session.save()
    if options.report:
        from benchmarks.speed import plots, report  # matplotlib takes a second

        plots.draw(out, record)
        report.write(out, record)
    tables.show(console, record, options.parts)
    for name, why in session.wrong.items():
        console.print(f"WRONG: {name}: {why}", markup=False, highlight=False)
    console.print(f"{'Record, pictures and report' if options.report else 'Record'}: {out}", markup=False)
    return not session.wrong


@dataclass
class Session:
    """A run under way."""

    record: Record
    device: CpuClock
    options: Options
    budget: Budget  # of the part
    console: Console
    out: Path
    wrong: dict[str, str] = field(default_factory=dict)

    def save(self, part: str | None = None) -> None:
        """Write the record, so that a run that is ended leaves what it had."""
        record = self.record
        if part is not None:
            settings = {
                key: value for key, value in asdict(self.options).items() if key not in ("parts", "dry_run", "report")
            }
            made = {key: record.environment[key] for key in ("date", "commit")}
            record.settings["parts"][part] = {**settings, **made}
        record.targets = [target.record() for target in targets(record)]
        record.write(self.out)


def _kept(out: Path, device: CpuClock, options: Options) -> Record:
    """The folder's record if it is of this device and kind of run, or an empty one."""
    found = read(out)
    described = device.describe()
    if found is None or found.device != described or found.dry_run != options.dry_run:
        return Record(device=described, settings={"dry_run": options.dry_run, "parts": {}})
    return found


def _packages(device: CpuClock) -> list[str]:
    return sorted({c.package for c in all_contenders(device.device) if c.package is not None})


def _skip(options: Options) -> Callable[[Contender, Workload], str | None]:
    def skip(contender: Contender, workload: Workload) -> str | None:
        if contender.compiles and not options.compiling:
            return "compiles for long, and was left out"
        if options.quick and contender.turns == 1 and workload.elements > _SLOW_ELEMENTS:
            return f"takes long: --quick leaves it out above {short(_SLOW_ELEMENTS)} elements"
        return None

    return skip


# ---- the parts -------------------------------------------------------------------------------------------------------


def _steps(session: Session) -> None:
    """Every contender on every workload, and the cpu backend's memory."""
    options, device, record = session.options, session.device, session.record
    left_out: list[tuple[str, str]] = []
    workloads: list[Workload] = []
    for workload, why in chosen(quick=options.quick, dry_run=options.dry_run, max_elements=options.max_elements):
        if why := why or _too_large(workload, device):
            left_out.append((workload.name, why))
        else:
            workloads.append(workload)
    if options.quick:
        workloads.sort(key=lambda workload: workload.elements)  # as many as the time allows
    pairs = [(workload, dtype) for dtype in DTYPES for workload in workloads]
    contenders = all_contenders(device.device)
    measured: list[Measurement] = []
    copies: list[float] = []
    record.workloads = {}
    with _progress(session.console) as progress:
        task = progress.add_task("", total=len(pairs) * len(contenders) * options.rounds)
        comparer = Comparer(
            device,
            contenders,
            rounds=options.rounds,
            turn_ms=options.turn_ms,
            skip=_skip(options),
            tick=lambda: progress.advance(task),
        )
        for number, (workload, dtype) in enumerate(pairs):
            name = f"{workload.name}, {dtype}"
            if measured and not session.budget.left():
                left_out.append((name, f"the time was up (--seconds {options.seconds:g})"))
                continue
            progress.update(task, description=name)
            comparison = comparer(workload, dtype, session.budget.share(len(pairs) - number))
            measured += comparison.measurements
            copies.append(comparison.copy_gbps)
            session.wrong.update({f"{name}, {contender}": why for contender, why in comparison.wrong.items()})
            record.workloads[workload.name] = _facts(workload)
            record.copy_gbps = {device.kind: median(copies)}
            record.replace_part(STEPS, measured, left_out)
            session.save(STEPS)
        if device.kind == "cpu" and not options.dry_run:
            progress.update(task, description="memory")
            measured += memory.measure(STEPS, flat(10_000_000))
    record.replace_part(STEPS, measured, left_out)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _facts(workload: Workload) -> dict[str, Any]:
    return {"title": workload.title, "tensors": len(workload.shapes), "elements": workload.elements}


def _too_large(workload: Workload, device: CpuClock) -> str:
    """Why not even weights, gradients and AdamW's moments fit, or an empty string."""
    free, needed = device.free_bytes(), 16 * workload.elements
    if free is None or needed <= free:
        return ""
    return f"AdamW alone needs {needed / 2**30:.0f} GiB of memory in float32, {free / 2**30:.0f} are free"


def _host(session: Session) -> None:
    """The host's share, without a device."""
    rounds, repeats = (1, 2) if session.options.dry_run else (min(session.options.rounds, 5), 1000)
    with session.console.status("Host cost"):
        session.record.replace_part(HOST, host.measure(rounds=rounds, repeats=repeats))


def _model(session: Session) -> None:
    """A whole finetuning step: of SmolLM2 on a processor, of a Llama-2-7B on a GPU."""
    options, device, record = session.options, session.device, session.record
    on_cpu = device.kind == "cpu"
    job = model.TOY if options.dry_run else model.job_for(device.device)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    steps = 2 if options.dry_run or (on_cpu and options.quick) else 3 if on_cpu else 10
    with session.console.status("Whole finetuning step"):
        found = model.measure(job, device, rounds=rounds, steps=steps, enough_time=session.budget.left)
    skipped = [("a whole finetuning step", found.skipped)] if found.skipped else []
    session.wrong.update(found.wrong)
    record.replace_part(MODEL, found.measurements, skipped)


_PARTS = {STEPS: _steps, HOST: _host, MODEL: _model}
