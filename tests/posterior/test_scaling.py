"""Temperature scaling of logits and of averaged predictions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ivon_kernels.posterior import Prediction, fit_temperature, scale
from ivon_kernels.predict.temperature import LIMIT, best_temperature


@pytest.mark.parametrize("truth", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_best_of_a_grid(truth: float) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 3, generator=rng, dtype=torch.float64)
    labels = torch.multinomial((logits / truth).softmax(1), 1, generator=rng)[:, 0]

    def cost(value: float) -> float:
        return nn.functional.cross_entropy(logits / value, labels).item()

    found = fit_temperature(logits, labels)
    grid = [math.exp(i / 100) for i in range(-250, 251)]
    best = min(grid, key=cost)
    assert cost(found) <= cost(best)
    assert abs(math.log(found / best)) <= 0.01  # the grid's own step
    assert abs(math.log(found / truth)) < 0.25
    assert fit_temperature(logits + torch.randn(400, 1, generator=rng), labels) == pytest.approx(found, rel=1e-6)
    with torch.no_grad():
        assert fit_temperature(logits, labels) == found


@pytest.mark.parametrize(("right", "expected"), [(True, 1 / LIMIT), (False, LIMIT)])
def test_labels_without_a_best_temperature_get_the_last_one(right: bool, expected: float) -> None:
    logits = torch.eye(4, dtype=torch.float64)[:, :3]
    labels = logits.argmax(1) if right else (logits.argmax(1) + 1) % 3
    end, predicted = ("least", 3) if right else ("largest", 0)
    said = f"the temperature is {expected:g}, the {end} that is given: 3 labels, {predicted} of them predicted"
    prediction = Prediction.from_samples(logits[None, :3].softmax(2), labels[:3])
    for fit in (lambda: fit_temperature(logits[:3], labels[:3]), lambda: prediction.fit_temperature()):
        with pytest.warns(UserWarning, match=said) as caught:
            assert fit() == pytest.approx(expected)
        assert caught[0].filename == __file__  # the caller's line
    assert best_temperature(logits[:3], labels[:3]) == pytest.approx(expected)  # in silence: warnings are errors here


def test_an_average_is_scaled_and_not_its_samples() -> None:
    rng = torch.Generator().manual_seed(1)
    samples = (4 * torch.randn(5, 60, 3, generator=rng, dtype=torch.float64)).softmax(2)
    labels = torch.randint(3, (60,), generator=rng)
    prediction = Prediction.from_samples(samples, labels)
    temperature = prediction.fit_temperature()
    assert temperature == fit_temperature(samples.mean(0).log(), labels) == prediction.fit_temperature(labels)
    assert temperature > 1.1  # labels by chance: it was too sure
    expected = samples.mean(0) ** (1 / temperature)
    torch.testing.assert_close(prediction.scaled(temperature), expected / expected.sum(1, keepdim=True))
    assert torch.equal(prediction.scaled(temperature).argmax(1), prediction.predicted)
    torch.testing.assert_close(prediction.scaled(1.0), prediction.probabilities)


def test_a_probability_of_0_has_a_temperature_and_stays_0() -> None:
    probabilities = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="3 labels, 1 of them predicted"):
        temperature = fit_temperature(probabilities.log(), torch.tensor([0, 0, 1]))
    assert 1 <= temperature <= LIMIT
    scaled = scale(probabilities.log(), 2.0)
    assert scaled[0, 1] < 1e-150 and torch.isfinite(scaled).all()
    with pytest.warns(UserWarning, match="the temperature is 20, the largest"):
        wrong = fit_temperature(probabilities.log(), torch.tensor([1, 1, 0]))  # impossible happened: doubt everything
    assert wrong == pytest.approx(LIMIT)


def test_what_is_wrong_is_said() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for bad, message in (
        (labels[:3], r"labels must be integers of shape \[4\]"),
        (labels.double(), "labels must be integers"),
        (labels + 1, "labels must be between 0 and 2, not 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_temperature(logits, bad)
    for shape in ((4,), (4, 1), (0, 3)):
        with pytest.raises(ValueError, match=r"\[rows, classes\] of at least two classes"):
            scale(torch.randn(shape), 1.0)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must not be nan"):
            scale(torch.tensor([[0.0, 1.0], [0.0, value]]), 1.0)
    with pytest.raises(ValueError, match="-inf in every class"):
        scale(torch.full((2, 2), -math.inf), 1.0)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            scale(logits, temperature)
    with pytest.raises(ValueError, match="give labels"):
        Prediction.from_samples(logits.softmax(1)[None]).fit_temperature()
