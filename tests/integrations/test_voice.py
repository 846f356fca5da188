"""What a Trainer's user is told: the settings, numbers beside the loss, advice, and a loss that has fallen off."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ivon_kernels import IVON
from ivon_kernels.integrations import voice
from ivon_kernels.integrations.transformers import IVONCallback, ivon_of, use_ivon
from ivon_kernels.integrations.voice import LossWatch, Voice
from ivon_kernels.training.advice import IVONWarning
from tests.support.tiny_llm import arguments, lora_llama, make_trainer, sequences

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CALM: dict[str, Any] = {"lr": 0.02, "ess": 100.0, "hess_init": 0.5, "weight_decay": 0.01, "seed": 3}
"""Settings with which the tiny Llama learns and nothing is wrong."""


def spoken(trainer: Trainer) -> list[str]:
    """The advice of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if issubclass(w.category, IVONWarning)]


def calm_trainer(folder: Path, *, data: int = 12, ivon: dict[str, Any] | None = None, **options: Any) -> Trainer:
    trainer = Trainer(lora_llama(), arguments(folder, **options), train_dataset=sequences(data))
    use_ivon(trainer, **{**CALM, **(ivon or {})})
    return trainer


# ---- the line at the start -------------------------------------------------------------------------------------------


def test_a_line_says_what_was_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ivon_kernels"):
        calm_trainer(tmp_path, max_steps=12).train()
    lines = [record.getMessage() for record in caplog.records if record.name == "ivon_kernels"]
    assert lines == ["IVON: lr 0.02, sigma 0.14, ess 100, hess_init 0.5; backend cpu; 112 weights in 4 tensors"]


def test_the_line_is_seen_unless_logging_is_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    for _ in range(2):
        voice.say("a line")
    assert capsys.readouterr().err == "a line\n" * 2
    own = logging.NullHandler()
    root.addHandler(own)
    voice.say("a line")
    assert capsys.readouterr().err == ""


def test_clipping_of_the_gradients_goes_unless_it_was_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ivon_kernels"):
        trainer = calm_trainer(tmp_path, max_steps=12, max_grad_norm=1.0)  # the default
        trainer.train()
    assert trainer.args.max_grad_norm == 0.0
    assert "; max_grad_norm 0 instead of the default 1" in caplog.records[0].getMessage()
    assert make_trainer(tmp_path, max_grad_norm=0.3).args.max_grad_norm == 0.3


# ---- numbers ---------------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """As wandb's and TensorBoard's: among the callbacks that the Trainer has when it is built."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **context: Any) -> None:
        self.seen.append(dict(logs))


NAMES = {"ivon/sigma", "ivon/snr", "ivon/clipped", "ivon/hess"}


def test_numbers_are_logged_beside_the_loss(tmp_path: Path) -> None:
    reporter = Reporter()
    args = arguments(tmp_path, max_steps=12, logging_steps=3)
    trainer = Trainer(lora_llama(), args, train_dataset=sequences(), callbacks=[reporter])
    use_ivon(trainer, **CALM)
    trainer.train()
    training = [logs for logs in reporter.seen if "loss" in logs]
    assert len(training) == 4 and all(set(logs) >= NAMES for logs in training)
    assert all(not NAMES & set(logs) for logs in reporter.seen if "loss" not in logs)
    assert [entry["ivon/sigma"] for entry in trainer.state.log_history if "loss" in entry] == [
        logs["ivon/sigma"] for logs in training
    ]
    assert training[-1]["ivon/sigma"] == ivon_of(trainer).glance()["sigma"]
    assert training[0]["ivon/hess"] == pytest.approx(1.0, abs=0.2)


def test_a_callback_that_was_passed_is_put_first_too(tmp_path: Path) -> None:
    own = IVONCallback(save_posterior=False)
    trainer = Trainer(lora_llama(), arguments(tmp_path), train_dataset=sequences(), callbacks=[Reporter(), own])
    use_ivon(trainer, **CALM)
    callbacks = trainer.callback_handler.callbacks
    assert callbacks[0] is own and sum(isinstance(callback, IVONCallback) for callback in callbacks) == 1
    assert "save_model" not in vars(trainer)


def test_the_trainers_optimizer_forwards(tmp_path: Path) -> None:
    trainer = calm_trainer(tmp_path, max_steps=12)
    trainer.train()
    wrapped = trainer.optimizer
    assert not isinstance(wrapped, IVON)
    posterior = wrapped.posterior(trainer.model)
    assert len(posterior) == 4 and wrapped.check() == ivon_of(trainer).check()


