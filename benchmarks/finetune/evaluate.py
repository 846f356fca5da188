"""Predictions and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import sklearn.metrics
import torch
from sklearn.calibration import calibration_curve
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from benchmarks.finetune.data import Batch, EncodedExamples, Example
from benchmarks.finetune.train import InterruptGuard

BINS = 10
BATCH_SIZE = 32


@dataclass(frozen=True)
class Scores:
    """How good predicted class probabilities are.

    Attributes:
        accuracy: share of examples whose most probable class is the label.
        nll: mean negative log-likelihood of the label, in nats.
        ece: expected calibration error, 10 equal bins of confidence.
        brier: mean squared distance to the one-hot label, summed over the classes (0 to 2).
        rater_kl: mean Kullback-Leibler divergence of the prediction from the raters' votes, in nats, where there are
            votes.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    rater_kl: float | None


def score(probabilities: Tensor, examples: Sequence[Example]) -> Scores:
    """Judges `probabilities`, float64 `[examples, classes]`."""
    labels = torch.tensor([example.label for example in examples])
    classes = probabilities.shape[1]
    every_class = np.arange(classes)
    votes = [example.votes for example in examples if example.votes is not None]
    rater_kl = None
    if len(votes) == len(examples):
        shares = torch.tensor(votes, dtype=torch.float64)
        shares /= shares.sum(1, keepdim=True)
        rater_kl = nn.functional.kl_div(probabilities.log(), shares, reduction="batchmean").item()
    return Scores(
        accuracy=multiclass_accuracy(probabilities, labels, classes, average="micro").item(),
        nll=float(sklearn.metrics.log_loss(labels, probabilities, labels=every_class)),
        ece=multiclass_calibration_error(probabilities, labels, classes, n_bins=BINS, norm="l1").item(),
        brier=float(sklearn.metrics.brier_score_loss(labels, probabilities, labels=every_class, scale_by_half=False)),
        rater_kl=rater_kl,
    )


@dataclass(frozen=True)
class Reliability:
    """Points of a reliability diagram: the bins that hold examples, by confidence."""

    confidence: list[float]
    accuracy: list[float]
    counts: list[int]
    """Examples in each of the 10 equal bins, the empty ones included."""


def reliability(probabilities: Tensor, examples: Sequence[Example]) -> Reliability:
    """Mean confidence and accuracy per confidence bin."""
    confidence, predicted = probabilities.max(1)
    correct = predicted == torch.tensor([example.label for example in examples])
    accuracy, mean_confidence = calibration_curve(correct.numpy(), confidence.numpy(), n_bins=BINS)
    counts, _ = np.histogram(confidence.numpy(), bins=BINS, range=(0.0, 1.0))
    return Reliability(mean_confidence.tolist(), accuracy.tolist(), counts.tolist())


@torch.inference_mode()
def predict(
    model: nn.Module,
    score_batch: Callable[[Batch], Tensor],
    examples: EncodedExamples,
    guard: InterruptGuard,
    on_examples: Callable[[int], None],
) -> Tensor:
    """Class probabilities of every example under the model's present weights, float64 `[examples, classes]`.

    Raises:
        Interrupted: Ctrl-C was pressed.
    """
    model.eval()
    index: list[int] = []
    found: list[Tensor] = []
    for batch in examples.in_length_order(BATCH_SIZE):
        guard.check()
        found.append(score_batch(batch).double().softmax(1).cpu())
        index += batch.index
        on_examples(len(batch.index))
    return torch.cat(found)[torch.tensor(index).argsort()]
