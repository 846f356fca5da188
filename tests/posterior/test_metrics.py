"""The metrics: small cases by hand, bounds by hypothesis, and refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from torch import Tensor

from ivon_kernels.predict import metrics

# Confidence 0.9, 0.8, 0.6 and 0.5; right, wrong, right, wrong.
FOUR = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 1])


def test_four_examples_by_hand() -> None:
    scores = metrics.evaluate(FOUR, LABELS)
    assert scores.accuracy == 0.5
    assert scores.nll == pytest.approx(-math.log(0.9 * 0.2 * 0.6 * 0.5) / 4)
    assert scores.brier == pytest.approx((2 * 0.1**2 + 2 * 0.8**2 + 2 * 0.4**2 + 2 * 0.5**2) / 4)
    # Every example is alone in its bin: |1 - 0.9|, |0 - 0.8|, |1 - 0.6|, |0 - 0.5|.
    assert scores.ece == pytest.approx((0.1 + 0.8 + 0.4 + 0.5) / 4)
    # Of the four pairs of a right and a wrong answer, 0.9 wins both and 0.6 wins one.
    # Four examples are four bins of one.
    assert scores.ece_adaptive == pytest.approx(scores.ece)
    assert scores.auroc_errors == pytest.approx(3 / 4)
    assert scores.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert scores.selective_accuracy == 1 / 2  # 80% of four, rounded up, are all four
    assert scores.vote_cross_entropy is None
    assert scores.vote_kl is None


def test_the_risk_coverage_curve_by_hand() -> None:
    coverage, risk = metrics.risk_coverage(FOUR, LABELS)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])


def test_equal_confidence_shares_its_errors() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    _, risk = metrics.risk_coverage(torch.tensor([[0.7, 0.3]] * 4), labels)
    assert risk.tolist() == pytest.approx([0.5] * 4)


def test_adaptive_bins_hold_equally_many_examples() -> None:
    confidence = np.linspace(0.98, 0.52, 23)
    right = np.arange(23) % 3 > 0
    # 23 examples in ten bins: three of the surest in each of the first three, two in the others.
    starts = [0, 3, 6, 9, 11, 13, 15, 17, 19, 21, 23]
    gaps = [abs(confidence[a:b].mean() - right[a:b].mean()) * (b - a) for a, b in pairwise(starts)]
    probabilities = torch.from_numpy(np.stack([confidence, 1 - confidence], 1))
    labels = torch.from_numpy(~right).long()
    assert metrics.evaluate(probabilities, labels).ece_adaptive == pytest.approx(sum(gaps) / 23)
    order = torch.randperm(23)
    assert metrics.evaluate(probabilities[order], labels[order]).ece_adaptive == pytest.approx(sum(gaps) / 23)


def test_adaptive_bins_that_cut_through_equal_confidences_share_their_errors() -> None:
    # All bins are cut from one group of 25: whoever sorts its right and wrong answers apart finds a gap in each bin.
    labels = torch.tensor([0] * 15 + [1] * 10)
    found = metrics.adaptive_calibration_error(torch.tensor([[0.75, 0.25]] * 25), labels)
    assert found == pytest.approx(0.75 - 15 / 25)


@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_with_distinct_confidences_adaptive_bins_are_quantiles(examples: int, random: Any) -> None:
    confidence = torch.tensor(random.sample(range(501, 1000), 10 * examples), dtype=torch.float64) / 1000
    labels = torch.tensor([random.randrange(2) for _ in confidence])
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    accuracy, mean = calibration_curve(labels == 0, confidence, n_bins=10, strategy="quantile")
    # Without ties and with a multiple of ten, scikit-learn's quantiles have no example on an edge and equal counts.
    assert metrics.adaptive_calibration_error(probabilities, labels) == pytest.approx(np.abs(accuracy - mean).mean())


def test_selective_accuracy_is_about_the_surest_four_fifths() -> None:
    confidence = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.75, 0.75, 0.7, 0.65, 0.6, 0.55])
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    assert metrics.evaluate(probabilities, torch.tensor([0] * 8 + [1] * 2)).selective_accuracy == 1
    assert metrics.evaluate(probabilities, torch.tensor([0] * 7 + [1, 0, 0])).selective_accuracy == 7 / 8
    # Six examples: five of them, and the last of these shares the one error of the two that are equally sure.
    six, labels = probabilities[:6], torch.tensor([0] * 5 + [1])
    assert metrics.evaluate(six, labels).selective_accuracy == pytest.approx(4.5 / 5)
    assert metrics.evaluate(six.flip(0), labels.flip(0)).selective_accuracy == pytest.approx(4.5 / 5)


def test_reliability_counts_a_tie_of_two_classes_where_its_accuracy_is() -> None:
    points = metrics.reliability(torch.tensor([[0.5, 0.5], [0.55, 0.45]]), torch.tensor([0, 0]))
    assert points.counts == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert points.confidence == pytest.approx([0.5, 0.55])


def test_reliability_puts_examples_in_their_confidence_bin() -> None:
    probabilities = torch.tensor([[0.72, 0.18, 0.1]] * 4 + [[0.05, 0.05, 0.9001]] * 2, dtype=torch.float64)
    probabilities[4:, 0] -= 1e-4
    points = metrics.reliability(probabilities, torch.tensor([0, 0, 0, 1, 2, 2]))
    assert points.counts == [0, 0, 0, 0, 0, 0, 0, 4, 0, 2]
    assert points.confidence == pytest.approx([0.72, 0.9001])
    assert points.accuracy == pytest.approx([0.75, 1.0])


def test_votes_by_hand() -> None:
    votes = torch.tensor([[3, 1], [0, 4], [2, 2], [4, 0]])
    scores = metrics.evaluate(FOUR, LABELS, votes)
    cross_entropy = -(
        0.75 * math.log(0.9) + 0.25 * math.log(0.1) + math.log(0.2) + 0.5 * math.log(0.4 * 0.6) + math.log(0.5)
    )
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)
    assert scores.vote_cross_entropy == pytest.approx(cross_entropy / 4)
    assert metrics.vote_entropy(votes) == pytest.approx(entropy / 4)
    assert scores.vote_kl == pytest.approx((cross_entropy - entropy) / 4)


def test_votes_may_be_counts_or_shares() -> None:
    votes = torch.tensor([[3, 1], [0, 4], [2, 2], [4, 0]])
    assert metrics.evaluate(FOUR, LABELS, votes) == metrics.evaluate(FOUR, LABELS, votes / 4)


@pytest.mark.parametrize("labels", [[0, 0, 1, 0], [1, 1, 0, 1]], ids=["all right", "all wrong"])
def test_nothing_to_tell_apart_has_no_auroc(labels: list[int]) -> None:
    scores = metrics.evaluate(FOUR, torch.tensor(labels))
    assert math.isnan(scores.auroc_errors)
    assert scores.aurc == 1 - scores.accuracy


def test_a_certain_mistake_costs_a_finite_amount() -> None:
    sure = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    scores = metrics.evaluate(sure, torch.tensor([0, 2]), torch.tensor([[1, 0, 0], [0, 0, 1]]))
    assert scores.nll == pytest.approx(-math.log(2.0**-52) / 2)
    assert scores.vote_kl == pytest.approx(-math.log(2.0**-52) / 2)
    assert metrics.evaluate(sure, torch.tensor([0, 1])).nll == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_of_low_precision_are_normalised(dtype: torch.dtype) -> None:
    probabilities = torch.randn(50, 7).softmax(1)
    labels = torch.arange(50) % 7
    exact = metrics.evaluate(probabilities.double(), labels)
    rounded = metrics.evaluate(probabilities.to(dtype), labels)
    # A probability is off by at most a relative eps, and so is the sum that it is divided by.
    assert rounded.nll == pytest.approx(exact.nll, abs=2 * torch.finfo(dtype).eps)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, certain and tied ones among them, with labels and votes."""
    examples, classes = draw(st.integers(1, 12)), draw(st.integers(2, 4))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=classes, max_size=classes).filter(any)
    rows = st.lists(weights, min_size=examples, max_size=examples)
    p, votes = (torch.tensor(draw(rows), dtype=torch.float64) for _ in range(2))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=examples, max_size=examples))
    return p / p.sum(1, keepdim=True), torch.tensor(labels), votes


