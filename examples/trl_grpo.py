"""Reinforcement learning by TRL's GRPOTrainer: rollouts under a posterior sample that is replayed at their updates.

python examples/trl_grpo.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from ivon_kernels.integrations.transformers import use_ivon
from ivon_kernels.integrations.trl import attach_rollouts

torch.manual_seed(0)
words = ["<pad>", "<eos>", "a", "b", "c", "d", "e", "f"]
splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=8, pad_token_id=0, eos_token_id=1, initializer_range=0.3, **sizes)
model = LlamaForCausalLM(config)  # a pretrained model here
data = Dataset.from_dict({"prompt": ["b"] * 16})

with tempfile.TemporaryDirectory() as folder:
    sampling = {"num_generations": 8, "max_completion_length": 4, "num_iterations": 2}  # two updates on each rollout
    steps = {"max_steps": 20, "per_device_train_batch_size": 8, "logging_steps": 2, "max_grad_norm": 0}
    args = GRPOConfig(folder, **sampling, **steps, bf16=False, report_to="none", disable_tqdm=True)
    reward = lambda completions, **_: [text.split().count("a") / 4 for text in completions]  # noqa: E731
    trainer = GRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer)
    use_ivon(trainer, lr=1.0, ess=1e5, hess_init=0.1, clip_radius=0.3)
    attach_rollouts(trainer, "sample")  # or "mean"
    trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
