"""What Lightning's callback says and logs."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ivon_kernels import IVON
from ivon_kernels.integrations.lightning import IVONCallback
from ivon_kernels.integrations.voice import Voice
from ivon_kernels.training.advice import IVONWarning
from tests.support.lightning_models import optimizer_of, trainer

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:The '.*_dataloader' does not have many workers"),
]
NAMES = {"ivon/sigma", "ivon/snr", "ivon/clipped", "ivon/hess"}


class Classifier(LightningModule):
    """Learns which of three inputs is the largest."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))
        self.options = {"lr": 0.3, "ess": 600.0, "seed": 1, **options}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return IVON(self.parameters(), **self.options)


class TwoOptimizers(Classifier):
    """Takes turns, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizers: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [IVON(part.parameters(), **self.options) for part in (self.net[0], self.net[2])]


class Notes(Logger):
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    name = "notes"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(metrics)

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


def batches(number: int = 40) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * number, 6, generator=generator)
    return DataLoader([(row, row.argmax()) for row in x], batch_size=8)  # type: ignore[arg-type]


def spoken(module: LightningModule, callback: IVONCallback | None = None, **options: Any) -> tuple[Trainer, list[str]]:
    fit = trainer(callbacks=[callback or IVONCallback()], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(module, batches())
    return fit, [str(w.message) for w in caught if issubclass(w.category, IVONWarning)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_numbers_are_logged_at_lightnings_steps(accumulate: int) -> None:
    notes = Notes()
    fit, said = spoken(Classifier(), logger=notes, log_every_n_steps=5, accumulate_grad_batches=accumulate)
    logged = [metrics for metrics in notes.seen if "ivon/sigma" in metrics]
    assert len(logged) == 40 // accumulate // 5 and all(set(metrics) >= NAMES for metrics in logged)
    assert logged[-1]["ivon/sigma"] == pytest.approx(optimizer_of(fit).glance()["sigma"])
    assert said == []


def test_two_optimizers_have_numbers_of_their_own() -> None:
    notes = Notes()
    spoken(TwoOptimizers(), logger=notes, log_every_n_steps=5)
    assert {*NAMES, "ivon/1/sigma", "ivon/1/hess"} <= set().union(*notes.seen)


def test_a_line_says_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ivon_kernels"):
        spoken(Classifier())
    lines = [record.getMessage() for record in caplog.records if record.name == "ivon_kernels"]
    assert lines == ["IVON: lr 0.3, sigma 0.041, ess 600, hess_init 1; backend cpu; 266 weights in 4 tensors"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 3e-4}, "10 steps of 40 moved the mean by "),
    "AdamW's": ({"lr": 1e-3, "ess": 0.02}, "times the size of the weights"),
    "ess": ({"ess": 100.0}, "ess=100 is less than the 320 training examples"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_once(mistake: str) -> None:
    options, expected = MISTAKES[mistake]
    callback = IVONCallback()
    _, said = spoken(Classifier(**options), callback)
    assert sum(expected in sentence for sentence in said) == 1, said


def test_the_loss_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(Voice, "hear", lambda self, loss: heard.append(loss))
    spoken(Classifier(), log_every_n_steps=4)
    assert len(heard) == 10 and heard[-1] < heard[0] < 2.5