@pytest.mark.slow
@given(predictions())
def test_scores_keep_their_bounds(case: tuple[Tensor, Tensor, Tensor]) -> None:
    probabilities, labels, votes = case
    scores = metrics.evaluate(probabilities, labels, votes)
    for value in (scores.accuracy, scores.ece, scores.ece_adaptive, scores.aurc, scores.selective_accuracy):
        assert 0 <= value <= 1
    assert 0 <= scores.brier <= 2
    assert 0 <= scores.nll < 36.1
    assert math.isnan(scores.auroc_errors) or 0 <= scores.auroc_errors <= 1
    assert scores.vote_kl is not None and scores.vote_cross_entropy is not None
    assert scores.vote_kl >= -1e-12
    assert scores.vote_cross_entropy >= metrics.vote_entropy(votes) - 1e-12
    coverage, risk = metrics.risk_coverage(probabilities, labels)
    assert coverage[-1] == 1
    assert risk[-1].item() == pytest.approx(1 - scores.accuracy, abs=1e-6)  # torchmetrics counts in float32
    points = metrics.reliability(probabilities, labels)
    assert sum(points.counts) == len(labels)
    filled = torch.tensor([count for count in points.counts if count], dtype=torch.float64)
    gaps = (torch.tensor(points.accuracy) - torch.tensor(points.confidence)).abs()
    if not ((probabilities.amax(1) * metrics.BINS) % 1 == 0).any():  # on an edge, the two may differ in the bin
        assert scores.ece == pytest.approx((filled @ gaps.double() / filled.sum()).item(), abs=1e-6)


