"""QLoRA: IVON trains adapters on a base that bitsandbytes keeps in 4 or 8 bits, and leaves the base alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ivon_kernels import IVON

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

pytestmark = [
    # What bitsandbytes says at every product of its 8-bit layers with float32.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    # Names that PEFT 0.21 uses and transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

KINDS = {4: Linear4bit, 8: Linear8bitLt}
OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 1e6, "hess_init": 0.1, "clip_radius": 1.0, "rescale_lr": False, "seed": 4}
TOKENS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    # At least a block of 64 wide: where processors know bfloat16, bitsandbytes packs 4-bit weights anew for inference.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.2, **sizes)).save_pretrained(
        path
    )
    return path


def quantized(llama: Path, bits: int) -> nn.Module:
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map="cpu")


@pytest.fixture(params=KINDS)
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def adapted(llama: Path, bits: int) -> PeftModel:
    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(
        quantized(llama, bits), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is KINDS[bits]
    return model


def train(model: nn.Module, optimizer: IVON, steps: int = 6) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.train()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, the quantization constants too."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("given", ["all parameters", "trainable parameters"])
def test_the_adapter_learns_and_the_base_stays(adapted: PeftModel, bits: int, given: str) -> None:
    before = everything(adapted)
    integers = torch.uint8 if bits == 4 else torch.int8
    assert sum(p.dtype == integers for p in adapted.parameters()) == 7
    params = [p for p in adapted.parameters() if p.requires_grad or given == "all parameters"]
    optimizer = IVON(params, **OPTIONS)
    assert set(optimizer.state) == {p for p in adapted.parameters() if p.requires_grad}
    losses = train(adapted, optimizer)
    after = everything(adapted)
    assert losses[-1] < losses[0]
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name, p in adapted.named_parameters() if p.requires_grad
    }


def test_the_saved_adapter_is_the_mean_and_loads(adapted: PeftModel, llama: Path, bits: int, tmp_path: Path) -> None:
    optimizer = IVON(adapted.parameters(), **OPTIONS)
    train(adapted, optimizer)
    adapted.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    means = {name: optimizer.state[p]["mean"] for name, p in adapted.named_parameters() if p.requires_grad}
    assert saved.keys() == {name.replace(".default", "") for name in means}
    assert all(torch.equal(saved[name.replace(".default", "")], mean) for name, mean in means.items())
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(quantized(llama, bits)), str(tmp_path))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=TOKENS).logits
        assert torch.equal(loaded.eval()(input_ids=TOKENS).logits, expected)


def test_resumed_equals_uninterrupted(adapted: PeftModel, bits: int) -> None:
    start = everything(adapted)
    optimizer = IVON(adapted.parameters(), **OPTIONS)
    train(adapted, optimizer, 3)
    weights = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    saved = optimizer.state_dict()
    copy = {"state": {k: {n: t.clone() for n, t in v.items()} for k, v in saved["state"].items()}}
    expected = train(adapted, optimizer, 3)
    adapted.load_state_dict({name: start[name] for name in weights}, strict=False)
    again = IVON(adapted.parameters(), **{**OPTIONS, "seed": 9})
    again.load_state_dict({**saved, **copy})
    assert all(torch.equal(p, weights[name]) for name, p in adapted.named_parameters() if p.requires_grad)
    assert train(adapted, again, 3) == expected
