"""Runs the parts of the speed benchmark and holds what the folder has of them against the targets."""

from __future__ import annotations

import functools
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.speed import host, model, steps
from benchmarks.speed.clock import CpuClock, clock
from benchmarks.speed.contender import Contender
from benchmarks.speed.lineup import lineup
from benchmarks.speed.measure import Budget, progress
from benchmarks.speed.record import FILE, Measurement, Record, read
from benchmarks.speed.targets import targets
from benchmarks.speed.workloads import DTYPES, Workload, chosen, flat, short

PACKAGES = ("torch", "triton", "ivon-kernels", "transformers", "peft")
_SLOW_ELEMENTS = 1_000_000  # that --quick gives to a contender of which one turn is enough


@dataclass(frozen=True)
class Options:
    """What to measure; see the command's help."""

    parts: tuple[str, ...] = (steps.PART, host.PART, model.PART)
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
    if unknown := set(options.parts) - set(_PARTS):
        raise UserError(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(_PARTS)}")
    torch.set_num_threads(options.threads)
    device = clock(options.device or ("cuda" if torch.cuda.is_available() else "cpu"), options.dry_run)
    console = Console(width=None if Console().is_terminal else 160)
    out.mkdir(parents=True, exist_ok=True)
    record = _kept(out, device, options)
    peers = {c.package for c in lineup(device.device) if c.package is not None}
    record.environment = environment((*PACKAGES, *sorted(peers)))
    session = Session(record, device, options, Budget(options.seconds), console, out)
    for part in options.parts:
        session.budget = Budget(options.seconds)
        _PARTS[part](session)
        session.save(part)
    session.save()
    from benchmarks.speed import plots, report  # matplotlib takes a second

    if options.report:
        plots.draw(out, record)
        report.write(out, record)
    report.print_tables(console, record, options.parts)
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
            settings = {k: v for k, v in asdict(self.options).items() if k not in ("parts", "dry_run", "report")}
            made = {key: record.environment[key] for key in ("date", "commit")}
            record.settings["parts"][part] = {**settings, **made}
        record.targets = targets(record)
        record.write(self.out)


def _kept(out: Path, device: CpuClock, options: Options) -> Record:
    """The folder's record if it is of this device and kind of run, or an empty one."""
    empty = Record(device=device.describe(), settings={"dry_run": options.dry_run, "parts": {}})
    try:
        found = read(out / FILE)
    except UserError:  # none, or one of another version
        return empty
    return found if (found.device, found.dry_run) == (empty.device, empty.dry_run) else empty


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

    def skip(contender: Contender, workload: Workload) -> str | None:
        if contender.compiles and not options.compiling:
            return "compiles for long, and was left out"
        if options.quick and contender.turns == 1 and workload.elements > _SLOW_ELEMENTS:
            return f"takes long: --quick leaves it out above {short(_SLOW_ELEMENTS)} elements"
        return None

    pairs = [(workload, dtype) for dtype in DTYPES for workload in workloads]
    contenders = lineup(device.device)
    measured: list[Measurement] = []
    copies: list[float] = []
    record.workloads = {}
    with progress(session.console) as bar:
        task = bar.add_task("", total=len(pairs) * len(contenders) * options.rounds)
        tick = functools.partial(bar.advance, task)
        comparer = steps.Comparer(device, contenders, options.rounds, options.turn_ms, skip, tick)
        for number, (workload, dtype) in enumerate(pairs):
            name = f"{workload.name}, {dtype}"
            if measured and not session.budget.left():
                left_out.append((name, f"the time was up (--seconds {options.seconds:g})"))
                continue
            bar.update(task, description=name)
            comparison = comparer(workload, dtype, session.budget.share(len(pairs) - number))
            measured += comparison.measurements
            copies.append(comparison.copy_gbps)
            session.wrong |= {f"{name}, {contender}": why for contender, why in comparison.wrong.items()}
            about = {"title": workload.title, "tensors": len(workload.shapes), "elements": workload.elements}
            record.workloads[workload.name] = about
            record.copy_gbps = {device.kind: statistics.median(copies)}
            record.replace_part(steps.PART, measured, left_out)
            session.save(steps.PART)
        if device.kind == "cpu" and not options.dry_run:
            bar.update(task, description="memory")
            measured += steps.state_memory(flat(10_000_000))
    record.replace_part(steps.PART, measured, left_out)


def _too_large(workload: Workload, device: CpuClock) -> str:
    """Why not even weights, gradients and AdamW's moments fit, or an empty string."""
    free, needed = device.free_bytes(), 16 * workload.elements
    if free is None or needed <= free:
        return ""
    return f"AdamW alone needs {needed / 2**30:.0f} GiB of memory in float32, {free / 2**30:.0f} are free"


def _host(session: Session) -> None:
    """The host's share, without a device."""
    dry_run = session.options.dry_run
    rounds, repeats, optimization = (1, 2, "-O0") if dry_run else (min(session.options.rounds, 5), 1000, "-O2")
    with session.console.status("Host cost"):
        found = host.measure(rounds=rounds, repeats=repeats, optimization=optimization)
    session.record.replace_part(host.PART, found)


def _model(session: Session) -> None:
    """A whole finetuning step: of SmolLM2 on a processor, of a Llama-2-7B on a GPU."""
    options, device = session.options, session.device
    on_cpu = device.kind == "cpu"
    job = model.TOY if options.dry_run else model.job_for(device.device)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    count = 2 if options.dry_run or (on_cpu and options.quick) else 3 if on_cpu else 10
    with session.console.status("Whole finetuning step"):
        found = model.measure(job, device, rounds=rounds, steps=count, enough_time=session.budget.left)
    skipped = [("a whole finetuning step", found.skipped)] if found.skipped else []
    session.wrong |= found.wrong
    session.record.replace_part(model.PART, found.measurements, skipped)


_PARTS = {steps.PART: _steps, host.PART: _host, model.PART: _model}
