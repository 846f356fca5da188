"""What IVON does for a small network that learns from wrong labels: the demo of ``ivon-kernels demo``.

scikit-learn's handwritten digits (they come with it), 400 of them to learn from, 15% of these with a wrong label. A
network of two hidden layers is trained whole, once by AdamW and once by IVON: same start, same batches, same schedule.
AdamW's learning rate is its best of four on a validation part with right labels, and IVON takes it over.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ivon_kernels.extras import REPORT, needed_for
from ivon_kernels.optimizer import IVON
from ivon_kernels.predict.metrics import Scores
from ivon_kernels.predict.prediction import Prediction
from ivon_kernels.report.page import draw_reliability

__all__ = ["Result", "run"]

EXAMPLES, VALIDATION, WRONG, BATCH = 400, 400, 0.15, 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SAMPLES = 10
ADAMW, ADAMW_SCALED = "AdamW", "AdamW, scaled"
MEAN, DRAWN, DRAWN_SCALED = "IVON, mean", f"IVON, {SAMPLES} samples", f"IVON, {SAMPLES} samples, scaled"
_COLUMNS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
_WIDTHS = (26, 24, 24, 24)
_Predictions = dict[str, list[Prediction]]
_CALIBRATED = 0.02  # distance of confidence and accuracy that is not worth a word


def _ivon(model: nn.Module, learning_rate: float, steps: int, seed: int) -> IVON:
    """IVON with a learning rate that is known from AdamW, and nothing else."""
    epochs = steps * BATCH / EXAMPLES
    return IVON.for_lora(model, EXAMPLES, learning_rate=learning_rate, steps=steps, epochs=epochs, seed=seed)


class Part(NamedTuple):
    """Some of the digits."""

    images: Tensor  # float32 [N, 64], from 0 to 1
    labels: Tensor  # int64 [N]


class Digits(NamedTuple):
    """The digits of one run."""

    training: Part  # with wrong labels
    validation: Part
    test: Part


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        predictions: Of the test digits, by the row of the table, one for each run.
        rates: AdamW's learning rate in each run.
    """

    predictions: Mapping[str, Sequence[Prediction]]
    rates: Sequence[float]

    def scores(self, row: str) -> list[Scores]:
        """How good the predictions of a row are, run by run."""
        return [prediction.scores() for prediction in self.predictions[row]]

    def table(self) -> list[str]:
        """The lines of a table: averages over the runs, with the smallest and the largest where there are several."""
        lines = [_line("", _COLUMNS.values())]
        for row in self.predictions:
            scores = self.scores(row)
            lines.append(_line(row, (_spread([getattr(each, key) for each in scores]) for key in _COLUMNS)))
        return lines

    def conclusion(self) -> str:
        """One sentence on what the numbers say, whichever way they go."""
        right = _mean(each.accuracy for each in self.scores(DRAWN))
        sure = _mean(each.confidence.mean().item() for each in self.predictions[DRAWN])
        calibrated = "well calibrated"
        if abs(sure - right) >= _CALIBRATED:
            calibrated = "underconfident" if sure < right else "overconfident"
        mean, adamw = (_mean(each.accuracy for each in self.scores(row)) for row in (MEAN, ADAMW))
        return (
            f"In one pass IVON's mean has an NLL of {self._against(MEAN, ADAMW)} and is right on {mean:.1%} against "
            f"{adamw:.1%}; with a temperature for each, {SAMPLES} samples have "
            f"{self._against(DRAWN_SCALED, ADAMW_SCALED)}; without one they are {calibrated}: right on {right:.1%} "
            f"with a confidence of {sure:.1%}."
        )

    def _against(self, row: str, other: str) -> str:
        ours, theirs = ([each.nll for each in self.scores(name)] for name in (row, other))
        wins, runs = sum(a < b for a, b in zip(ours, theirs, strict=True)), len(ours)
        if wins == runs:
            where = "lower in every run" if runs > 1 else "lower, in one run"
        elif wins == 0:
            where = "lower in no run" if runs > 1 else "not lower, in one run"
        else:
            where = f"lower in {wins} of {runs} runs, which decides nothing"
        return f"{_mean(ours):.3f} against AdamW's {_mean(theirs):.3f} ({where})"

    def draw(self, path: Path) -> None:
        """Write the picture: confidence against accuracy for every row, all runs together.

        Raises:
            ModuleNotFoundError: Without matplotlib, saying what to install.
        """
        pooled = {row: torch.cat([each.probabilities for each in runs]) for row, runs in self.predictions.items()}
        labels = torch.cat([_labels(each) for each in self.predictions[ADAMW]])
        draw_reliability(path, pooled, labels, title="Digits, learned from 15% wrong labels")


