"""Two records of the speed suite: what got slower beyond the noise, grew or began to fail.

A measurement has about ten rounds: in each, its median time over the baseline's of the same round, so that a drift of
the machine meets both. What is compared are the logarithms of these ratios (of times, where a record has no ratio).

- **Shift.** Difference of the 20% trimmed means, by Welch's t test on trimmed samples (Yuen): a fifth of the rounds on
  either side may be spoiled by other users of the machine.
- **Run to run.** Two runs of the same code differ by more than their rounds show. The peers tell by how much: what the
  spread of their shifts has beyond their standard errors is added to the variance of every shift (Satterthwaite).
- **Verdict.** Slower is what is slower by more than the threshold, and proven to be slower at all: the p-values of all
  of our measurements go through Benjamini and Hochberg's procedure at :data:`FALSE_ALARMS`. Where no code changed, that
  is the largest probability of any alarm in a whole comparison. `tests/benchmarks/test_compare.py` simulates it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console
from scipy import special, stats

from benchmarks import UserError
from benchmarks.speed.record import KEY, Record
from benchmarks.speed.report import Columns, form, show, written

FALSE_ALARMS = 0.01
LEAST_ROUNDS = 3  # fewer have no spread worth the name
LEAST_PEERS = 8
_TRIM = 0.2
_NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
_MAD_EFFICIENCY = 0.37  # of the median absolute deviation, as a share of the observations

SLOWER, MORE_MEMORY, FAILS = "slower", "more memory", "fails now"
REGRESSIONS = (SLOWER, MORE_MEMORY, FAILS)
FASTER, LESS_MEMORY, RUNS = "faster", "less memory", "runs now"
SAME, BASELINE, PEER, FAILED, NOT_JUDGED = "same", "baseline", "peer", "failed in both", "not judged"
LEAST_BYTES = 0.5  # per element; less than half of the smallest value that a tensor can hold is no buffer
MEMORY = "peak B/element"

# ---- the statistics --------------------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """Variance of a shift between two runs of the same code, beyond what the rounds show."""

    variance: float
    freedom: float


def shifts(old: pd.Series, new: pd.Series) -> pd.DataFrame:
    """Differences of logarithms, new less old, of the rows that have :data:`LEAST_ROUNDS` positive figures in both.

    `error` is the standard error of the `estimate`, from the rounds alone, `freedom` are its degrees.
    """
    enough = [
        min(len(a), len(b)) >= LEAST_ROUNDS and all(0 < value < math.inf for value in (*a, *b))
        for a, b in zip(old, new, strict=True)
    ]
    logs = pd.DataFrame({"old": old[enough].map(np.log), "new": new[enough].map(np.log)})
    found = [pd.DataFrame({"estimate": [], "error": [], "freedom": []}, dtype=float)]
    for _, of in logs.groupby([logs.old.map(len), logs.new.map(len)]):
        pair = [np.stack(of[side].to_list()) for side in ("new", "old")]
        means = [stats.trim_mean(side, _TRIM, axis=1) for side in pair]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # about rows whose figures are all the same
            test = stats.ttest_ind(*pair, axis=1, equal_var=False, trim=_TRIM)
        width = test.confidence_interval(0.95).high - (means[0] - means[1])
        known = width > 0  # else all figures are the same
        error = np.where(known, width / special.stdtrit(test.df, 0.975), 0.0)
        columns = {"estimate": means[0] - means[1], "error": error, "freedom": np.where(known, test.df, 1.0)}
        found.append(pd.DataFrame(columns, of.index))
    return pd.concat(found)


def run_to_run(peers: pd.DataFrame) -> Noise | None:
    """What the shifts of unchanged code tell; None with fewer than :data:`LEAST_PEERS` of them."""
    if len(peers) < LEAST_PEERS:
        return None
    excess = (_NORMAL_MAD * peers.estimate.abs().median()) ** 2 - (peers.error**2).median()
    return Noise(max(0.0, float(excess)), _MAD_EFFICIENCY * len(peers))


def wider(shifts: pd.DataFrame, noise: Noise | None) -> pd.DataFrame:
    """With the noise from run to run added."""
    if noise is None or noise.variance == 0:
        return shifts
    total = shifts.error**2 + noise.variance
    freedom = total**2 / (shifts.error**4 / shifts.freedom + noise.variance**2 / noise.freedom)
    return shifts.assign(error=np.sqrt(total), freedom=freedom)


def intervals(shifts: pd.DataFrame) -> pd.DataFrame:
    """95% intervals of new / old - 1."""
    width = shifts.error * special.stdtrit(shifts.freedom, 0.975)
    return pd.DataFrame({"low": np.expm1(shifts.estimate - width), "high": np.expm1(shifts.estimate + width)})


def p_positive(shifts: pd.DataFrame) -> pd.Series:
    """p-values of the hypotheses that new is not above old."""
    return pd.Series(special.stdtr(shifts.freedom, -shifts.estimate / shifts.error), shifts.index).fillna(1.0)


def slower(shifts: pd.DataFrame, threshold: float) -> pd.Series:
    """Which shifts are above the threshold (new / old - 1) and proven to be above zero, all tested at once."""
    proven = stats.false_discovery_control(p_positive(shifts)) <= FALSE_ALARMS if len(shifts) else True
    return proven & (shifts.estimate > math.log1p(threshold))


# ---- the verdicts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """All changes, the worst first, and what the judgement rests on.

    A row of `changes` is what became of one figure: `figure` (the unit of a time, "x <baseline>" or :data:`MEMORY`),
    `verdict`, `old`, `new`, `change` (new / old - 1), its 95% interval from `low` to `high`, and the `reason`.
    """

    changes: pd.DataFrame
    threshold: float
    only_old: pd.DataFrame
    only_new: pd.DataFrame
    noise: dict[str, float | None]  # standard deviation of a change from run to run that is allowed for, by series
    peers: int  # of them, measurements with rounds in both records

    @property
    def regressions(self) -> pd.DataFrame:
        """What makes the command fail."""
        return self.changes[self.changes.verdict.isin(REGRESSIONS)]

    def count(self) -> Counter[str]:
        """How often each verdict was given."""
        return Counter(self.changes.verdict)


def _without(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The measurements that only `rows` have."""
    return rows[~rows.set_index(KEY).index.isin(others.set_index(KEY).index)]


