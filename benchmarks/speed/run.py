"""Runs the parts of the speed benchmark and holds what the folder has of them against the targets."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.speed import host, model, plots, report, steps
from benchmarks.speed.clock import CpuClock, clock
from benchmarks.speed.contender import Contender
from benchmarks.speed.measure import Budget, progress
from benchmarks.speed.peers import lineup
from benchmarks.speed.record import FILE, Measurement, Record, read
from benchmarks.speed.targets import targets
from benchmarks.speed.workloads import DRY_WORKLOADS, DTYPES, QUICK, WORKLOADS, Workload, flat, short

PACKAGES = ("torch", "triton", "ivon-kernels", "transformers", "peft")
_SLOW_ELEMENTS = 1_000_000  # that --quick gives to a contender of which one turn is enough


@dataclass(frozen=True)
class Options:
    """How to measure; see the command's help."""

    device: str
    threads: int
    rounds: int
    turn_ms: float
    seconds: float
    max_elements: int
    quick: bool
    compiling: bool


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

    def save(self, part: str) -> None:
        """Write the record, so that a run that is ended leaves what it had."""
        made = {key: self.record.environment[key] for key in ("date", "commit")}
        self.record.settings["parts"][part] = {**asdict(self.options), **made}
        self.write()

    def write(self) -> None:
        """The record with its targets."""
        self.record.targets = targets(self.record)
        self.record.write(self.out)


def run(options: Options, parts: Sequence[str], out: Path, *, dry_run: bool, with_report: bool) -> bool:
    """Measures the parts, prints their tables, and writes `speed.json`, `report.md` and its pictures to `out`.

    Measurements of the same device that `out` holds of other parts are kept, and count for the targets. The record is
    written after every workload.

    Returns:
        Whether every contender of ours that is available was right and ran.

    Raises:
        UserError: For an unknown part or device.
    """
    if unknown := set(parts) - set(_PARTS):
        raise UserError(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(_PARTS)}")
    torch.set_num_threads(options.threads)
    device = clock(options.device or ("cuda" if torch.cuda.is_available() else "cpu"), dry_run)
    console = Console(width=None if Console().is_terminal else 160)
    out.mkdir(parents=True, exist_ok=True)
    record = _kept(out, device, dry_run)
    peers = {c.package for c in lineup(device.device) if c.package is not None}
    record.environment = environment((*PACKAGES, *sorted(peers)))
    session = Session(record, device, options, Budget(options.seconds), console, out)
    for part in parts:
        session.budget = Budget(options.seconds)
        _PARTS[part](session)
        session.save(part)
    session.write()
    if with_report:
        plots.draw(out, record)
        report.write(out, record)
    report.print_tables(console, record, parts)
    for name, why in session.wrong.items():
        console.print(f"WRONG: {name}: {why}", markup=False, highlight=False)
    console.print(f"{'Record, pictures and report' if with_report else 'Record'}: {out}", markup=False)
    return not session.wrong


def _kept(out: Path, device: CpuClock, dry_run: bool) -> Record:
    """The folder's record if it is of this device and kind of run, or an empty one."""
    empty = Record(device=device.describe(), settings={"dry_run": dry_run, "parts": {}})
    try:
        found = read(out / FILE)
    except UserError:  # none, or one of another version
        return empty
    return found if (found.device, found.dry_run) == (empty.device, empty.dry_run) else empty


# ---- the parts -------------------------------------------------------------------------------------------------------


def left_out(workload: Workload, options: Options, device: CpuClock) -> str:
    """Why a workload is not measured, or an empty string."""
    if options.quick and workload in WORKLOADS and workload.name not in QUICK:
        return "--quick leaves it out"
    if workload.elements > options.max_elements:
        return f"more elements than --max-elements {options.max_elements}"
    free, needed = device.free_bytes(), 16 * workload.elements  # weights, gradients and AdamW's moments
    if free is None or needed <= free:
        return ""
    return f"AdamW alone needs {needed / 2**30:.0f} GiB of memory in float32, {free / 2**30:.0f} are free"


def _steps(session: Session) -> None:
    """Every contender on every workload, and the cpu backend's memory."""
    options, device, record = session.options, session.device, session.record
    reasons = {w: left_out(w, options, device) for w in (DRY_WORKLOADS if record.dry_run else WORKLOADS)}
    missing = [(workload.name, why) for workload, why in reasons.items() if why]
    workloads = [workload for workload, why in reasons.items() if not why]
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
                missing.append((name, f"the time was up (--seconds {options.seconds:g})"))
                continue
            bar.update(task, description=name)
            found = comparer(workload, dtype, session.budget.share(len(pairs) - number))
            measured += found.measurements
            copies.append(found.copy_gbps or 0.0)
            session.wrong |= {f"{name}, {contender}": why for contender, why in found.wrong.items()}
            about = {"title": workload.title, "tensors": len(workload.shapes), "elements": workload.elements}
            record.workloads[workload.name] = about
            record.copy_gbps = {device.kind: statistics.median(copies)}
            record.replace_part(steps.PART, measured, missing)
            session.save(steps.PART)
        if device.kind == "cpu" and not record.dry_run:
            bar.update(task, description="memory")
            measured += steps.state_memory(flat(10_000_000))
    record.replace_part(steps.PART, measured, missing)


def _host(session: Session) -> None:
    """The host's share, without a device."""
    rounds, repeats, optimization = min(session.options.rounds, 5), 1000, "-O2"
    if session.record.dry_run:
        rounds, repeats, optimization = 1, 2, "-O0"
    with session.console.status("Host cost"):
        found = host.measure(rounds=rounds, repeats=repeats, optimization=optimization)
    session.record.replace_part(host.PART, found)


def _model(session: Session) -> None:
    """A whole finetuning step: of SmolLM2 on a processor, of a Llama-2-7B on a GPU."""
    options, device, dry_run = session.options, session.device, session.record.dry_run
    on_cpu = device.kind == "cpu"
    job = model.TOY if dry_run else model.job_for(device.device)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    count = 2 if dry_run or (on_cpu and options.quick) else 3 if on_cpu else 10
    with session.console.status("Whole finetuning step"):
        found = model.measure(job, device, rounds=rounds, steps=count, enough_time=session.budget.left)
    skipped = [("a whole finetuning step", found.skipped)] if found.skipped else []
    session.wrong |= found.wrong
    session.record.replace_part(model.PART, found.measurements, skipped)


_PARTS = {steps.PART: _steps, host.PART: _host, model.PART: _model}