# ---- advice ----------------------------------------------------------------------------------------------------------


def test_a_good_run_is_not_advised(tmp_path: Path) -> None:
    assert spoken(calm_trainer(tmp_path, max_steps=24, logging_steps=1)) == []


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "three steps": (
        {"lr": 0.03, "ess": 1e7, "hess_init": 1e-3, "clip_radius": 1e-3, "rescale_lr": False, "weight_decay": 1e-6},
        {"max_steps": 3},
        "3 steps can move a weight by at most 9e-05",
    ),
    "lr": ({"lr": 2e-5}, {}, "10 steps of 12 moved the mean by "),
    "long steps": ({"lr": 3.0}, {}, "a step moves a weight by about "),
    "ess": ({"ess": 5.0}, {}, "ess=5 is less than the 12 training examples"),
    "AdamW's": ({"lr": 1e-3, "ess": 1.0, "hess_init": 1.0}, {}, "times the size of the weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_once(tmp_path: Path, mistake: str) -> None:
    ivon, options, expected = MISTAKES[mistake]
    said = spoken(calm_trainer(tmp_path, ivon=ivon, **{"max_steps": 12, **options}))
    assert sum(expected in sentence for sentence in said) == 1, said


def test_too_many_examples(tmp_path: Path) -> None:
    trainer = Trainer(lora_llama(), arguments(tmp_path, max_steps=12), train_dataset=sequences())
    use_ivon(trainer, num_data=1200, lr=5.0)
    assert any("made for num_data=1200, but there are 12 training examples" in sentence for sentence in spoken(trainer))


def test_nothing_is_said_twice_in_a_second_run(tmp_path: Path) -> None:
    trainer = calm_trainer(tmp_path, max_steps=12, ivon={"ess": 5.0})
    assert any("ess=5" in sentence for sentence in spoken(trainer))
    assert not any("ess=5" in sentence for sentence in spoken(trainer))


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = IVON([nn.Parameter(torch.ones(5))], lr=0.1, ess=3.0)
    other = Voice(optimizer, steps=5, num_data=100, speaks=False)
    other.begin(told=1e6)
    other.end(5)
    assert not caplog.records


# ---- the loss --------------------------------------------------------------------------------------------------------


def heard(losses: list[float]) -> list[str]:
    watch = LossWatch()
    said = []
    for loss in losses:
        watch.note(loss)
        if sentence := watch.fallen():
            said.append(sentence)
    return said


def noisy(levels: list[float], deviation: float, seed: int) -> list[float]:
    draws = random.Random(seed)
    return [level + draws.gauss(0.0, deviation) for level in levels]


LEARNS = [0.6 + 0.5 * 0.9**i for i in range(60)]


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.1, 0.3])
def test_runs_that_learn_or_do_nothing_are_left_alone(deviation: float) -> None:
    for seed in range(50):
        for levels in (LEARNS, [1.1] * 60, [0.0] * 60):
            assert heard(noisy(levels, deviation, seed)) == []
        epochs = [level for level in (1.2, 0.7, 0.4) for _ in range(20)]
        assert heard(noisy(epochs, deviation, seed)) == []


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.05])
def test_a_run_that_falls_off_is_noticed(deviation: float) -> None:
    """As one that ends at the majority class, and one that diverges."""
    for seed in range(20):
        falls = noisy([*LEARNS[:30], *[1.1] * 30], deviation, seed)
        assert "is back at 1." in heard(falls)[0]
        rises = noisy([1.1 + 0.2 * i for i in range(30)], deviation, seed)
        assert "the loss began at 1." in heard(rises)[0] and "diverges" in heard(rises)[0]


def test_a_spike_is_none() -> None:
    assert heard([*LEARNS[:30], 5.0, *LEARNS[30:]]) == []


def test_a_run_that_fell_off_gets_the_remedy() -> None:
    optimizer = IVON([nn.Parameter(torch.ones(5))], lr=0.3, ess=30.0)
    speaker = Voice(optimizer, steps=None, num_data=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss in [*LEARNS[:20], *[1.1] * 20, float("nan")]:
            speaker.hear(loss)
    (said,) = caught
    assert said.category is IVONWarning
    assert str(said.message).endswith(
        "so the run has fallen off: start again with a third of the learning rate (lr=0.1 instead of 0.3)"
    )


def test_the_trainers_loss_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(Voice, "hear", lambda self, loss: heard.append(loss))
    trainer = calm_trainer(tmp_path, max_steps=12, logging_steps=2)
    trainer.train()
    assert heard == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] and len(heard) == 6
