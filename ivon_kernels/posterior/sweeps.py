"""Dials of a trained posterior, turned through their range on a validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import Tensor, nn
from tqdm.auto import tqdm

from ivon_kernels.posterior.posterior import Posterior
from ivon_kernels.predict import metrics
from ivon_kernels.predict.prediction import PredictOptions, predict
from ivon_kernels.report.plots import BLUE, ORANGE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

__all__ = ["Criterion", "Sweep", "sweep_pruning", "sweep_temperature"]

Criterion = Literal["nll", "brier", "ece", "accuracy"]
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Sweep:
    """What a dial does to predictions.

    Attributes:
        dial: ``"temperature"`` or ``"pruned fraction"``.
        values: Its positions, in the order in which they were tried.
        scores: How good the predictions are at each.
        criterion: What the best one is chosen by.
        best: The position with the lowest nll, brier or ece, or the highest accuracy; of equals the one tried first.
        posterior: The posterior at `best`.
    """

    dial: str
    values: tuple[float, ...]
    scores: tuple[metrics.Scores, ...]
    criterion: Criterion
    best: float
    posterior: Posterior

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw accuracy against calibration error, a point for each value, the best one marked.

        Args:
            ax: Where to draw; None makes a new figure.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        ece = [scores.ece for scores in self.scores]
        accuracy = [scores.accuracy for scores in self.scores]
        at = self.values.index(self.best)
        ax.plot(ece, accuracy, "o-", color=BLUE, linewidth=1, markersize=5, label=self.dial)
        ax.plot(ece[at], accuracy[at], "*", color=ORANGE, markersize=16, label=f"best {self.criterion}: {self.best:g}")
        for x, y, value in zip(ece, accuracy, self.values, strict=True):
            ax.annotate(f"{value:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        ax.set_xlabel("expected calibration error")
        ax.set_ylabel("accuracy")
        # No closer than a tenth of accuracy and of ECE: closer, one example of a small split would look like a step.
        ax.set_xlim(*_around(ece))
        ax.set_ylim(*_around(accuracy))
        ax.grid(visible=True, alpha=0.3)
        ax.legend(fontsize=8)
        return ax


def _around(values: Sequence[float], least: float = 0.1) -> tuple[float, float]:
    """An axis around the values, at least this wide."""
    low, high = min(values), max(values)
    margin = max(0.1 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


class _Dial(NamedTuple):
    """Something about a posterior that a sweep turns through its values."""

    name: str
    turned: Callable[[float], Posterior]  # the posterior at a value
    values: tuple[float, ...]


def sweep_temperature(
    posterior: Posterior,
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    criterion: Criterion = "nll",
    progress: bool | None = None,
    **options: Unpack[PredictOptions],
) -> Sweep:
    """Predict with :meth:`~ivon_kernels.posterior.Posterior.tempered` posteriors and choose the best temperature.

    Choose on a validation split: the best value's own scores on it are too good.

    Args:
        posterior: What is tempered.
        model: As in :func:`~ivon_kernels.posterior.predict`.
        inputs: As there, but read once for each value: a batch, a DataLoader or a list of batches. A loader must not
            shuffle if `labels` are given.
        labels: The right classes, integers ``[N]``; None where the batches have them.
        temperatures: Factors on ess; 1 is the posterior as it is.
        criterion: What to choose by.
        progress: Whether to show a progress bar over the values; None does in a terminal.
        **options: Of `predict`: ``samples``, ``score``, ``stacked``, ``max_rows``, ``device``, ``adapter``. The values
            share the samples' noise, so that they differ in nothing else.

    Raises:
        TypeError: If `inputs` can be read once only.
        ValueError: If there are no labels, or an argument does not fit.
    """
    _check_values(temperatures, lambda value: 0.0 < value < math.inf, "finite and above 0")
    dial = _Dial("temperature", posterior.tempered, tuple(temperatures))
    return _sweep(dial, model, inputs, labels, criterion, progress, options)


def sweep_pruning(
    posterior: Posterior,
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    criterion: Criterion = "nll",
    progress: bool | None = None,
    **options: Unpack[PredictOptions],
) -> Sweep:
    """Predict with :meth:`~ivon_kernels.posterior.Posterior.pruned` posteriors and choose the best fraction.

    Args:
        posterior: What is pruned.
        model: As in :func:`sweep_temperature`, and so are the other arguments.
        inputs: As there.
        labels: As there.
        fractions: Of the weights, which become 0; 0 is the posterior as it is.
        criterion: As there.
        progress: As there.
        **options: As there; ``samples=0`` predicts at the pruned mean.

    Raises:
        TypeError: If `inputs` can be read once only.
        ValueError: If there are no labels, or an argument does not fit.
    """
    _check_values(fractions, lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
    dial = _Dial("pruned fraction", posterior.pruned, tuple(fractions))
    return _sweep(dial, model, inputs, labels, criterion, progress, options)


def _check_values(values: Sequence[float], fits: Callable[[float], bool], wanted: str) -> None:
    if not values or not all(map(fits, values)):
        raise ValueError(f"the values of a sweep must be {wanted}, and at least one, got {list(values)}")


def _sweep(
    dial: _Dial,
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None,
    criterion: Criterion,
    progress: bool | None,
    options: PredictOptions,
) -> Sweep:
    if isinstance(inputs, Iterator):
        raise TypeError("a sweep reads inputs once for each value, which an iterator does not allow: give a list")
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}")
    scores = []
    hidden = None if progress is None else not progress  # None: hidden where there is no terminal
    for value in tqdm(dial.values, desc=dial.name, unit="value", disable=hidden, leave=False):
        # Without advice: the samples of a posterior that was cooled for a trial agree as they should.
        prediction = predict(dial.turned(value), model, inputs, progress=False, advise=False, **options)
        right = prediction.labels if labels is None else labels
        if right is None:
            raise ValueError("a sweep needs labels: in the batches, or as an argument")
        scores.append(metrics.evaluate(prediction.probabilities, right))
    sign = -1.0 if criterion == "accuracy" else 1.0
    costs = [sign * getattr(each, criterion) for each in scores]
    best = dial.values[costs.index(min(costs))]
    return Sweep(dial.name, dial.values, tuple(scores), criterion, best, dial.turned(best))
