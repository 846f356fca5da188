"""A sweep scores every position of a dial as a prediction at it would be scored, and picks the best one."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from ivon_kernels.posterior import Sweep, next_token, predict, sweep_pruning, sweep_temperature, sweeps
from ivon_kernels.predict.metrics import Scores, evaluate
from tests.support.posterior_models import Trained, features, tokens, trained_classifier, trained_llama
from tests.support.tiny_llm import same

# PEFT reads what transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def mlp() -> Trained:
    return trained_classifier()


def test_temperatures_are_scored_as_predictions(mlp: Trained) -> None:
    x, y = features(40)
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    found = sweep_temperature(mlp.posterior, mlp.model, batches, temperatures=[4.0, 0.1, 1.0], samples=3)
    scores = []
    for temperature in (4.0, 0.1, 1.0):
        # Of the same batches: a product of 40 rows is rounded otherwise than products of 30 and 10.
        prediction = predict(mlp.posterior.tempered(temperature), mlp.model, batches, samples=3, advise=False)
        scores.append(evaluate(prediction.probabilities, y))
    assert found.values == (4.0, 0.1, 1.0) and found.dial == "temperature" and found.criterion == "nll"
    assert found.scores == tuple(scores)
    assert len({each.nll for each in found.scores}) == 3
    assert found.best == min(zip(scores, found.values, strict=True), key=lambda pair: pair[0].nll)[1]
    expected = mlp.posterior.tempered(found.best)
    assert all(found.posterior[name].ess == expected[name].ess for name in expected)


def test_fractions_are_scored_as_predictions() -> None:
    llm = trained_llama()
    batch = {"input_ids": tokens(20, 4)}
    labels = torch.arange(20) % 2
    score = next_token([4, 5])
    found = sweep_pruning(
        llm.posterior, llm.model, batch, labels, fractions=[0.0, 0.5, 1.0], samples=0, score=score, criterion="brier"
    )
    probabilities = predict(llm.posterior.pruned(0.5), llm.model, batch, samples=0, score=score).probabilities
    assert found.scores[1] == evaluate(probabilities, labels)
    with torch.no_grad(), llm.model.disable_adapter():  # a LoRA adapter of zeros; a posterior of it is refused here
        plain = score(llm.model.eval(), batch).double().softmax(1)
    assert found.scores[2].nll == pytest.approx(evaluate(plain, labels).nll, abs=1e-6)
    assert found.best == min(zip(found.scores, found.values, strict=True), key=lambda pair: pair[0].brier)[1]
    assert same(dict(found.posterior.mean), dict(llm.posterior.pruned(found.best).mean))


def made(values: list[tuple[float, float]]) -> list[Scores]:
    """Scores of these accuracies and calibration errors."""
    return [Scores(accuracy, 1.0 - accuracy, ece, ece, ece, 0.5, 0.5, accuracy) for accuracy, ece in values]


@pytest.mark.parametrize(("criterion", "best"), [("accuracy", 3.0), ("nll", 3.0), ("ece", 2.0), ("brier", 2.0)])
def test_the_best_is_the_first_of_equals(
    mlp: Trained, monkeypatch: pytest.MonkeyPatch, criterion: Any, best: float
) -> None:
    scores = iter(made([(0.5, 0.3), (0.7, 0.1), (0.9, 0.2), (0.9, 0.1)]))
    monkeypatch.setattr(sweeps.metrics, "evaluate", lambda *_: next(scores))
    options: dict[str, Any] = {"temperatures": [1.0, 2.0, 3.0, 4.0], "samples": 1, "criterion": criterion}
    assert sweep_temperature(mlp.posterior, mlp.model, features(4), **options).best == best


def test_the_plot_shows_accuracy_against_calibration(mlp: Trained) -> None:
    scores = made([(0.5, 0.3), (0.7, 0.1), (0.9, 0.2)])
    sweep = Sweep("temperature", (0.1, 1.0, 10.0), tuple(scores), "nll", 10.0, mlp.posterior)
    figure, ax = plt.subplots()
    assert sweep.plot(ax) is ax
    line, star = ax.get_lines()
    assert line.get_xydata().tolist() == [[0.3, 0.5], [0.1, 0.7], [0.2, 0.9]]  # type: ignore[union-attr]
    assert star.get_xydata().tolist() == [[0.2, 0.9]]  # type: ignore[union-attr]
    assert [text.get_text() for text in ax.texts] == ["0.1", "1", "10"]
    assert ax.get_xlabel() == "expected calibration error" and ax.get_ylabel() == "accuracy"
    plt.close(figure)
    other = sweep.plot()
    assert other is not ax
    plt.close(other.figure)  # type: ignore[arg-type]


def test_progress_counts_values(mlp: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"temperatures": [1.0, 2.0], "samples": 1}
    sweep_temperature(mlp.posterior, mlp.model, features(4), progress=True, **options)
    assert "/2" in capsys.readouterr().err
    sweep_temperature(mlp.posterior, mlp.model, [features(4)] * 2, **options)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "options", "error", "reason"),
    [
        (sweep_temperature, {"inputs": iter([])}, TypeError, "once for each value"),
        (sweep_temperature, {"temperatures": [1.0, 0.0]}, ValueError, r"above 0, .* got \[1.0, 0.0\]"),
        (sweep_temperature, {"temperatures": []}, ValueError, "at least one"),
        (sweep_pruning, {"fractions": [1.5]}, ValueError, r"in \[0, 1\]"),
        (sweep_pruning, {"criterion": "loss"}, ValueError, "one of nll, brier, ece, accuracy, got 'loss'"),
        (sweep_pruning, {"samples": 1}, ValueError, "needs labels"),
        (sweep_pruning, {"sample": 1}, TypeError, "unexpected keyword argument 'sample'"),
    ],
)
def test_refusals(mlp: Trained, function: Any, options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        function(mlp.posterior, mlp.model, **{"inputs": features(4)[0], **options})
