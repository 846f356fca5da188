"""Runs the parts of the speed benchmark and holds what the folder has of them against the targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.speed import host, model, report, steps
from benchmarks.speed.clock import CpuClock, clock
from benchmarks.speed.measure import Budget, Options, Session
from benchmarks.speed.peers import lineup
from benchmarks.speed.record import FILE, Record, read
from benchmarks.speed.targets import targets

PACKAGES = ("torch", "triton", "ivon-kernels", "transformers", "peft")
_PARTS = {part.PART: part.run for part in (steps, host, model)}


def run(options: Options, parts: Sequence[str], out: Path, *, dry_run: bool, with_report: bool) -> bool:
    """Measures the parts, prints their tables, and writes `speed.json`, `report.md` and its pictures to `out`.

    Measurements of the same device that `out` holds of other parts are kept, and count for the targets. Returns whether
    every contender of ours that is available was right and ran.

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

    def write() -> None:
        record.targets = targets(record)
        record.write(out)

    def save(part: str) -> None:
        made = {key: record.environment[key] for key in ("date", "commit")}
        record.settings["parts"][part] = {**options._asdict(), **made}
        write()

    session = Session(record, device, options, Budget(options.seconds), console, save)
    for part in parts:
        session.budget = Budget(options.seconds)
        _PARTS[part](session)
        save(part)
    write()
    if with_report:
        report.draw(out, record)
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