def run(seeds: int = 3, steps: int = 600) -> Result:
    """Train and predict.

    Args:
        seeds: How many runs, each with another split, other wrong labels, another start and other noise.
        steps: Optimizer steps of each training.

    Raises:
        ModuleNotFoundError: Without scikit-learn, saying what to install.
    """
    with needed_for("the demo", REPORT):
        from sklearn.datasets import load_digits

    found = load_digits()
    inputs = torch.tensor(found.data, dtype=torch.float32, device="cpu") / 16
    everything = Part(inputs, torch.tensor(found.target, dtype=torch.int64, device="cpu"))
    predictions: _Predictions = {row: [] for row in (ADAMW, ADAMW_SCALED, MEAN, DRAWN, DRAWN_SCALED)}
    rates = []
    total = seeds * (len(RATES) + 1)
    with _one_thread(), tqdm(total=total, desc="training", unit="run", disable=None, leave=False) as bar:
        for seed in range(seeds):
            digits = _split(everything, seed)
            rate = _run_adamw(digits, steps, seed, predictions, bar)
            rates.append(rate)
            _run_ivon(digits, rate, steps, seed, predictions)
            bar.update()
    return Result(predictions, rates)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products of 32 rows are too small to share, and on busy cores threads wait long for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _split(everything: Part, seed: int) -> Digits:
    """The digits of a run: 400 to learn from, some with a wrong label, 400 to choose by, and the others to judge by."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(everything.labels), generator=generator)
    training, validation, test = (
        Part(everything.images[index], everything.labels[index])
        for index in (order[:EXAMPLES], order[EXAMPLES : EXAMPLES + VALIDATION], order[EXAMPLES + VALIDATION :])
    )
    wrong = torch.randperm(EXAMPLES, generator=generator)[: round(WRONG * EXAMPLES)]
    # Any of the nine others.
    training.labels[wrong] = (training.labels[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    return Digits(training, validation, test)


def _network(seed: int) -> nn.Module:
    """The same start for both optimizers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part, steps: int, seed: int) -> None:
    """The same batches for both, under a rate that falls linearly to zero."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = torch.randint(len(part.labels), (BATCH,), generator=generator)
        if isinstance(optimizer, IVON):
            optimizer.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(part.images[batch]), part.labels[batch]).backward()
        optimizer.step()
        schedule.step()


def _run_adamw(digits: Digits, steps: int, seed: int, predictions: _Predictions, bar: Any) -> float:
    """Train with each learning rate, predict with the best one on the validation part, and return it."""
    candidates = []
    for rate in RATES:
        model = _network(seed)
        _train(model, torch.optim.AdamW(model.parameters(), lr=rate, fused=True), digits.training, steps, seed)
        validation = _at_weights(model, digits.validation)
        candidates.append((validation.scores().nll, rate, validation, _at_weights(model, digits.test)))
        bar.update()
    _, rate, validation, test = min(candidates, key=operator.itemgetter(0))
    predictions[ADAMW].append(test)
    predictions[ADAMW_SCALED].append(_scaled(test, validation))
    return rate


def _run_ivon(digits: Digits, rate: float, steps: int, seed: int, predictions: _Predictions) -> None:
    """Train with the learning rate that was AdamW's, and predict at the mean and with samples."""
    model = _network(seed)
    optimizer = _ivon(model, rate, steps, seed)
    _train(model, optimizer, digits.training, steps, seed)
    posterior = optimizer.posterior(model)
    predictions[MEAN].append(posterior.predict(model, digits.test, samples=0))
    # Without advice where samples agree: the table shows it.
    validation, test = (
        posterior.predict(model, part, samples=SAMPLES, advise=False) for part in (digits.validation, digits.test)
    )
    predictions[DRAWN].append(test)
    predictions[DRAWN_SCALED].append(_scaled(test, validation))


def _at_weights(model: nn.Module, part: Part) -> Prediction:
    with torch.no_grad():
        return Prediction.from_samples(model(part.images).softmax(1)[None], part.labels)


def _scaled(test: Prediction, validation: Prediction) -> Prediction:
    """With the temperature that the validation part wants."""
    return Prediction.from_samples(test.scaled(validation.fit_temperature())[None], test.labels)


def _labels(prediction: Prediction) -> Tensor:
    assert prediction.labels is not None
    return prediction.labels


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _spread(values: list[float]) -> str:
    mean = f"{_mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _line(name: str, cells: Iterable[str]) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip((name, *cells), _WIDTHS, strict=True)).rstrip()
