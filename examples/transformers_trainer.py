"""LoRA finetuning by Hugging Face's Trainer: AdamW's script plus the line with use_ivon. Prints how the loss fell.

python examples/transformers_trainer.py
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ivon_kernels.integrations.transformers import use_ivon

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=16, initializer_range=0.3, **sizes)
model = LlamaForCausalLM(config)  # a pretrained model here
model = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear"))
rows = [[(start + i) % 16 for i in range(8)] for start in range(16)]
data = [{"input_ids": row, "labels": row} for row in rows]

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        num_train_epochs=40,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,  # as for AdamW; large, because the model is tiny
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,  # adapters are saved at the mean
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    use_ivon(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss {before:.2f} -> {trainer.evaluate()['eval_loss']:.2f}")
