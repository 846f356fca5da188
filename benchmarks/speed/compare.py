"""Two records of the speed suite: what got slower beyond the noise, grew or began to fail."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from rich.console import Console

from benchmarks import UserError
from benchmarks.speed.record import KEY, Record
from benchmarks.speed.report import Columns, form, show, written
from benchmarks.speed.statistics import LEAST_ROUNDS, Noise, Shift, run_to_run, shift, slower

SLOWER, MORE_MEMORY, FAILS = "slower", "more memory", "fails now"
REGRESSIONS = (SLOWER, MORE_MEMORY, FAILS)
FASTER, LESS_MEMORY, RUNS = "faster", "less memory", "runs now"
SAME, BASELINE, PEER, FAILED, NOT_JUDGED = "same", "baseline", "peer", "failed in both", "not judged"
LEAST_BYTES = 0.5  # per element; less than half of the smallest value that a tensor can hold is no buffer
MEMORY = "peak B/element"
Key = tuple[str, ...]  # workload, dtype, contender, quantity


@dataclass(frozen=True)
class Change:
    """What became of one figure of a measurement."""

    key: Key
    figure: str  # the unit of a time, "x <baseline>" or :data:`MEMORY`
    verdict: str
    old: float | None = None
    new: float | None = None
    change: float | None = None  # new / old - 1
    interval: tuple[float, float] | None = None  # 95%, of `change`
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """All changes, the worst first, and what the judgement rests on."""

    changes: list[Change]
    threshold: float
    only_old: list[Key]
    only_new: list[Key]
    noise: dict[str, float | None]  # standard deviation of a change from run to run that is allowed for, by series
    peers: int  # of them, measurements with rounds in both records

    @property
    def regressions(self) -> list[Change]:
        """What makes the command fail."""
        return [change for change in self.changes if change.verdict in REGRESSIONS]

    def count(self) -> Counter[str]:
        """How often each verdict was given."""
        return Counter(change.verdict for change in self.changes)


def refuse_unlike(old: Record, new: Record) -> None:
    """Refuses two records whose figures differ for other reasons than the code.

    Drivers, systems and packages may differ: they are a reason to compare.

    Raises:
        UserError: Another device, processor or number of threads, or no measurement in common.
    """

    def machine(record: Record) -> dict[str, Any]:
        device, environment = record.device, record.environment
        of_device = {"device": device.get("name"), "kind of device": device.get("kind")}
        of_system = {key: environment.get(key) for key in ("processor", "cores")}
        return {**of_device, **of_system, "threads": device.get("threads"), "dry run": record.dry_run}

    before, after = machine(old), machine(new)
    for what, was in before.items():
        if was != (now := after[what]):
            raise UserError(f"other machine or settings: {what} is {was!r} in {old.path} and {now!r} in {new.path}")
    for record in (old, new):
        twice = [key for key, count in Counter(_keys(record.frame())).items() if count > 1]
        if twice:
            raise UserError(f"{record.path} has two measurements of {', '.join(twice[0])}")
    if not set(_keys(old.frame())) & set(_keys(new.frame())):
        raise UserError(f"{old.path} and {new.path} have no measurement in common")


def _keys(rows: pd.DataFrame) -> list[Key]:
    return list(rows[KEY].itertuples(index=False, name=None))


def compare_records(old: Record, new: Record, threshold: float) -> Comparison:
    """Judges every measurement that the records have in common.

    Args:
        old: What to compare with.
        new: Of the changed code.
        threshold: Up to this a slowdown or growth is no regression; a share, 0.05 for 5%.

    Raises:
        UserError: If no measurement of ours has enough rounds in both records to be judged.
    """
    before, after = old.frame(), new.frame()
    common = after.merge(before, on=KEY, suffixes=("", "_old"))
    timed = common[common.error.isna() & common.error_old.isna()]
    errors = [_error(row) for row in common.drop(timed.index).itertuples()]
    times, noise, peers = _times(list(timed.itertuples()), threshold)
    memory = _memory(timed, threshold)
    ours = set(_keys(common[common.ours]))
    if all(change.verdict == NOT_JUDGED or change.key not in ours for change in (*errors, *memory, *times)):
        raise UserError(f"no measurement of ours has {LEAST_ROUNDS} rounds in both records; measure without --quick")
    return Comparison(
        sorted([*errors, *times, *memory], key=_badness),
        threshold,
        [key for key in _keys(before) if key not in set(_keys(after))],
        [key for key in _keys(after) if key not in set(_keys(before))],
        {series: None if told is None else math.sqrt(told.variance) for series, told in noise.items()},
        peers,
    )


def _badness(change: Change) -> tuple[int, float]:
    if change.verdict == FAILS:
        return 0, 0.0
    return (1 if change.verdict in REGRESSIONS else 2), -(change.change or 0.0)


def _key(row: Any) -> Key:
    return tuple(getattr(row, name) for name in KEY)


def _error(row: Any) -> Change:
    """Of a measurement that failed in one record or in both."""
    if pd.isna(row.error):
        return Change(_key(row), row.unit, RUNS, reason=f"it was: {row.error_old}")
    verdict = FAILED if not pd.isna(row.error_old) else FAILS if row.ours else PEER
    return Change(_key(row), row.unit, verdict, reason=row.error)


def _memory(timed: pd.DataFrame, threshold: float) -> list[Change]:
    """Peak memory, one figure a record. What a peer's changed by, whose code is the same, is noise in its workload.

    An allocator's count repeats exactly. The growth of a resident set does not: it depends on what was free before.
    """
    old, new = timed.peak_bytes_per_element_old, timed.peak_bytes_per_element
    rows = timed.assign(old=old, new=new, growth=new - old).dropna(subset="growth")
    noise = rows[~rows.ours].growth.abs().groupby([rows.workload, rows.dtype]).max()
    changes = []
    for row in rows[rows.ours].itertuples():
        least = max(LEAST_BYTES, noise.get((row.workload, row.dtype), 0.0), threshold * row.old)
        verdict = SAME if abs(row.growth) <= least else MORE_MEMORY if row.growth > 0 else LESS_MEMORY
        relative = row.growth / row.old if row.old else None
        changes.append(Change(_key(row), MEMORY, verdict, row.old, row.new, relative))
    return changes


def _is_baseline(row: Any) -> bool:
    return bool(row.contender == row.baseline)


def _series(row: Any) -> str:
    """What is compared of a measurement: ratios, where both records have them to the same baseline."""
    by_ratio = len(row.ratios) and len(row.ratios_old) and row.baseline == row.baseline_old
    return "ratios" if by_ratio and not _is_baseline(row) else "rounds"


def _shift(row: Any, series: str) -> Shift | None:
    """Of "ratios" or "rounds"; None if one of them has too few, or figures that are no times."""
    old, new = getattr(row, f"{series}_old"), getattr(row, series)
    if min(len(old), len(new)) < LEAST_ROUNDS or not all(0 < value < math.inf for value in (*old, *new)):
        return None
    return shift(old, new)


def _times(rows: Sequence[Any], threshold: float) -> tuple[list[Change], dict[str, Noise | None], int]:
    """The changes of all times, the noise from run to run by series, and how many measurements of peers tell it."""
    peers = [row for row in rows if not row.ours]
    ratios = [found for row in peers if _series(row) == "ratios" and (found := _shift(row, "ratios"))]
    rounds = [found for row in peers if (found := _shift(row, "rounds"))]
    noise = {"ratios": run_to_run(ratios), "rounds": run_to_run(rounds)}
    changes: list[Change] = []
    judged: list[tuple[int, Shift]] = []  # positions in `changes`
    for row in rows:
        series = _series(row)
        figure, value = (f"x {row.baseline}", "ratio") if series == "ratios" else (row.unit, "p50")
        change = Change(_key(row), figure, NOT_JUDGED, getattr(row, f"{value}_old"), getattr(row, value))
        if (found := _shift(row, series)) is None:
            counts = f"{len(getattr(row, f'{series}_old'))} and {len(getattr(row, series))}"
            changes.append(replace(change, reason=f"{counts} rounds with a time; {LEAST_ROUNDS} are needed"))
            continue
        found = found.wider(noise[series])
        if row.ours:
            judged.append((len(changes), found))
        verdict = SAME if row.ours else BASELINE if _is_baseline(row) else PEER
        changes.append(replace(change, verdict=verdict, change=math.expm1(found.estimate), interval=found.interval()))
    for verdict, shifts in ((SLOWER, [s for _, s in judged]), (FASTER, [s.reversed() for _, s in judged])):
        for (position, _), sure in zip(judged, slower(shifts, threshold), strict=True):
            if sure:
                changes[position] = replace(changes[position], verdict=verdict)
    return changes, noise, len(ratios) or len(rounds)


# ---- what the command prints -----------------------------------------------------------------------------------------


def print_comparison(console: Console, comparison: Comparison, old: Record, new: Record, *, everything: bool) -> None:
    """The regressions (or everything), what only one record has, and the counts."""
    show(console, "All measurements" if everything else "Regressions", _table(comparison, everything), left=5)
    lines = []
    for verdict in (RUNS, NOT_JUDGED) if not everything else ():
        found = [change for change in comparison.changes if change.verdict == verdict]
        lines += [f"{verdict}: {', '.join(change.key)}: {change.reason}" for change in found]
    for record, keys in ((old, comparison.only_old), (new, comparison.only_new)):
        lines += [f"only in {record.path}: {', '.join(key)}" for key in keys]
    versions = [record.environment.get("versions", {}) for record in (old, new)]
    for package in sorted(versions[0] | versions[1]):
        was, now = (of.get(package) or "none" for of in versions)
        lines += [f"note: {package} {was} -> {now}"] if was != now else []
    for line in (*lines, *_summary(comparison, old, new)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(comparison: Comparison, everything: bool) -> pd.DataFrame:
    def percent(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else f"{interval[0]:+.1%} {interval[1]:+.1%}"

    shown = comparison.changes if everything else comparison.regressions
    rows = pd.DataFrame([dict(zip(KEY, c.key, strict=True)) | vars(c) for c in shown])
    columns: Columns = {name: (name, str) for name in (*KEY, "figure")}
    columns |= {"old": ("old", form(".4g")), "new": ("new", form(".4g")), "change": ("change", form("+.1%"))}
    if not shown:
        return rows
    rows["verdict"] = [f"{c.verdict}: {c.reason}" if c.reason else c.verdict for c in shown]
    return written(rows, columns | {"95% interval": ("interval", percent), "verdict": ("verdict", str)})


def _summary(comparison: Comparison, old: Record, new: Record) -> list[str]:
    counts, threshold = comparison.count(), comparison.threshold
    noise = comparison.noise["rounds"] if comparison.noise["ratios"] is None else comparison.noise["ratios"]
    allowed = (
        "too few measurements of peers to tell the noise from run to run, which is not allowed for"
        if noise is None
        else f"noise from run to run, told by {comparison.peers} measurements of peers: {noise:.1%}"
    )
    beyond = [c for c in comparison.changes if c.verdict == PEER and abs(c.change or 0.0) > threshold]
    slow = sum((c.change or 0.0) > 0 for c in beyond)
    commits = [record.environment.get("commit") or "unknown commit" for record in (old, new)]
    return [
        f"{' -> '.join(commits)}, threshold {threshold:.0%}; {allowed}.",
        f"Peers that differ by more than the threshold: {slow} slower, {len(beyond) - slow} faster, of {counts[PEER]}.",
        f"Ours: {len(comparison.regressions)} regressions; {counts[FASTER]} faster, {counts[LESS_MEMORY]} with less "
        f"memory, {counts[RUNS]} that run now, {counts[SAME]} the same within threshold and noise; "
        f"{counts[NOT_JUDGED]} not judged, {counts[FAILED]} failed in both, {counts[BASELINE]} baselines.",
    ]
