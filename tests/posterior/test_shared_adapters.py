"""Weights that several layers share, under several names: tied ``modules_to_save``, VeRA, VB-LoRA, tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.posterior import Posterior, next_token
from tests.support.adapted_llama import BATCH, trained
from tests.support.tiny_llm import llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
    "ignore:.*tie_word_embeddings=True.*:UserWarning",
)
SCORE = next_token([3, 5, 7])
KINDS: dict[str, tuple[Any, bool]] = {
    "tied modules": (
        LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
        True,
    ),
    "vera": (VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=4), False),
    "vb-lora": (
        VBLoRAConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], num_vectors=8, vector_length=4, topk=2
        ),
        False,
    ),
    "tied tokens": (
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        True,
    ),
}


def base(tied: bool) -> nn.Module:
    model = llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**BATCH).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind: str, tmp_path: Path) -> None:
    config, tied = KINDS[kind]
    model, optimizer = trained(config, tied=tied)
    model.save_pretrained(tmp_path)
    optimizer.posterior(model).save(tmp_path)
    posterior = Posterior.load(tmp_path)
    loaded = PeftModel.from_pretrained(base(tied), tmp_path).eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    folder = posterior.sample_adapter(3)
    alone = PeftModel.from_pretrained(base(tied), folder).eval()
    with optimizer.sampled_params(sample=3):
        expected = logits(model)
    assert not torch.allclose(expected, logits(model), atol=1e-4)
    assert torch.allclose(logits(alone), expected, atol=1e-6)
    for other in (model, loaded):
        with posterior.sampled(other, 3):
            assert torch.allclose(logits(other), expected, atol=1e-6)
    one, many = (posterior.predict(loaded, BATCH, samples=3, score=SCORE, stacked=s) for s in (False, True))
    assert torch.allclose(one.probabilities, many.probabilities, atol=1e-6)


def test_aliases_in_a_file_of_a_tied_model(tmp_path: Path) -> None:
    """Whoever saved it may have kept one name, or both."""
    model = base(tied=True)
    posterior = IVON(model.parameters(), lr=0.1, ess=100.0, seed=2).posterior(model)
    assert posterior.origin.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    whole = {name: value.detach().clone() for name, value in model.state_dict().items()}
    drawn = posterior.draw(2)["model.embed_tokens.weight"]
    for left_out in (None, "lm_head.weight", "model.embed_tokens.weight"):
        folder = tmp_path / str(left_out)
        folder.mkdir()
        save_file({name: value for name, value in whole.items() if name != left_out}, folder / "model.safetensors")
        posterior.save(folder)
        sampled = load_file(Posterior.load(folder).sample_adapter(2) / "model.safetensors")
        names = {"lm_head.weight", "model.embed_tokens.weight"} - {left_out}
        assert all(torch.equal(sampled[name], drawn) for name in names)
    whole["lm_head.weight"] += 1
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight in .* is not the mean"):
        posterior.save(tmp_path)


def test_a_model_in_which_they_are_apart() -> None:
    """Tied in training: one weight has two places then, and its samples go into both."""
    model = base(tied=True)
    posterior = IVON(model.parameters(), lr=0.1, ess=100.0, seed=2).posterior(model)
    apart = llama()
    apart.load_state_dict(model.state_dict())
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    with posterior.sampled(model, 1):
        expected = logits(model.eval())
    before = apart.lm_head.weight.detach().clone()
    with posterior.sampled(apart, 1):
        assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight)
        assert torch.equal(logits(apart.eval()), expected)
    assert torch.equal(apart.lm_head.weight, before)
    one, many = (posterior.predict(apart, BATCH, samples=3, score=SCORE, stacked=s) for s in (False, True))
    assert torch.allclose(one.probabilities, many.probabilities, atol=1e-6)


def test_what_peft_saves_of_vb_lora_alone(tmp_path: Path) -> None:
    config = VBLoRAConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        num_vectors=8,
        vector_length=4,
        topk=2,
        save_only_topk_weights=True,
    )
    model, optimizer = trained(config)
    model.save_pretrained(tmp_path)
    posterior = optimizer.posterior(model)
    with posterior.sampled(model, 0):
        pass
    with pytest.raises(ValueError, match=r"lacks .*vblora_logits_[AB].*not saved: .*computed from it .*topk_indices"):
        posterior.save(tmp_path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_converted_adapters(tmp_path: Path) -> None:
    """PiSSA and its like become LoRA of twice the rank: matrices of other weights."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(llama(), config)
    start, converted, plain = (tmp_path / name for name in ("start", "converted", "plain"))
    config.init_lora_weights = True
    model.save_pretrained(start)
    config.init_lora_weights = "pissa"
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.01, ess=1000.0, seed=1)
    optimizer.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    posterior = optimizer.posterior(model)
    model.save_pretrained(plain)
    posterior.save(plain)
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=str(start))
    message = r"lora_A.weight in .* shape \(4, 16\), and \(2, 16\) in th.* a converted adapter cannot carry a posterior"
    with pytest.raises(ValueError, match=message):
        posterior.save(converted)
    alone = tmp_path / "alone"
    posterior.save(alone)
    (converted / "adapter_model.safetensors").rename(alone / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        Posterior.load(alone)
