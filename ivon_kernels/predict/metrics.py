"""How good predicted class probabilities are; by torchmetrics and scikit-learn where these have the metric."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ivon_kernels.extras import REPORT, needed_for

BINS = 10
"""Bins of the calibration errors and of the reliability diagram."""
COVERAGE = 0.8
"""The share of the examples, the most confident ones, that the selective accuracy is about."""
_SUM_TOLERANCE = 1e-2  # what 8 significant bits (bfloat16) and a few hundred classes leave of a sum of 1
_EXACT_SUM = 1e-9  # float64 probabilities that sum to 1 as well as float64 can keep their bits
_SMALLEST = torch.finfo(
    torch.float64
).eps  # where scikit-learn's log loss cuts off, too: no answer costs more than 36 nats


@dataclass(frozen=True)
class Scores:
    """How good predicted class probabilities are.

    Attributes:
        accuracy: share of examples whose most probable class is the label.
        nll: mean negative log-likelihood of the label, in nats; probabilities below 2.2e-16 count as that.
        ece: expected calibration error: the mean distance between confidence and accuracy over 10 equal bins of the
            confidence, each weighted by its examples (L1).
        ece_adaptive: the same over 10 bins of equally many examples each, by confidence (Nguyen and O'Connor 2015;
            Nixon et al. 2019), see `adaptive_calibration_error`.
        brier: mean squared distance to the one-hot label, summed over the classes (0 to 2, not halved).
        auroc_errors: the probability that a right answer has more confidence than a wrong one (area under the ROC
            curve); nan where every answer is right or every answer is wrong.
        aurc: area under the risk-coverage curve, see `risk_coverage`; 0 is best.
        selective_accuracy: accuracy on the most confident 80% of the examples, rounded up; see `risk_coverage`.
        vote_cross_entropy: mean cross-entropy of the predictions to the shares of the votes, in nats; at least
            `vote_entropy(votes)`. None without votes.
        vote_kl: mean Kullback-Leibler divergence of the predictions from the shares of the votes, in nats; None without
            votes.
    """

    accuracy: float
    nll: float
    ece: float
    ece_adaptive: float
    brier: float
    auroc_errors: float
    aurc: float
    selective_accuracy: float
    vote_cross_entropy: float | None = None
    vote_kl: float | None = None


def evaluate(probabilities: Tensor, labels: Tensor, votes: Tensor | None = None) -> Scores:
    """Judge predicted class probabilities.

    Args:
        probabilities: `[N, C]`, any floating dtype and device. Rows that sum to 1 within rounding are normalised.
        labels: int `[N]`, the right classes.
        votes: `[N, C]`, how many people chose each class of each example, or the shares of them.

    Raises:
        ValueError: a shape, a range or a sum is wrong.
    """
    with needed_for("evaluate()", REPORT):
        from sklearn.metrics import brier_score_loss, log_loss
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    probabilities, labels = checked(probabilities, labels)
    classes = probabilities.shape[1]
    every_class = list(range(classes))
    coverage, risk = risk_coverage(probabilities, labels)
    kl = entropy = None
    if votes is not None:
        kl, entropy = _vote_kl(probabilities, votes), vote_entropy(votes)
    return Scores(
        accuracy=multiclass_accuracy(probabilities, labels, classes, average="micro").item(),
        nll=float(log_loss(labels, probabilities, labels=every_class)),
        ece=multiclass_calibration_error(probabilities, labels, classes, n_bins=BINS, norm="l1").item(),
        ece_adaptive=adaptive_calibration_error(probabilities, labels),
        brier=float(brier_score_loss(labels, probabilities, labels=every_class, scale_by_half=False)),
        auroc_errors=_auroc_errors(probabilities, labels),
        aurc=risk.mean().item(),
        selective_accuracy=1 - risk[coverage >= COVERAGE][0].item(),
        vote_cross_entropy=None if kl is None or entropy is None else kl + entropy,
        vote_kl=kl,
    )


def vote_entropy(votes: Tensor) -> float:
    """Mean entropy of the shares of `votes` `[N, C]`, in nats: no prediction has a smaller cross-entropy to them.

    Raises:
        ValueError: a negative count, or an example without votes.
    """
    entropies: Tensor = torch.special.entr(_shares(votes)).sum(1)
    return entropies.mean().item()


def risk_coverage(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The risk-coverage curve (Geifman and El-Yaniv 2017): what is wrong among the answers that are the most confident.

    Examples of equal confidence share their errors evenly, so that their order does not matter.

    Args:
        probabilities: `[N, C]`.
        labels: int `[N]`.

    Returns:
        coverage, float64 `[N]`: 1/N to 1; and risk, float64 `[N]`: the share of wrong answers among that many of the
        most confident ones. The mean of the risk is the area under the curve (Geifman et al. 2019).

    Raises:
        ValueError: a shape, a range or a sum is wrong.
    """
    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.max(1)
    return selective_risk(confidence, predicted != labels)


