"""What the Trainer of Transformers saves, loads and evaluates with IVON: always the mean, and always all of it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import IVONCallback, ivon_of
from ivon_kernels.training.advice import IVONWarning
from tests.support.helpers import assert_same, slow_but, snapshot
from tests.support.tiny_llm import (
    IVON_OPTIONS,
    arguments,
    llama,
    lora_llama,
    make_trainer,
    means,
    same,
    saved_adapter,
    sequences,
    weights,
)

# PEFT asks a property that Transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
]


def means_in(folder: str | Path, names: list[str]) -> dict[str, Tensor]:
    """The mean of each parameter in a checkpoint's optimizer state."""
    state = torch.load(Path(folder) / "optimizer.pt", weights_only=True)["state"]
    return {name: state[i]["mean"] for i, name in enumerate(names)}


class At(TrainerCallback):
    """Calls something with the trainer at one event."""

    def __init__(self, event: str, action: Any) -> None:
        setattr(self, event, lambda args, state, control, **context: action())


# ---- checkpoints and resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine"}],
    ids=["accumulation", "bf16", "plain"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    """Bit for bit, LoRA's dropout and the shuffled data included."""
    options = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random", **options}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, model=lora_llama(dropout=0.2), **options)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    assert runs[1].state.global_step == 4
    assert_same(*(snapshot(ivon_of(trainer)) for trainer in runs))
    assert runs[0].lr_scheduler.state_dict() == runs[1].lr_scheduler.state_dict()


def test_bfloat16_weights_resume_from_the_float32_mean(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = llama().to(torch.bfloat16)
        trainer = make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(snapshot(ivon_of(trainer)))
    assert_same(*runs)


def test_an_optimizer_that_was_passed_resumes_too(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = lora_llama()
        optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
        args = arguments(tmp_path, save_strategy="steps", save_steps=2)
        Trainer(model, args, train_dataset=sequences(), optimizers=(optimizer, None)).train(resume)
        runs.append(snapshot(optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("sample_in_step", [False, True], ids=["", "sample_in_step"])
def test_every_checkpoint_holds_the_mean(tmp_path: Path, sample_in_step: bool) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, ivon={"sample_in_step": sample_in_step}, **options)
    trainer.train()
    names = list(means(ivon_of(trainer), trainer.model))
    for step in range(1, 5):
        folder = tmp_path / f"checkpoint-{step}"
        assert same(saved_adapter(folder), means_in(folder, names)), step


def save_everywhere(trainer: Trainer, folder: Path) -> None:
    trainer.save_model(str(folder / "trainer"))
    trainer.model.save_pretrained(folder / "peft")
    trainer.accelerator.save_state(str(folder / "accelerate"))
    torch.save(trainer.model.state_dict(), folder / "state_dict.pt")


def assert_saved(folder: Path, mean: dict[str, Tensor]) -> None:
    assert same(saved_adapter(folder / "trainer"), mean)
    assert same(saved_adapter(folder / "peft"), mean)
    state_dict = torch.load(folder / "state_dict.pt", weights_only=True)
    assert same({name: state_dict[name] for name in mean}, mean)
    state_dict = load_file(folder / "accelerate" / "model.safetensors")
    assert same({name: state_dict[name] for name in mean}, mean)


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("own", slow_but([False, True], False), ids=["use_ivon", "optimizers"])
def test_saves_of_other_callbacks_hold_the_mean(tmp_path: Path, event: str, own: bool) -> None:
    """Whatever the moment; and training goes on as if nothing had been saved."""
    undisturbed = make_trainer(tmp_path, max_steps=2)
    undisturbed.train()
    if own:
        model = lora_llama()
        optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
        args = arguments(tmp_path, max_steps=2)
        callbacks = [IVONCallback()]
        trainer = Trainer(model, args, train_dataset=sequences(), optimizers=(optimizer, None), callbacks=callbacks)
    else:
        trainer = make_trainer(tmp_path, max_steps=2)
    held = []

    def save() -> None:
        ivon = ivon_of(trainer)
        mean, before = means(ivon, trainer.model), weights(trainer.model)
        held.append(not same(mean, before))
        folder = tmp_path / str(len(held))
        save_everywhere(trainer, folder)
        assert_saved(folder, mean)
        assert same(weights(trainer.model), before)

    trainer.add_callback(At(event, save))
    trainer.train()
    assert held == [event != "on_step_end"] * 2
    assert_same(snapshot(ivon_of(trainer)), snapshot(ivon_of(undisturbed)))


def test_an_interrupt_loses_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of accumulation: saves and evaluations are at the mean, and training can go on."""

    def interrupt() -> None:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, **options)
    callback = At("on_substep_end", interrupt)
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    mean = means(ivon_of(trainer), trainer.model)
    assert not same(weights(trainer.model), mean)
    save_everywhere(trainer, tmp_path / "saved")
    assert_saved(tmp_path / "saved", mean)
    trainer.evaluate()
    assert same(weights(trainer.model), mean)
    ivon_of(trainer).train()
    trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=True)
    uninterrupted = make_trainer(tmp_path)
    uninterrupted.train()
    assert_same(snapshot(ivon_of(trainer)), snapshot(ivon_of(uninterrupted)))


def test_the_folder_that_is_pushed_holds_the_mean(tmp_path: Path) -> None:
    """``push_to_hub`` uploads what ``save_model`` writes into ``output_dir``."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    ivon = ivon_of(trainer)
    mean = means(ivon, trainer.model)
    ivon.train()
    trainer.save_model()
    assert same(saved_adapter(tmp_path), mean)
    ivon.eval()
    tokens = torch.tensor([sequences()[0]["input_ids"]])
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    trainer.model.eval()
    assert torch.equal(loaded(input_ids=tokens).logits, trainer.model(input_ids=tokens).logits)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def loss_at(mean: dict[str, Tensor]) -> float:
    model = lora_llama().eval()
    model.load_state_dict(mean, strict=False)
    tokens = torch.tensor([row["input_ids"] for row in sequences()[:4]])
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("event", ["on_substep_end", "on_step_end"])
def test_evaluation_in_the_middle_is_at_the_mean_and_disturbs_nothing(tmp_path: Path, event: str) -> None:
    undisturbed = make_trainer(tmp_path)
    undisturbed.train()
    trainer = make_trainer(tmp_path)
    losses = []

    def evaluate() -> None:
        expected = loss_at(means(ivon_of(trainer), trainer.model))
        losses.append((trainer.evaluate()["eval_loss"], expected))

    trainer.add_callback(At(event, evaluate))
    trainer.train()
    assert len(losses) == 4 and all(math.isclose(*pair, rel_tol=1e-6) for pair in losses)
    assert_same(snapshot(ivon_of(trainer)), snapshot(ivon_of(undisturbed)))


# ---- the best model --------------------------------------------------------------------------------------------------


def best_first(tmp_path: Path, **options: Any) -> Trainer:
    """A trainer that takes the highest loss for the best, which is that of the first checkpoint."""
    schedule = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    ivon = {"lr": 2.0, "sample_in_step": options.pop("sample_in_step", False)}
    return make_trainer(tmp_path, ivon=ivon, **schedule, **best, **options)


@pytest.mark.parametrize("sample_in_step", [False, True], ids=["", "sample_in_step"])
def test_the_best_model_brings_its_posterior(tmp_path: Path, sample_in_step: bool) -> None:
    trainer = best_first(tmp_path, sample_in_step=sample_in_step, save_total_limit=1)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert trainer.state.global_step == 4
    ivon = ivon_of(trainer)
    saved = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    for i, param in enumerate(ivon.param_groups[0]["params"]):
        assert int(ivon.state[param]["step"]) == 1
        for key in ("mean", "momentum", "hess"):
            assert torch.equal(ivon.state[param][key], saved[i][key])
    assert same(weights(trainer.model), saved_adapter(tmp_path / "checkpoint-1"))
    assert same(weights(trainer.model), means(ivon, trainer.model))


def test_a_best_model_without_its_optimizer_is_warned_of(tmp_path: Path) -> None:
    trainer = best_first(tmp_path, save_only_model=True)
    with pytest.warns(UserWarning, match=r"checkpoint-1 has no optimizer.pt .*momentum and Hessian"):
        trainer.train()
    assert same(weights(trainer.model), saved_adapter(tmp_path / "checkpoint-1"))
    ivon_of(trainer).train()
    ivon_of(trainer).eval()
    assert same(weights(trainer.model), saved_adapter(tmp_path / "checkpoint-1"))  # they are the new mean


def test_if_the_last_model_is_the_best_nothing_is_missing(tmp_path: Path) -> None:
    trainer = best_first(tmp_path, save_only_model=True)
    trainer.args.greater_is_better = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", IVONWarning)
        trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert {int(state["step"]) for state in ivon_of(trainer).state.values()} == {4}