def refuse_unlike(old: Record, new: Record) -> None:
    """Refuses two records whose figures differ for other reasons than code, drivers and packages, with a UserError."""

    def machine(record: Record) -> dict[str, Any]:
        device, environment = record.device, record.environment
        of_device = {"device": device.get("name"), "kind of device": device.get("kind")}
        of_system = {key: environment.get(key) for key in ("processor", "cores")}
        return {**of_device, **of_system, "threads": device.get("threads"), "dry run": record.dry_run}

    for (what, was), now in zip(machine(old).items(), machine(new).values(), strict=True):
        if was != now:
            raise UserError(f"other machine or settings: {what} is {was!r} in {old.path} and {now!r} in {new.path}")
    before, after = old.frame(), new.frame()
    for record, rows in ((old, before), (new, after)):
        if len(twice := rows[rows.duplicated(KEY)]):
            raise UserError(f"{record.path} has two measurements of {', '.join(twice[KEY].iloc[0])}")
    if len(_without(before, after)) == len(before):
        raise UserError(f"{old.path} and {new.path} have no measurement in common")


def compare_records(old: Record, new: Record, threshold: float) -> Comparison:
    """Judges every measurement that the records have in common; a UserError if none of ours has enough rounds."""
    before, after = old.frame(), new.frame()
    common = after.merge(before, on=KEY, suffixes=("", "_old"))
    timed = common.error.isna() & common.error_old.isna()
    times, noise, peers = _times(common[timed], threshold)
    changes = pd.concat([_failures(common[~timed]), times, _memory(common[timed], threshold)], ignore_index=True)
    if not (changes.ours & (changes.verdict != NOT_JUDGED)).any():
        raise UserError(f"no measurement of ours has {LEAST_ROUNDS} rounds in both records; measure without --quick")
    rank = np.select([changes.verdict == FAILS, changes.verdict.isin(REGRESSIONS)], [0, 1], 2)
    order = changes.assign(rank=rank, growth=-changes.change.fillna(0.0)).sort_values(["rank", "growth"], kind="stable")
    only = _without(before, after), _without(after, before)
    return Comparison(changes.loc[order.index], threshold, *only, noise, peers)


