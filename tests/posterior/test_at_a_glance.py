"""What predictions and posteriors say of themselves: scores, a line, a small table, a page."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ivon_kernels.gaussians.adapters import Origin
from ivon_kernels.posterior import Gaussian, Gaussians, Posterior, Prediction, evaluate, fit_temperature, report
from tests.support.posterior_models import Trained, features, trained_classifier

P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 2, 1])
VOTES = torch.tensor([[3, 1, 0], [0, 1, 3], [1, 1, 2], [0, 3, 1]])


@pytest.fixture(scope="module")
def mlp() -> Trained:
    return trained_classifier()


def of(probabilities: torch.Tensor, labels: torch.Tensor | None = None) -> Prediction:
    return Prediction.from_samples(probabilities[None], labels)


class Cells(HTMLParser):
    """The texts of a table, and whether all of its tags were closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_take_the_labels_that_came_with_the_batches(mlp: Trained) -> None:
    x, y = features(12)
    loader = DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=5)  # type: ignore[arg-type]
    found = mlp.posterior.predict(mlp.model, loader, samples=0)
    assert found.scores() == evaluate(found.probabilities, y)
    assert found.scores(1 - y.clamp(max=1)) == evaluate(found.probabilities, 1 - y.clamp(max=1))  # others, given
    whole = mlp.posterior.predict(mlp.model, x, samples=0)
    assert whole.scores(y) == evaluate(whole.probabilities, y)
    # Some CPUs round a float32 product by how many rows it has: a few of 2^-24 in each logit.
    torch.testing.assert_close(found.probabilities, whole.probabilities, rtol=1e-6, atol=0.0)


def test_examples_without_a_label_are_left_out() -> None:
    some = torch.tensor([0, 2, 2, -100])
    expected = evaluate(P[:3], LABELS[:3], VOTES[:3])
    assert of(P, some).scores(votes=VOTES) == expected == of(P).scores(some, votes=VOTES)
    assert of(P, some).fit_temperature() == fit_temperature(P[:3].log(), LABELS[:3])
    assert of(P, LABELS).scores(votes=VOTES) == evaluate(P, LABELS, VOTES)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (None, "the right classes: give labels, or batches that hold them"),
        (torch.full((4,), -100), "the right classes: every label is -100, which stands for none"),
        (LABELS[:2], r"labels must be one class for each of the 4 examples, got \[2\]"),
        (torch.tensor([0, 1, 3, 1]), "labels must be between 0 and 2"),
        (torch.tensor([0, -1, 2, 1]), "labels must be between 0 and 2"),
    ],
    ids=["none", "all ignored", "too few", "too large", "negative"],
)
def test_labels_that_cannot_be_used_are_one_sentence(labels: torch.Tensor | None, sentence: str) -> None:
    for judge in (of(P).scores, of(P).fit_temperature):
        with pytest.raises(ValueError, match=sentence):
            judge(labels)


# ---- a line, and a table for notebooks -------------------------------------------------------------------------------


def test_a_prediction_at_a_glance() -> None:
    assert repr(of(P)) == "Prediction(examples 4, classes 3, entropy 0.89 nats, mutual information 0 nats)"
    assert repr(of(P, LABELS)).endswith("mutual information 0 nats, accuracy 0.750)")
    assert repr(of(P, torch.tensor([-100, 2, 2, -100]))).endswith(", accuracy 0.500)")
    assert "accuracy" not in repr(of(P, torch.full((4,), -100)))
    sure = Prediction.from_samples(torch.eye(3)[:, None])
    assert f"entropy {math.log(3):.3g} nats, mutual information {math.log(3):.3g} nats" in repr(sure)
    assert Cells(of(P, LABELS)._repr_html_()).texts[:3] == ["Prediction", "examples", "4"]
    assert Cells(of(P, LABELS)._repr_html_()).texts[-2:] == ["accuracy", "0.750"]


def test_a_posterior_at_a_glance(mlp: Trained) -> None:
    def with_sigma(*sigma: float) -> Gaussian:
        return Gaussian(torch.zeros(len(sigma)), torch.tensor(sigma) ** -2, 0, 1.0, 0.0)

    weights = {"a": with_sigma(*[0.02] * 50), "b": with_sigma(*[0.01] * 3, *[0.03] * 3)}
    line = repr(Posterior(weights, 7, origin=Origin(adapter="<mine>")))
    assert line == (
        "Posterior(adapter <mine>, tensors 2, weights 56, sigma 0.02 (90% from 0.0175 to 0.0225), ess 1, seed 7)"
    )
    table = Cells(Posterior(weights, 7, origin=Origin(adapter="<mine>"))._repr_html_()).texts
    assert table[:3] == ["Posterior", "adapter", "<mine>"] and table[-1] == "7"
    assert repr(Gaussians({}, 7)) == "Gaussians(tensors 0, weights 0, seed 7)"
    assert "sigma 0 (90% from 0 to 0)" in repr(mlp.posterior.pruned(1.0))


def test_a_glance_at_many_weights_is_at_some_of_them() -> None:
    hess = torch.linspace(1, 4, 300_000)
    line = repr(Gaussians({"a": Gaussian(torch.zeros_like(hess), hess, 0, 100.0, 0.0)}, 1))
    assert "weights 300,000, sigma 0.0632 (90% from 0.051 to 0.0933)" in line  # 0.1 / sqrt(2.5, 3.85, 1.15)


# ---- a page ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_posterior_writes_the_page_of_its_predictions(mlp: Trained, tmp_path: Path) -> None:
    x, y = features(8)
    found = mlp.posterior.predict(mlp.model, (x, y), samples=3)
    page = mlp.posterior.report(tmp_path / "one", found)
    assert "| prediction |" in page.read_text() and (page.parent / "sigma.png").exists()
    several = {"mean": replace(found, labels=None), "3 samples": found}
    page = mlp.posterior.report(tmp_path / "several", several, y, title="Two")
    expected = report(tmp_path / "function", several, y, mlp.posterior, title="Two")
    assert page.read_text() == expected.read_text()
