"""Quantiles and ratios of times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Rounds = Sequence[Sequence[float]]  # the times of each round


@dataclass(frozen=True)
class Timing:
    """Quantiles of one contender's time, and its ratio to the baseline round by round."""

    name: str
    p20: float
    p50: float
    p80: float
    ratio: float | None  # median over the rounds of (own median / baseline's median)
    error: str | None = None  # why it did not run


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20, 50 and 80% of the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], statistics.median(values), deciles[7]


def ratios(own: Rounds, baseline: Rounds) -> list[float]:
    """Own median over the baseline's, round by round: a drift of the machine meets both."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(own, baseline, strict=False)]


def timing(name: str, own: Rounds, baseline: Rounds | None) -> Timing:
    """Quantiles over all rounds, and the median of the ratios."""
    ratio = statistics.median(ratios(own, baseline)) if baseline else None
    return Timing(name, *quantiles([value for part in own for value in part]), ratio)
