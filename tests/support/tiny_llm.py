"""A Llama of a few hundred weights with LoRA, and data for it: enough to run the real trainers in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import use_ivon

IVON_OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "ess": 100.0,
    "hess_init": 0.5,
    "beta2": 0.9,
    "weight_decay": 0.01,
    "seed": 3,
}
"""Settings under which everything moves visibly within a few steps."""
QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
WORDS = ("<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz")


def llama() -> LlamaForCausalLM:
    """One layer, hidden size 16, the same weights every time."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def lora_config(dropout: float = 0.0) -> LoraConfig:
    """An adapter of four matrices on the attention."""
    return LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )


def lora_llama(dropout: float = 0.0) -> PeftModel:
    """`llama` with `lora_config`."""
    model = get_peft_model(llama(), lora_config(dropout))
    assert isinstance(model, PeftModel)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sequences(count: int = 12, length: int = 6) -> list[dict[str, list[int]]]:
    """Random tokens to be learned by heart."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, len(WORDS), (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """Four steps of two micro-batches of two sequences, in order, on the CPU; nothing is clipped, reported or saved."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(output_dir=str(folder), **{**QUIET, **defaults, **options})


def make_trainer(
    folder: str | Path, *, model: nn.Module | None = None, ivon: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    """A Trainer of `lora_llama` by `use_ivon`; `ivon` adds to its options, the rest are TrainingArguments."""
    data = sequences()
    model = lora_llama() if model is None else model
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data, eval_dataset=data[:4])
    use_ivon(trainer, **{**IVON_OPTIONS, **(ivon or {})})
    return trainer


def means(optimizer: IVON, model: nn.Module) -> dict[str, Tensor]:
    """The mean of each trained parameter, from the optimizer's state, by the parameter's name."""
    return {
        name: optimizer.state[param]["mean"].clone().to(param.dtype)
        for name, param in model.named_parameters()
        if param in optimizer.state
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What the trainable parameters hold, by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def saved_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The adapter in a folder, by the names that the parameters have in the model."""
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two sets of tensors are equal, bit for bit and name by name."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
