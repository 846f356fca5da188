"""Dials of a trained posterior, turned through their range on a validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn
from tqdm.auto import tqdm

from ivon_kernels.predict import metrics
from ivon_kernels.predict.prediction import Prediction, predict
from ivon_kernels.predict.scoring import Score, class_logits

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from ivon_kernels.posterior.posterior import Posterior

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
        from ivon_kernels.report.plots import BLUE, ORANGE, new_axes

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
        ax.grid(visible=True, alpha=0.3)
        ax.legend(fontsize=8)
        return ax


def sweep_temperature(
    posterior: Posterior,
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    criterion: Criterion = "nll",
    samples: int | Sequence[int] = 10,
    score: Score = class_logits,
    stacked: bool | None = None,
    max_rows: int = 128,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
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
        samples: As in `predict`; the values share the samples' noise, so that they differ in nothing else.
        score: As in `predict`.
        stacked: As in `predict`.
        max_rows: As in `predict`.
        progress: Whether to show a progress bar over the values; None does in a terminal.
        device: As in `predict`.
        adapter: As in `predict`.

    Raises:
        TypeError: If `inputs` can be read once only.
        ValueError: If there are no labels, or an argument does not fit.
    """
    _check(inputs, criterion, temperatures, all(0.0 < value < math.inf for value in temperatures), "finite and above 0")
    run = partial(
        predict,
        model=model,
        inputs=inputs,
        samples=samples,
        score=score,
        stacked=stacked,
        max_rows=max_rows,
        progress=False,
        device=device,
        adapter=adapter,
    )
    return _sweep("temperature", posterior.tempered, run, labels, temperatures, criterion, progress)


def sweep_pruning(
    posterior: Posterior,
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    criterion: Criterion = "nll",
    samples: int | Sequence[int] = 10,
    score: Score = class_logits,
    stacked: bool | None = None,
    max_rows: int = 128,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
) -> Sweep:
    """Predict with :meth:`~ivon_kernels.posterior.Posterior.pruned` posteriors and choose the best fraction.

    Args:
        posterior: What is pruned.
        model: As in :func:`sweep_temperature`, and so are the other arguments.
        inputs: As there.
        labels: As there.
        fractions: Of the weights, which become 0; 0 is the posterior as it is.
        criterion: As there.
        samples: As there; 0 predicts at the pruned mean.
        score: As there.
        stacked: As there.
        max_rows: As there.
        progress: As there.
        device: As there.
        adapter: As there.

    Raises:
        TypeError: If `inputs` can be read once only.
        ValueError: If there are no labels, or an argument does not fit.
    """
    _check(inputs, criterion, fractions, all(0.0 <= value <= 1.0 for value in fractions), "in [0, 1]")
    run = partial(
        predict,
        model=model,
        inputs=inputs,
        samples=samples,
        score=score,
        stacked=stacked,
        max_rows=max_rows,
        progress=False,
        device=device,
        adapter=adapter,
    )
    return _sweep("pruned fraction", posterior.pruned, run, labels, fractions, criterion, progress)


def _check(inputs: Any, criterion: str, values: Sequence[float], fit: bool, wanted: str) -> None:
    """Refuse at once what would fail later."""
    if isinstance(inputs, Iterator):
        raise TypeError("a sweep reads inputs once for each value, which an iterator does not allow: give a list")
    if not values or not fit:
        raise ValueError(f"the values of a sweep must be {wanted}, and at least one, got {list(values)}")
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}")


def _sweep(
    dial: str,
    turned: Callable[[float], Posterior],
    run: Callable[[Posterior], Prediction],
    labels: Tensor | None,
    values: Sequence[float],
    criterion: Criterion,
    progress: bool | None,
) -> Sweep:
    scores = []
    hidden = None if progress is None else not progress  # None: hidden where there is no terminal
    for value in tqdm(values, desc=dial, unit="value", disable=hidden, leave=False):
        prediction = run(turned(value))
        right = prediction.labels if labels is None else labels
        if right is None:
            raise ValueError("a sweep needs labels: in the batches, or as an argument")
        scores.append(metrics.evaluate(prediction.probabilities, right))
    sign = -1.0 if criterion == "accuracy" else 1.0
    costs = [sign * getattr(each, criterion) for each in scores]
    best = values[costs.index(min(costs))]
    return Sweep(dial, tuple(values), tuple(scores), criterion, best, turned(best))
