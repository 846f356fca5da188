"""The Markdown report of a record, with its pictures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed import plots, tables
from benchmarks.speed.contenders import BASELINE, STEP
from benchmarks.speed.record import FILE, Record

REPORT = "report.md"
_METHOD = f"""\
Every contender takes its turns on fresh tensors, round after round. Before it is timed its result is checked: ours must
have the bits of the reference backend; the others must change the weights, leave them finite, and, where they compute
AdamW's update, agree with torch's. *x AdamW* is the median over the rounds of its median over that of {BASELINE} in the
same round; for a part that AdamW does not have, over its whole step. *B/el* is what must move per element (last table),
*GB/s* those bytes over the median time, *of copy* its share of a large copy's bandwidth (bytes read and written). It
can be exceeded: small tensors stay in caches, and a processor may read what a copy overwrites, which is not counted and
which a step in place does not need.
"""


def write(out: Path, record: Record) -> None:
    """`report.md`, from the record alone."""
    device = record.device
    sections = [f"# One optimizer step on {device.get('name')}\n", _facts(record)]
    if record.dry_run:
        sections.append("**A dry run: the figures mean nothing.**\n")
    sections += [_picture(out, plots.SPEED, f"time of one optimizer step against {BASELINE}"), _METHOD]
    sections += _section("Targets", tables.targets_grid(record.targets))
    sections.append("## Bandwidth and size\n")
    sections.append(_picture(out, plots.ROOFLINE, "bandwidth of one step, under that of a copy"))
    sections.append(_picture(out, plots.ELEMENTS, "time of one step against the number of elements"))
    for workload, dtype in record.pairs():
        if workload in record.workloads and record.of(workload, dtype, STEP):
            sections += _section(
                tables.workload_title(record, workload, dtype), tables.step_grid(record, workload, dtype)
            )
            sections.append(tables.parts_grid(record, workload, dtype).markdown())
    for grid in (
        tables.memory_grid(record),
        tables.dispatch_grid(record),
        tables.model_grid(record),
        tables.host_grid(record),
        tables.missing_grid(record),
        tables.traffic_grid(),
    ):
        sections += _section(grid.title, grid)
    (out / REPORT).write_text("\n".join(filter(None, sections)), encoding="utf-8")


def _section(title: str, grid: tables.Grid) -> list[str]:
    return [f"## {title}\n", grid.markdown()] if grid.rows else []


def _picture(out: Path, name: str, text: str) -> str:
    return f"![{text}]({name})\n" if (out / name).exists() else ""


def _facts(record: Record) -> str:
    environment, device = record.environment, record.device
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    copied = ", ".join(f"{gbps:.1f} GB/s ({where})" for where, gbps in record.copy_gbps.items())
    details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("kind", "name"))
    parts = ", ".join(f"{name} ({part['date']}, {part['commit']})" for name, part in record.settings["parts"].items())
    lines = [
        f"- device: {device['name']} ({details}); a large copy moves {copied or 'not measured'}",
        f"- versions: Python {environment['python']}, {versions}",
        f"- measured: {parts}",
        f"- record: [{FILE}]({FILE})",
    ]
    return "\n".join(lines) + "\n"