def selective_risk(certainty: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """The risk-coverage curve by any certainty: see `risk_coverage`, which has it by confidence.

    Args:
        certainty: float64 `[N]`, the larger the surer.
        wrong: bool `[N]`.
    """
    _, errors = _surest_first(certainty, wrong)
    answered = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return answered / len(errors), errors.cumsum(0) / answered


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error over bins of equally many examples, in the order of their confidence.

    Equal bins of the confidence leave most of them nearly empty when most answers are sure; these do not. Where the
    number of examples is no multiple of `bins`, the bins of the surest hold one more; with fewer examples than bins,
    each is a bin. Examples of equal confidence share their errors evenly, so that their order does not matter.

    Args:
        probabilities: `[N, C]`.
        labels: int `[N]`.
        bins: how many bins.

    Returns:
        The distance between mean confidence and accuracy, averaged over the bins, each weighted by its examples.

    Raises:
        ValueError: a shape, a range or a sum is wrong.
    """
    import numpy as np

    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.max(1)
    confidence, wrong = _surest_first(confidence, predicted != labels)
    gaps = np.array_split((confidence - (1 - wrong)).numpy(), min(bins, len(labels)))
    return float(sum(abs(part.sum()) for part in gaps) / len(labels))


@dataclass(frozen=True)
class Reliability:
    """Points of a reliability diagram: the bins that hold examples, by confidence."""

    confidence: list[float]
    """Mean confidence in each bin that is not empty."""
    accuracy: list[float]
    """Share of right answers in each bin that is not empty."""
    counts: list[int]
    """Examples in each of the equal bins, the empty ones included."""


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Mean confidence and accuracy in each of `bins` equal parts of the confidence from 0 to 1.

    Args:
        probabilities: `[N, C]`.
        labels: int `[N]`.
        bins: how many parts.

    Raises:
        ValueError: a shape, a range or a sum is wrong.
    """
    import numpy as np

    with needed_for("a calibration curve", REPORT):
        from sklearn.calibration import calibration_curve

    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.max(1)
    confidence.clamp_(max=1.0)  # a softmax may round to one bit above
    accuracy, mean = calibration_curve((predicted == labels).numpy(), confidence.numpy(), n_bins=bins)
    # calibration_curve's rule: a confidence on an edge, such as a tie of two classes, counts in the bin below it
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence.numpy()), minlength=bins)
    return Reliability(mean.tolist(), accuracy.tolist(), counts.tolist())


def checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`probabilities` as float64 `[N, C]` with rows that sum to 1, and `labels` as int64 `[N]`, both on the CPU.

    Raises:
        ValueError: they are not probabilities and labels of the same examples.
    """
    probabilities = _normalised(probabilities)
    return probabilities, checked_labels(labels, *probabilities.shape)


def checked_labels(labels: Tensor, rows: int, classes: int) -> Tensor:
    """`labels` as int64 `[rows]` on the CPU.

    Raises:
        ValueError: they are not one class, from 0 to ``classes - 1``, for every row.
    """
    labels = labels.detach().cpu()
    if labels.shape != (rows,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers of shape [{rows}], one per row of the probabilities, "
            f"not {labels.dtype} of shape {list(labels.shape)}."
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be between 0 and {classes - 1}, not {int(labels.min())} to {int(labels.max())}.")
    return labels.long()


def _surest_first(certainty: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Certainties, float64 `[N]`, the largest first, and how wrong each answer is: the mean of those as certain."""
    levels, group, sizes = torch.unique(-certainty, return_inverse=True, return_counts=True)
    errors = torch.zeros(len(sizes), dtype=torch.float64, device=wrong.device).index_add_(0, group, wrong.double())
    return -levels.repeat_interleave(sizes), (errors / sizes).repeat_interleave(sizes)


def _normalised(probabilities: Tensor) -> Tensor:
    if probabilities.dim() != 2 or probabilities.shape[0] == 0 or probabilities.shape[1] < 2:
        raise ValueError(
            "probabilities must have the shape [examples, classes] with at least one example and two classes, "
            f"not {list(probabilities.shape)}."
        )
    probabilities = probabilities.detach().cpu().double()
    sums = probabilities.sum(1, keepdim=True)
    off = (sums - 1).abs().max().item()
    if not (probabilities.min() >= 0 and off <= _SUM_TOLERANCE):  # also false for nan
        raise ValueError(
            f"probabilities must be non-negative and each row must sum to 1; the smallest is "
            f"{probabilities.min().item():.3g} and a sum is off by {off:.3g}. Logits need softmax(-1) first."
        )
    return probabilities / sums if off > _EXACT_SUM else probabilities


def _shares(votes: Tensor) -> Tensor:
    votes = votes.detach().cpu().double()
    if votes.dim() != 2 or not (bool(votes.isfinite().all()) and votes.min() >= 0 and votes.sum(1).min() > 0):
        raise ValueError("votes must be counts of shape [examples, classes], not negative, with one for every example.")
    return votes / votes.sum(1, keepdim=True)


def _vote_kl(probabilities: Tensor, votes: Tensor) -> float:
    shares = _shares(votes)
    if shares.shape != probabilities.shape:
        raise ValueError(
            f"votes have the shape {list(shares.shape)} and the probabilities {list(probabilities.shape)}; "
            "both must be [examples, classes]."
        )
    return nn.functional.kl_div(probabilities.clamp_min(_SMALLEST).log(), shares, reduction="batchmean").item()


def _auroc_errors(probabilities: Tensor, labels: Tensor) -> float:
    with needed_for("the AUROC of errors", REPORT):
        from sklearn.metrics import roc_auc_score

    confidence, predicted = probabilities.max(1)
    right = predicted == labels
    return math.nan if right.all() or not right.any() else float(roc_auc_score(right, confidence))