@pytest.mark.slow
@given(predictions(), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(case: tuple[Tensor, Tensor, Tensor], random: Any) -> None:
    probabilities, labels, votes = case
    order = list(range(len(labels)))
    random.shuffle(order)
    one = metrics.evaluate(probabilities, labels, votes)
    other = metrics.evaluate(probabilities[order], labels[order], votes[order])
    for field, value in vars(one).items():
        assert getattr(other, field) == pytest.approx(value, abs=1e-6, nan_ok=True), field


@pytest.mark.parametrize(
    ("probabilities", "labels", "votes", "message"),
    [
        (FOUR[0], LABELS, None, r"shape \[examples, classes\]"),
        (FOUR[:, :1], LABELS, None, "two classes"),
        (FOUR[:0], LABELS[:0], None, "at least one example"),
        (FOUR.log(), LABELS, None, "Logits need softmax"),
        (2 * FOUR, LABELS, None, "a sum is off by 1"),
        (FOUR * math.nan, LABELS, None, "each row must sum to 1"),
        (FOUR, LABELS[:3], None, r"shape \[4\]"),
        (FOUR, LABELS.float(), None, "labels must be integers"),
        (FOUR, LABELS + 1, None, "between 0 and 1, not 1 to 2"),
        (FOUR, LABELS - 1, None, "between 0 and 1, not -1 to 0"),
        (FOUR, LABELS, torch.ones(4, 3), r"votes have the shape \[4, 3\]"),
        (FOUR, LABELS, torch.zeros(4, 2), "with one for every example"),
        (FOUR, LABELS, -torch.ones(4, 2), "not negative"),
    ],
)
def test_what_does_not_fit_is_refused(
    probabilities: Tensor, labels: Tensor, votes: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(probabilities, labels, votes)
