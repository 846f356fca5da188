"""Prompt, prefix and p-tuning, whose weights PEFT does not save from a state dict."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file

from ivon_kernels import IVON
from ivon_kernels.integrations.state_dict import save_mean
from ivon_kernels.posterior import Posterior, next_token
from tests.support.adapted_llama import BATCH, trained
from tests.support.tiny_llm import llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)
OPTIONS: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
KEPT: dict[str, Any] = {"prompt": PromptTuningConfig(**OPTIONS), "prefix": PrefixTuningConfig(**OPTIONS)}
COMPUTED: dict[str, Any] = {
    "p-tuning": PromptEncoderConfig(**OPTIONS, encoder_hidden_size=4),
    "projected prefix": PrefixTuningConfig(**OPTIONS, prefix_projection=True, encoder_hidden_size=4),
}


def saved(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.parametrize("kind", [*KEPT, *COMPUTED])
def test_saves_in_the_middle_of_a_step(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained({**KEPT, **COMPUTED}[kind])
    handle = save_mean(model, optimizer)
    save_mean(model, optimizer)  # again is free
    model.save_pretrained(tmp_path / "mean")
    mean = saved(tmp_path / "mean")
    optimizer.train()
    held = [p.detach().clone() for p in model.parameters()]
    model.save_pretrained(tmp_path / "sampled")
    assert torch.equal(saved(tmp_path / "sampled"), mean)
    assert torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], mean)
    assert all(p.equal(old) for p, old in zip(model.parameters(), held, strict=True))
    handle.remove()
    assert not torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], mean)
    optimizer.eval()


def test_copies_save_what_they_hold() -> None:
    model, optimizer = trained(KEPT["prompt"])
    save_mean(model, optimizer)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for param in twin.prompt_encoder.parameters():
                param.add_(1)
        optimizer.train()
        found = get_peft_model_state_dict(twin)["prompt_embeddings"]
        optimizer.eval()
        assert torch.equal(found, twin.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize("kind", KEPT)
def test_round_trips(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained(KEPT[kind])
    model.save_pretrained(tmp_path)
    trained_posterior = optimizer.posterior(model)
    assert list(trained_posterior) == ["prompt_embeddings"]
    trained_posterior.save(tmp_path)
    posterior = Posterior.load(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert list(posterior.parameters_of(loaded)) == ["prompt_embeddings"]
    score = next_token([3, 5, 7])
    expected = trained_posterior.predict(model, BATCH, samples=3, score=score)
    assert expected.mutual_information.max() > 0
    found = posterior.predict(loaded, BATCH, samples=3, score=score)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert torch.equal(saved(posterior.sample_adapter(2)), posterior.draw(2)["prompt_embeddings"])


def test_a_sample_beside_the_posterior(tmp_path: Path) -> None:
    """Without save_mean PEFT saves what the weights hold."""
    model, optimizer = trained(KEPT["prompt"])
    optimizer.train()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"prompt_embeddings in .* is not the mean"):
        optimizer.posterior(model).save(tmp_path)
    optimizer.eval()


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_function_of_the_weights(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained(COMPUTED[kind])
    posterior = optimizer.posterior(model)
    assert posterior.predict(model, BATCH, samples=2, score=next_token([3, 5])).mutual_information.max() > 0
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks the adapter's weight 'prompt_encoder.default.*computed from it \(prompt_embeddings\)"
    ):
        posterior.save(tmp_path)


def test_multitask_prompts_keep_their_names() -> None:
    config = MultitaskPromptTuningConfig(**OPTIONS, num_tasks=2)
    model = get_peft_model(llama(), config)
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.1, ess=100.0)
    names = set(optimizer.posterior(model))
    assert names == set(get_peft_model_state_dict(model))
