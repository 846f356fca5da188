"""The average of the mean under a Trainer: what is averaged and saved, resumed runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from ivon_kernels import IVON
from ivon_kernels.integrations.averaging import AverageCallback
from ivon_kernels.integrations.transformers import ivon_of
from ivon_kernels.posterior import Posterior
from tests.support.tiny_llm import arguments, lora_llama, make_trainer, means, sequences, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
]


class Watch(TrainerCallback):
    """The mean after each step."""

    def __init__(self) -> None:
        self.means: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.means.append(weights(context["model"]))


def averaging(folder: Path, start: float = 0.5, **options: Any) -> tuple[Trainer, Watch]:
    trainer, watch = make_trainer(folder, **options), Watch()
    trainer.add_callback(AverageCallback(start))
    trainer.add_callback(watch)
    return trainer, watch


@pytest.mark.parametrize(("start", "steps"), [(0.5, 2), (0.0, 4), (0.75, 1)])
def test_the_posterior_is_around_the_average(tmp_path: Path, start: float, steps: int) -> None:
    trainer, watch = averaging(tmp_path, start)
    trainer.train()
    plain = make_trainer(tmp_path)
    plain.train()
    assert trainer.model is not None and plain.model is not None
    found, ivon = weights(trainer.model), ivon_of(trainer)
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in watch.means[-steps:]]).mean(0))
    assert any(not torch.equal(value, weights(plain.model)[name]) for name, value in found.items()) == (steps > 1)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = list(Posterior.load(tmp_path / "adapter").values())
    assert {each.index for each in saved} == set(range(len(found)))
    by_index = list(found.values())
    unmoved = list(ivon_of(plain).posterior(plain.model).values())
    for each, other in zip(saved, unmoved, strict=True):
        assert torch.equal(each.mean, by_index[each.index])
        assert torch.equal(each.sigma, other.sigma)
    for name, mean in means(ivon, trainer.model).items():
        assert torch.equal(mean, found[name])


def test_a_resumed_run_ends_with_the_same_average(tmp_path: Path) -> None:
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-3")):
        trainer, _ = averaging(tmp_path, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.model is not None
        ends.append(weights(trainer.model))
    for end in ends[1:]:
        assert all(torch.equal(value, ends[0][name]) for name, value in end.items())


def test_bfloat16_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    trainer, watch = averaging(tmp_path, 0.0, model=lora_llama().bfloat16())
    trainer.train()
    assert trainer.model is not None
    for name, value in weights(trainer.model).items():
        expected = torch.stack([each[name].float() for each in watch.means]).mean(0)
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected.bfloat16())


def test_what_joins_later_is_averaged_over_its_own_steps(tmp_path: Path) -> None:
    net = nn.ParameterList([torch.zeros(3), torch.full((3,), 8.0)])
    optimizer = IVON([net[0]], lr=0.0, ess=1e9)
    callback, state = AverageCallback(0.0), TrainerState(max_steps=4)
    begin = arguments(tmp_path), state, TrainerControl()
    callback.on_train_begin(*begin, model=net, optimizer=optimizer)
    for step in range(1, 5):
        if step == 3:
            optimizer.add_param_group({"params": [net[1]]})
        state.global_step = step
        with torch.no_grad():
            net[0].fill_(step)
        callback.on_step_end(*begin, model=net, optimizer=optimizer)
    callback.on_train_end(*begin, model=net, optimizer=optimizer)
    assert net[0].tolist() == [2.5] * 3 and net[1].tolist() == [8.0] * 3


def test_what_cannot_be_averaged_is_one_sentence(tmp_path: Path) -> None:
    for start in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="start must be a share of the steps"):
            AverageCallback(start)
    trainer, _ = averaging(tmp_path, save_strategy="steps", eval_strategy="steps", load_best_model_at_end=True)
    with pytest.raises(ValueError, match="leave one of them out"):
        trainer.train()
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    trainer, _ = averaging(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-3/ivon_average.safetensors is not there"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    other = Trainer(lora_llama(), arguments(tmp_path), train_dataset=sequences(), callbacks=[AverageCallback()])
    with pytest.raises(TypeError, match="averages the mean of IVON, and the optimizer is"):
        other.train()
