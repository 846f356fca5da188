"""What changed between two records: one verdict for each measurement, and what of it is a regression."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import UserError
from benchmarks.compare.records import Key, Record
from benchmarks.compare.statistics import LEAST_ROUNDS, Noise, Shift, run_to_run, shift, slower

SLOWER, MORE_MEMORY, FAILS = "slower", "more memory", "fails now"
REGRESSIONS = (SLOWER, MORE_MEMORY, FAILS)
FASTER, LESS_MEMORY, RUNS = "faster", "less memory", "runs now"
SAME, BASELINE, PEER, FAILED, NOT_JUDGED = "same", "baseline", "peer", "failed in both", "not judged"
LEAST_BYTES = 0.5  # per element; less than half of the smallest value that a tensor can hold is no buffer
MEMORY = "peak B/element"


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


@dataclass(frozen=True)
class _Pair:
    """A measurement that both records have, with times in both."""

    key: Key
    old: dict[str, Any]
    new: dict[str, Any]

    @property
    def ours(self) -> bool:
        return bool(self.new["ours"])

    @property
    def is_baseline(self) -> bool:
        return bool(self.new["contender"] == self.new["baseline"])

    @property
    def by_ratio(self) -> bool:
        """Whether both have ratios, to the same baseline."""
        return bool(self.old["ratios"] and self.new["ratios"] and self.old["baseline"] == self.new["baseline"])

    @property
    def peaks(self) -> tuple[float, float] | None:
        """Peak memory per element of both, where both have it."""
        old, new = (m.get("peak_bytes_per_element") for m in (self.old, self.new))
        return None if old is None or new is None else (old, new)

    def shift(self, series: str) -> Shift | None:
        """Of "ratios" or "rounds"; None if one of them has too few, or figures that are no times."""
        old, new = self.old[series] or [], self.new[series] or []
        if min(len(old), len(new)) < LEAST_ROUNDS or not all(_is_time(value) for value in (*old, *new)):
            return None
        return shift(old, new)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def compare_records(old: Record, new: Record, threshold: float) -> Comparison:
    """Judges every measurement that the records have in common.

    Args:
        old: What to compare with.
        new: Of the changed code.
        threshold: Up to this a slowdown or growth is no regression; a share, 0.05 for 5%.

    Raises:
        UserError: If no measurement of ours has enough rounds in both records to be judged.
    """
    common = [_Pair(key, old.measurements[key], m) for key, m in new.measurements.items() if key in old.measurements]
    errors = [change for pair in common if (change := _error(pair)) is not None]
    timed = [pair for pair in common if pair.old["error"] is None and pair.new["error"] is None]
    noise, peers = _noise(timed)
    times = _times(timed, noise, threshold)
    spread = _memory_noise(timed)
    memory = [
        _memory(pair.key, *pair.peaks, max(LEAST_BYTES, spread[pair.key[:2]]), threshold)
        for pair in timed
        if pair.ours and pair.peaks
    ]
    ours = {pair.key for pair in common if pair.ours}
    if all(change.verdict == NOT_JUDGED or change.key not in ours for change in (*errors, *memory, *times)):
        raise UserError(f"no measurement of ours has {LEAST_ROUNDS} rounds in both records; measure without --quick")
    return Comparison(
        sorted([*errors, *times, *memory], key=_badness),
        threshold,
        [key for key in old.measurements if key not in new.measurements],
        [key for key in new.measurements if key not in old.measurements],
        {series: None if told is None else math.sqrt(told.variance) for series, told in noise.items()},
        peers,
    )


def _badness(change: Change) -> tuple[int, float]:
    if change.verdict == FAILS:
        return 0, 0.0
    return (1 if change.verdict in REGRESSIONS else 2), -(change.change or 0.0)


def _error(pair: _Pair) -> Change | None:
    before, after = pair.old["error"], pair.new["error"]
    if before is None and after is None:
        return None
    if after is None:
        return Change(pair.key, pair.new["unit"], RUNS, reason=f"it was: {before}")
    verdict = FAILED if before is not None else FAILS if pair.ours else PEER
    return Change(pair.key, pair.new["unit"], verdict, reason=str(after))


def _memory_noise(pairs: Sequence[_Pair]) -> dict[tuple[str, str], float]:
    """By workload and dtype: what the peak memory of a peer, whose code is the same, changed by at most.

    An allocator's count repeats exactly. The growth of a resident set does not: it depends on what was free before.
    """
    noise: dict[tuple[str, str], float] = defaultdict(float)
    for pair in pairs:
        if not pair.ours and pair.peaks:
            old, new = pair.peaks
            noise[pair.key[:2]] = max(noise[pair.key[:2]], abs(new - old))
    return noise


def _memory(key: Key, old: float, new: float, least: float, threshold: float) -> Change:
    """The peak memory, one figure a record; up to `least` bytes an element it is the same."""
    growth, verdict = new - old, SAME
    if abs(growth) > max(threshold * old, least):
        verdict = MORE_MEMORY if growth > 0 else LESS_MEMORY
    return Change(key, MEMORY, verdict, old, new, growth / old if old else None)


def _noise(pairs: Sequence[_Pair]) -> tuple[dict[str, Noise | None], int]:
    """Noise of a shift from run to run by what is compared, and how many measurements of peers tell it."""
    peers = [pair for pair in pairs if not pair.ours]
    ratios = [found for pair in peers if pair.by_ratio and not pair.is_baseline if (found := pair.shift("ratios"))]
    rounds = [found for pair in peers if (found := pair.shift("rounds"))]
    return {"ratios": run_to_run(ratios), "rounds": run_to_run(rounds)}, len(ratios) or len(rounds)


def _times(pairs: Sequence[_Pair], noise: dict[str, Noise | None], threshold: float) -> list[Change]:
    changes: list[Change] = []
    judged: list[tuple[int, Shift]] = []  # positions in `changes`
    for pair in pairs:
        series = "ratios" if pair.by_ratio and not pair.is_baseline else "rounds"
        found = pair.shift(series)
        figure, value = (f"x {pair.new['baseline']}", "ratio") if series == "ratios" else (pair.new["unit"], "p50")
        change = Change(pair.key, figure, NOT_JUDGED, pair.old[value], pair.new[value])
        if found is None:
            counts = " and ".join(str(len(m[series] or [])) for m in (pair.old, pair.new))
            changes.append(replace(change, reason=f"{counts} rounds with a time; {LEAST_ROUNDS} are needed"))
            continue
        found = found.wider(noise[series])
        if pair.ours:
            judged.append((len(changes), found))
        verdict = SAME if pair.ours else BASELINE if pair.is_baseline else PEER
        relative = math.expm1(found.estimate)
        changes.append(replace(change, verdict=verdict, change=relative, interval=found.interval()))
    for verdict, shifts in ((SLOWER, [s for _, s in judged]), (FASTER, [s.reversed() for _, s in judged])):
        for (position, _), sure in zip(judged, slower(shifts, threshold), strict=True):
            if sure:
                changes[position] = replace(changes[position], verdict=verdict)
    return changes
