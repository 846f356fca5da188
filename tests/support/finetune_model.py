"""A language model small enough to finetune in a test: two Llama layers and a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.finetune.data import load_dataset
from benchmarks.finetune.tasks import TASKS


def save_tiny_model(folder: Path) -> Path:
    """Writes the model and its tokenizer to `folder`, which is returned."""
    sentences = load_dataset(TASKS["vader_nyt"], split="test", train_size=300, max_words=16).train
    words = sorted({word for e in sentences for word in e.prompt.split()} | {"a", "bad", "day", "good", "it", "the"})
    special = ["[UNK]", "[PAD]"]
    vocabulary = [*special, "negative", "neutral", "positive", *words]
    vocabulary = list(dict.fromkeys(vocabulary))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
