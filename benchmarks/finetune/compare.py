"""What the test set says about IVON less AdamW: paired bootstrap intervals, and one sentence that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

RESAMPLES = 2000
BINS = 10  # of the confidence, as everywhere
LEVEL = 0.95
_HEADS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
_LESS_IS_BETTER = {"accuracy": False, "nll": True, "ece": True}


@dataclass(frozen=True)
class Difference:
    """One score of a way of predicting less the baseline's, on the same examples, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def differences(
    rows: Mapping[str, Tensor], baseline: str, labels: Tensor, scores: Sequence[str] = tuple(_HEADS)
) -> dict[str, dict[str, Difference]]:
    """Of every way of predicting but the baseline: its accuracy, NLL and ECE less the baseline's.

    Args:
        rows: Class probabilities `[examples, classes]` by name.
        baseline: The name that the others are compared with.
        labels: The right classes, `[examples]`.
        scores: Which of the three.
    """
    right = labels.numpy()
    parts = {name: _of_examples(found.numpy(), right) for name, found in rows.items()}
    base = parts.pop(baseline)
    return {name: {key: _less(key, one, base) for key in scores} for name, one in parts.items()}


def table(found: Mapping[str, Mapping[str, Difference]]) -> pd.DataFrame:
    """The differences as text; a star marks those whose interval leaves out zero."""
    cells = {
        name: {_HEADS[key]: _cell(difference) for key, difference in scores.items()} for name, scores in found.items()
    }
    return pd.DataFrame.from_dict(cells, orient="index")


def record(found: Mapping[str, Mapping[str, Difference]]) -> dict[str, Any]:
    """The differences as JSON can hold them."""
    return {name: {key: asdict(each) for key, each in scores.items()} for name, scores in found.items()}


def conclusion(found: Mapping[str, Mapping[str, Difference]], baseline: str, examples: int) -> str:
    """One sentence about every way of predicting, whichever way it goes."""
    parts = [f"{name}: {_words(scores)}" for name, scores in found.items()]
    return f"Against {baseline}, on the same {examples} examples (95% intervals): {'; '.join(parts)}."


def _words(scores: Mapping[str, Difference]) -> str:
    better, worse, level = [], [], []
    for key, each in scores.items():
        if not each.decided:
            level.append(_HEADS[key])
        elif (each.value < 0) == _LESS_IS_BETTER[key]:
            better.append(f"{_HEADS[key]} ({each.value:+.3f})")
        else:
            worse.append(f"{_HEADS[key]} ({each.value:+.3f})")
    said = [f"{what} in {' and '.join(which)}" for what, which in (("better", better), ("worse", worse)) if which]
    return ", ".join([*said, *([f"no difference seen in {' and '.join(level)}"] if level else [])])


def _cell(each: Difference) -> str:
    return f"{each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f}){'*' if each.decided else ' '}"


def _of_examples(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the scores are made of, `[3, examples]`: right or wrong, loss, confidence."""
    confidence, chosen = probabilities.max(1), probabilities.argmax(1)
    loss = -np.log(probabilities[np.arange(len(labels)), labels].clip(np.finfo(np.float64).tiny))
    return np.stack([chosen == labels, loss, confidence])


def _less(key: str, one: NDArray[np.float64], base: NDArray[np.float64]) -> Difference:
    statistic, parts = _MADE_OF[key]
    data = [*one[parts], *base[parts]]
    interval = stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(float(statistic(*data, axis=-1)), float(interval.low), float(interval.high))


def _mean(one: NDArray[np.float64], base: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(one.mean(axis) - base.mean(axis))


def _ece(
    right: NDArray[np.float64],
    sure: NDArray[np.float64],
    base_right: NDArray[np.float64],
    base_sure: NDArray[np.float64],
    axis: int,
) -> NDArray[np.float64]:
    return _one_ece(right, sure, axis) - _one_ece(base_right, base_sure, axis)


def _one_ece(right: NDArray[np.float64], sure: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Naeini et al. (AAAI 2015): how far confidence is from accuracy, over equal bins (low, high] of the confidence."""
    bins = np.ceil(sure * BINS).clip(1, BINS)
    gaps = [np.abs(((right - sure) * (bins == number)).mean(axis)) for number in range(1, BINS + 1)]
    return np.asarray(np.sum(gaps, axis=0))


_MADE_OF: dict[str, tuple[Callable[..., NDArray[np.float64]], list[int]]] = {
    "accuracy": (_mean, [0]),
    "nll": (_mean, [1]),
    "ece": (_ece, [0, 2]),
}
"""Of each score the statistic, and the rows of `_of_examples` that it takes."""