def _changes(rows: pd.DataFrame, figure: Any, verdict: Any, **further: Any) -> pd.DataFrame:
    """What :class:`Comparison` says of each row; what is not given has no value."""
    columns = {"old": np.nan, "new": np.nan, "change": np.nan, "low": np.nan, "high": np.nan, "reason": "", **further}
    return rows[[*KEY, "ours"]].assign(figure=figure, verdict=verdict, **columns)


def _failures(rows: pd.DataFrame) -> pd.DataFrame:
    """Measurements that failed in one record or in both."""
    runs = rows.error.isna()
    verdict = np.select([runs, rows.error_old.notna(), rows.ours], [RUNS, FAILED, FAILS], PEER)
    return _changes(rows, rows.unit, verdict, reason=rows.error.where(~runs, "it was: " + rows.error_old.astype(str)))


def _memory(timed: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Peak memory, one figure a record. What a peer's changed by, whose code is the same, is noise in its workload.

    An allocator's count repeats exactly. The growth of a resident set does not: it depends on what was free before.
    """
    old, new = timed.peak_bytes_per_element_old, timed.peak_bytes_per_element
    rows = timed.assign(old=old, new=new, growth=new - old).dropna(subset="growth")
    place = ["workload", "dtype"]
    noise = rows[~rows.ours].assign(noise=rows.growth.abs()).groupby(place).noise.max()
    rows = rows[rows.ours].join(noise, on=place)
    least = np.maximum(rows.noise.fillna(0.0), threshold * rows.old).clip(lower=LEAST_BYTES)
    verdict = np.select([rows.growth.abs() <= least, rows.growth > 0], [SAME, MORE_MEMORY], LESS_MEMORY)
    relative = (rows.growth / rows.old).where(rows.old != 0)
    return _changes(rows, MEMORY, verdict, old=rows.old, new=rows.new, change=relative)


def _times(rows: pd.DataFrame, threshold: float) -> tuple[pd.DataFrame, dict[str, float | None], int]:
    """The changes of all times, the noise from run to run by series, and how many measurements of peers tell it."""
    is_baseline = rows.contender == rows.baseline
    # Ratios are compared where both records have them to the same baseline.
    both = rows.ratios.map(len).astype(bool) & rows.ratios_old.map(len).astype(bool)
    by_ratio = both & (rows.baseline == rows.baseline_old) & ~is_baseline
    usable = {"ratios": rows[by_ratio], "rounds": rows}
    found = {series: shifts(of[f"{series}_old"], of[series]) for series, of in usable.items()}
    told = {series: of[~rows.ours.reindex(of.index)] for series, of in found.items()}
    noise = {series: run_to_run(of) for series, of in told.items()}
    wide = {series: wider(of, noise[series]) for series, of in found.items()}
    used = pd.concat([wide["ratios"], wide["rounds"][~by_ratio.reindex(wide["rounds"].index)]])

    verdict = pd.Series(np.select([rows.ours, is_baseline], [SAME, BASELINE], PEER), rows.index, dtype=object)
    judged = used[rows.ours.reindex(used.index)].sort_index()
    for name, of in ((SLOWER, judged), (FASTER, judged.assign(estimate=-judged.estimate))):
        verdict[slower(of, threshold)[lambda sure: sure].index] = name
    unsure = ~rows.index.isin(used.index)
    verdict[unsure] = NOT_JUDGED
    counts = [rows[f"ratios{of}"].where(by_ratio, rows[f"rounds{of}"]).map(len).astype(str) for of in ("_old", "")]
    few = counts[0] + " and " + counts[1] + f" rounds with a time; {LEAST_ROUNDS} are needed"
    changes = _changes(
        rows,
        ("x " + rows.baseline.astype(str)).where(by_ratio, rows.unit),
        verdict,
        old=rows.ratio_old.where(by_ratio, rows.p50_old),
        new=rows.ratio.where(by_ratio, rows.p50),
        change=np.expm1(used.estimate),
        **intervals(used),
        reason=few.where(unsure, ""),
    )
    deviations = {series: of and math.sqrt(of.variance) for series, of in noise.items()}
    return changes, deviations, len(told["ratios"]) or len(told["rounds"])


# ---- what the command prints -----------------------------------------------------------------------------------------


def print_comparison(console: Console, comparison: Comparison, old: Record, new: Record, *, everything: bool) -> None:
    """The regressions (or everything), what only one record has, and the counts."""
    changes = comparison.changes if everything else comparison.regressions
    show(console, "All measurements" if everything else "Regressions", _table(changes), left=5)
    lines = []
    for verdict in (RUNS, NOT_JUDGED) if not everything else ():
        found = comparison.changes[comparison.changes.verdict == verdict]
        lines += [f"{verdict}: {', '.join(key)}: {reason}" for *key, reason in found[[*KEY, "reason"]].to_numpy()]
    for record, only in ((old, comparison.only_old), (new, comparison.only_new)):
        lines += [f"only in {record.path}: {', '.join(key)}" for key in only[KEY].to_numpy()]
    versions = [record.environment.get("versions", {}) for record in (old, new)]
    for package in sorted(versions[0] | versions[1]):
        was, now = (of.get(package) or "none" for of in versions)
        lines += [f"note: {package} {was} -> {now}"] if was != now else []
    for line in (*lines, *_summary(comparison, old, new)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(changes: pd.DataFrame) -> pd.DataFrame:
    interval = [f"{low:+.1%} {high:+.1%}" if low == low else "" for low, high in changes[["low", "high"]].to_numpy()]
    verdict = changes.verdict + (": " + changes.reason).where(changes.reason != "", "")
    columns: Columns = {name: (name, str) for name in (*KEY, "figure")}
    columns |= {"old": ("old", form(".4g")), "new": ("new", form(".4g")), "change": ("change", form("+.1%"))}
    columns |= {"95% interval": ("interval", str), "verdict": ("verdict", str)}
    return written(changes.assign(interval=interval, verdict=verdict), columns)


def _summary(comparison: Comparison, old: Record, new: Record) -> list[str]:
    counts, threshold = comparison.count(), comparison.threshold
    noise = comparison.noise["rounds"] if comparison.noise["ratios"] is None else comparison.noise["ratios"]
    allowed = (
        "too few measurements of peers to tell the noise from run to run, which is not allowed for"
        if noise is None
        else f"noise from run to run, told by {comparison.peers} measurements of peers: {noise:.1%}"
    )
    peers = comparison.changes[comparison.changes.verdict == PEER].change
    slow, fast = (peers > threshold).sum(), (peers < -threshold).sum()
    commits = [record.environment.get("commit") or "unknown commit" for record in (old, new)]
    return [
        f"{' -> '.join(commits)}, threshold {threshold:.0%}; {allowed}.",
        f"Peers that differ by more than the threshold: {slow} slower, {fast} faster, of {counts[PEER]}.",
        f"Ours: {len(comparison.regressions)} regressions; {counts[FASTER]} faster, {counts[LESS_MEMORY]} with less "
        f"memory, {counts[RUNS]} that run now, {counts[SAME]} the same within threshold and noise; "
        f"{counts[NOT_JUDGED]} not judged, {counts[FAILED]} failed in both, {counts[BASELINE]} baselines.",
    ]
