"""Supervised finetuning by TRL's SFTTrainer, which adds the LoRA adapter itself; then prediction by 10 samples.

python examples/trl_sft.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ivon_kernels.integrations.transformers import ivon_of, use_ivon

torch.manual_seed(0)
words = ["<pad>", "<eos>", "a", "b", "c", "d", "e", "f"]
splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=8, pad_token_id=0, eos_token_id=1, initializer_range=0.3, **sizes)
model = LlamaForCausalLM(config)  # a pretrained model here
data = Dataset.from_dict({"text": ["a b c d e f"] * 16})

with tempfile.TemporaryDirectory() as folder:
    quiet = {"report_to": "none", "disable_tqdm": True}
    args = SFTConfig(folder, max_steps=40, learning_rate=2e-2, max_grad_norm=0, bf16=False, **quiet)
    lora = LoraConfig(r=8, target_modules="all-linear")
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    use_ivon(trainer)
    trainer.train()

prompt = tokenizer("a b c", return_tensors="pt").input_ids
probabilities = torch.zeros(8)
for k in range(10):
    with ivon_of(trainer).sampled_params(sample=k), torch.no_grad():
        probabilities += trainer.model.eval()(input_ids=prompt).logits[0, -1].softmax(-1) / 10
print(f"a b c {words[probabilities.argmax()]} with probability {probabilities.max():.2f}")
