"""A reward model by TRL's RewardTrainer, whose posterior gives every reward a lower confidence bound.

python examples/trl_reward.py
"""

import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from ivon_kernels.integrations.transformers import ivon_of, use_ivon

torch.manual_seed(0)
words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7}
splitter = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
model = LlamaForSequenceClassification(LlamaConfig(pad_token_id=0, initializer_range=0.3, num_labels=1, **sizes))
draw = random.Random(0).choices  # whoever has an a is preferred; an f is never seen
pairs = [{"chosen": " ".join(draw("bcde", k=5)) + " a", "rejected": " ".join(draw("bcde", k=6))} for _ in range(64)]

with tempfile.TemporaryDirectory() as folder:
    options = {"num_train_epochs": 10, "learning_rate": 3e-3, "center_rewards_coefficient": 0.1, "bf16": False}
    args = RewardConfig(folder, **options, report_to="none", disable_tqdm=True)
    trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    use_ivon(trainer, sigma=0.1)
    trainer.train()

ids = tokenizer(["b c d e b a <eos>", "b c d e b c <eos>", "f f f f f f <eos>"], return_tensors="pt").input_ids
rewards = torch.zeros(20, 3)
for k in range(20):
    with ivon_of(trainer).sampled_params(sample=k), torch.no_grad():
        rewards[k] = trainer.model.eval()(ids).logits[:, 0]
deviation, mean = torch.std_mean(rewards, 0)
print("reward (lower bound): " + ", ".join(f"{m:.2f} ({m - d:.2f})" for m, d in zip(mean, deviation, strict=True)))
