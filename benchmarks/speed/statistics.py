"""When a difference between two series of rounds is more than noise.

A measurement has about ten rounds: in each, its median time over the baseline's median time of the same round, so that
a drift of the machine meets both. What is compared are the logarithms of these ratios (of the times, where one of the
records has no ratio).

- **Shift.** Difference of the 20% trimmed means, with Yuen's standard error (Welch's t test on trimmed samples): a
  fifth of the rounds on either side may be spoiled by other users of the machine.
- **Run to run.** Two runs of the same code differ by more than their rounds show, as a process draws some of its
  conditions once. The peers tell by how much: their code did not change, so what the spread of their shifts has beyond
  their standard errors is added to the variance of every shift of ours (degrees of freedom by Satterthwaite). With
  fewer than :data:`LEAST_PEERS` of them nothing is added. Tensors that a contender keeps over all rounds of a run hide
  such noise from the rounds; a suite that is guarded by this makes new ones in every round.
- **Verdict.** Slower is what is slower by more than the threshold, and proven to be slower at all.
- **Many at once.** The p-values of all of our measurements go through Benjamini and Hochberg's procedure at
  :data:`FALSE_ALARMS`. Where no code changed, that is the largest probability of any alarm in a whole comparison, and
  else the share of what is reported that is expected not to be slower at all, as far as the noise has been told right.

`tests/benchmarks/test_compare.py` simulates it: with noise of 5% in a round, 10 rounds and 1% from run to run, a
slowdown by 15% of a quarter of 96 measurements is found in more than 80% of them. At 8% in a round or 3% from run to
run it is not: a comparison needs a machine with nothing else to do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

FALSE_ALARMS = 0.01
LEAST_ROUNDS = 3  # fewer have no spread worth the name
LEAST_PEERS = 8
_TRIM = 0.2
_NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
_MAD_EFFICIENCY = 0.37  # of the median absolute deviation, as a share of the observations


@dataclass(frozen=True)
class Noise:
    """Variance of a shift between two runs of the same code, beyond what the rounds show."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Shift:
    """A difference of logarithms, new less old."""

    estimate: float
    error: float  # standard error, from the rounds alone
    freedom: float

    def wider(self, noise: Noise | None) -> Shift:
        """With the noise from run to run added."""
        if noise is None or noise.variance == 0:
            return self
        total = self.error**2 + noise.variance
        freedom = total**2 / (self.error**4 / self.freedom + noise.variance**2 / noise.freedom)
        return Shift(self.estimate, math.sqrt(total), freedom)

    def interval(self) -> tuple[float, float]:
        """95% interval of new / old - 1."""
        width = self.error * float(special.stdtrit(self.freedom, 0.975))
        return math.expm1(self.estimate - width), math.expm1(self.estimate + width)

    def p_positive(self) -> float:
        """p-value of the hypothesis that new is not above old."""
        if self.error == 0:
            return 0.0 if self.estimate > 0 else 1.0
        return float(special.stdtr(self.freedom, -self.estimate / self.error))

    def reversed(self) -> Shift:
        """Old and new exchanged."""
        return Shift(-self.estimate, self.error, self.freedom)


def shift(old: Sequence[float], new: Sequence[float]) -> Shift:
    """The shift between two series of positive figures, each of :data:`LEAST_ROUNDS` at least."""
    (mean_old, error_old, free_old), (mean_new, error_new, free_new) = (_trimmed(series) for series in (old, new))
    squares = error_old + error_new
    if squares == 0:
        return Shift(mean_new - mean_old, 0.0, 1.0)
    freedom = squares**2 / (error_old**2 / free_old + error_new**2 / free_new)
    return Shift(mean_new - mean_old, math.sqrt(squares), freedom)


def _trimmed(series: Sequence[float]) -> tuple[float, float, int]:
    """Trimmed mean of the logarithms, the square of its standard error by Yuen (1974), and its degrees of freedom."""
    logs = np.sort(np.log(series))
    count = len(logs)
    cut = int(_TRIM * count)
    left = count - 2 * cut
    winsorized = np.clip(logs, logs[cut], logs[count - cut - 1])
    square = (count - 1) * float(winsorized.var(ddof=1)) / (left * (left - 1))
    return float(logs[cut : count - cut].mean()), square, left - 1


def run_to_run(peers: Sequence[Shift]) -> Noise | None:
    """What the shifts of unchanged code tell; None with fewer than :data:`LEAST_PEERS` of them."""
    if len(peers) < LEAST_PEERS:
        return None
    spread = _NORMAL_MAD * statistics.median(abs(peer.estimate) for peer in peers)
    excess = spread**2 - statistics.median(peer.error**2 for peer in peers)
    return Noise(max(0.0, excess), _MAD_EFFICIENCY * len(peers))


def slower(shifts: Sequence[Shift], threshold: float) -> list[bool]:
    """Which shifts are above the threshold (new / old - 1) and proven to be above zero, all tested at once."""
    if not shifts:
        return []
    adjusted = stats.false_discovery_control([shift.p_positive() for shift in shifts], method="bh")
    least = math.log1p(threshold)
    return [bool(p <= FALSE_ALARMS) and shift.estimate > least for p, shift in zip(adjusted, shifts, strict=True)]
