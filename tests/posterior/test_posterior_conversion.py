"""A posterior out of an optimizer's checkpoint: ours, a Trainer's, and ivon-opt's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ivon
import pytest
import torch
from peft import PeftModel
from torch import nn

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import ivon_of
from ivon_kernels.posterior import Posterior
from tests.support.saved_posterior import assert_equal, trained
from tests.support.tiny_llm import llama, lora_llama, make_trainer, sequences

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)


def test_a_state_dict_and_a_file(tmp_path: Path) -> None:
    model = lora_llama()
    optimizer, posterior = trained(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for checkpoint in (optimizer.state_dict(), tmp_path / "optimizer.pt", str(tmp_path / "optimizer.pt")):
        assert_equal(Posterior.from_checkpoint(checkpoint, model, seed=99), posterior)
    fresh = lora_llama()  # the mean comes from the checkpoint, not from the weights
    assert_equal(Posterior.from_checkpoint(optimizer.state_dict(), fresh), posterior)


def test_bfloat16_weights_get_the_float32_mean() -> None:
    model = lora_llama().to(torch.bfloat16)
    optimizer, posterior = trained(model)
    assert_equal(Posterior.from_checkpoint(optimizer.state_dict(), model), posterior)


def test_an_adapter_loaded_for_inference(tmp_path: Path) -> None:
    model = lora_llama()
    optimizer, posterior = trained(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_equal(Posterior.from_checkpoint(optimizer.state_dict(), loaded), posterior)


@pytest.mark.slow
def test_a_trainers_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    posterior = ivon_of(trainer).posterior(trainer.model)
    folder = tmp_path / "checkpoint-4"
    converted = Posterior.from_checkpoint(folder / "optimizer.pt", lora_llama())
    assert_equal(converted, posterior)
    converted.save(folder)  # the adapter of the checkpoint holds the mean
    assert_equal(Posterior.load(folder), posterior)
    earlier = Posterior.from_checkpoint(tmp_path / "checkpoint-2" / "optimizer.pt", lora_llama())
    with pytest.raises(ValueError, match="is not the mean of this posterior"):
        earlier.save(folder)


def test_names_decide_over_the_order(tmp_path: Path) -> None:
    model = lora_llama()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad][::-1]
    optimizer = IVON(named, lr=0.1, ess=10.0, seed=1)
    converted = Posterior.from_checkpoint(optimizer.state_dict(), lora_llama())
    expected = optimizer.posterior(model)
    assert {name: one.index for name, one in converted.items()} == {name: one.index for name, one in expected.items()}
    assert_equal(converted, expected)


def test_the_parameters_can_be_given() -> None:
    model = nn.Linear(3, 3, bias=True)
    optimizer = IVON([model.bias, model.weight], lr=0.1, ess=10.0, seed=1)
    state = optimizer.state_dict()
    assert_equal(Posterior.from_checkpoint(state, model, params=[model.bias, model.weight]), optimizer.posterior(model))
    with pytest.raises(ValueError, match=r"has shape \(3,\), the parameter \(3, 3\)"):
        Posterior.from_checkpoint(state, model)


def _loss(model: nn.Module, data: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=data, labels=data).loss
    return loss


def test_frozen_parameters_keep_their_place_in_the_noise() -> None:
    model = lora_llama()
    params = [p for p in model.parameters() if p.requires_grad]
    params[1].requires_grad_(False)
    optimizer = IVON(params, lr=0.1, ess=10.0, seed=1)
    posterior = optimizer.posterior(model)
    assert [one.index for one in posterior.values()] == [0, 2, 3]
    assert_equal(Posterior.from_checkpoint(optimizer.state_dict(), model, params=params), posterior)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ivon_opt(dtype: torch.dtype) -> None:
    model = lora_llama().to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = ivon.IVON([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}], lr=0.1, ess=30.0)
    data = torch.tensor([row["input_ids"] for row in sequences()])
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            _loss(model, data).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the momentum nothing is needed
        posterior = Posterior.from_checkpoint(optimizer.state_dict(), model, seed=5)
    hess = torch.cat([group["hess"] for group in optimizer.param_groups]).float()
    assert all(one.mean.dtype == one.hess.dtype == torch.float32 for one in posterior.values())
    assert torch.cat([one.hess.flatten() for one in posterior.values()]).equal(hess)
    assert all(posterior[name].mean.equal(p.float()) for name, p in posterior.parameters_of(model).items())
    assert [one.weight_decay for one in posterior.values()] == [1e-4, 0.5, 0.5, 0.5]
    assert [one.index for one in posterior.values()] == [0, 1, 2, 3]
    assert {one.ess for one in posterior.values()} == {30.0}
    assert posterior.seed == 5


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "this is no optimizer state dict"),
        ({"state": {}, "param_groups": []}, "this is no optimizer state dict"),
        ({"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}, "was saved by another optimizer"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, checkpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Posterior.from_checkpoint(checkpoint, nn.Linear(2, 1))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not an optimizer's state dict"):
        Posterior.from_checkpoint(tmp_path / "list.pt", nn.Linear(2, 1))


def test_other_parameters() -> None:
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), lr=0.1, ess=10.0)
    with pytest.raises(ValueError, match="has 2 parameters, and 4 were found in the model: pass those"):
        Posterior.from_checkpoint(optimizer.state_dict(), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"lacks \['step', 'momentum', 'hess'\]"):
        Posterior.from_checkpoint({**optimizer.state_dict(), "state": {0: {"mean": torch.ones(2, 3)}}}, model)
    with pytest.raises(ValueError, match="no trained parameters"):
        Posterior.from_checkpoint({**optimizer.state_dict(), "state": {}}, model)
    foreign = list(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match="in `params` is not in the model"):
        Posterior.from_checkpoint(optimizer.state_dict(), model, params=foreign)
