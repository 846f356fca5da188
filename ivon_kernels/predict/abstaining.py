"""When not to answer: a threshold of certainty that keeps the share of wrong answers below a bound.

With ``R(t)`` the chance that an answer whose certainty is above ``t`` is wrong, a threshold is chosen on a labelled
split so that, with probability at least ``1 - delta`` over that split, ``R(t) <= risk`` (selective classification with
a guaranteed risk: Geifman and El-Yaniv, NeurIPS 2017, arXiv 1705.08500).

Candidates are the certainties at :data:`CANDIDATES` fixed ranks of the split. Given the certainty at a rank, the
examples above it are independent draws of those that it lets through, so that their number of errors is binomial with
``R(t)``; each candidate is tested at ``delta / CANDIDATES`` (Bonferroni), so that choosing the best of them is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ivon_kernels.extras import REPORT, needed_for

__all__ = ["CANDIDATES", "By", "Threshold", "certainty_of", "find_threshold"]

By = Literal["confidence", "entropy", "mutual_information"]
"""What an answer is judged by: the largest probability, or less of either of the two others."""
CANDIDATES = 20
"""Shares of the split that are tried: 5%, 10%, ... 100%."""


@dataclass(frozen=True)
class Threshold:
    """Answer where the certainty is above a value, found on a split of `examples` examples.

    Attributes:
        by: What certainty is: `confidence`, or the negative of `entropy` or `mutual_information`.
        value: Certainties above it are answered; -inf answers all, inf none.
        risk: The share of wrong answers that was asked for.
        delta: How likely the guarantee may fail, over the draw of the split; None: none was asked for.
        coverage: The share of the split that is answered.
        selective_risk: The share of these answers that is wrong; nan where none is given.
        examples: Of the split.
    """

    by: By
    value: float
    risk: float
    delta: float | None
    coverage: float
    selective_risk: float
    examples: int

    def __str__(self) -> str:
        """What it promises, in a sentence."""
        if self.value == math.inf:
            return f"No share of the {self.examples} examples shows a risk up to {self.risk:g}: nothing is answered."
        which = f"the {self.coverage:.0%} of {self.examples} examples with the best {self.by.replace('_', ' ')}"
        seen = f"of {which} {self.selective_risk:.1%} are wrong"
        if self.delta is None:
            return f"On the split, {seen}; for other examples nothing is promised."
        return (
            f"With probability {1 - self.delta:g} over the split, at most {self.risk:.1%} of the answers to examples "
            f"from where the split is from are wrong: {seen}."
        )


def certainty_of(by: By, confidence: Tensor, entropy: Tensor, mutual_information: Tensor) -> Tensor:
    """The larger, the surer: `confidence`, or the negative of the others, float64 ``[N]``.

    Raises:
        ValueError: If `by` is none of the three.
    """
    known = {"confidence": confidence, "entropy": -entropy, "mutual_information": -mutual_information}
    if by not in known:
        raise ValueError(f"by must be one of {', '.join(known)}, got {by!r}")
    return known[by]


def find_threshold(certainty: Tensor, wrong: Tensor, *, by: By, risk: float, delta: float | None) -> Threshold:
    """The threshold with the largest coverage whose risk is at most `risk`.

    Args:
        certainty: float64 ``[N]``.
        wrong: Which answers are, bool ``[N]``.
        by: What `certainty` is.
        risk: In (0, 1).
        delta: In (0, 1); None takes the risk on the split at its word.

    Raises:
        ValueError: If `risk` or `delta` is out of range, or a certainty is nan.
        ModuleNotFoundError: If the extra `report`, which brings SciPy, is not installed.
    """
    if not 0 < risk < 1:
        raise ValueError(f"risk must be between 0 and 1, got {risk!r}")
    if delta is not None and not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, or None for no guarantee, got {delta!r}")
    if certainty.isnan().any():
        raise ValueError(f"the {by.replace('_', ' ')} of an example is nan")
    count = len(certainty)
    order = certainty.argsort(descending=True)
    surest, errors = certainty[order], wrong[order].double().cumsum(0)
    ranks = _ranks(count) if delta is not None else range(count, 0, -1)
    for rank in ranks:
        # The example at the rank itself stays out: it has set the threshold. All are answered without one.
        value = -math.inf if rank == count else surest[rank].item()
        answered = int((certainty > value).sum())
        found = int(errors[answered - 1]) if answered else 0
        if answered and _holds(found, answered, risk, None if delta is None else delta / CANDIDATES):
            return Threshold(by, value, risk, delta, answered / count, found / answered, count)
    return Threshold(by, math.inf, risk, delta, 0.0, math.nan, count)


def _ranks(count: int) -> list[int]:
    """The numbers of examples that the candidates let through, the largest first."""
    return sorted({-(-count * step // CANDIDATES) for step in range(1, CANDIDATES + 1)}, reverse=True)


def _holds(errors: int, answered: int, risk: float, level: float | None) -> bool:
    if level is None:
        return errors <= risk * answered
    with needed_for("threshold()", REPORT):
        from scipy.stats import binom

    return bool(binom.cdf(errors, answered, risk) <= level)
