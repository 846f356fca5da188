"""QLoRA: the base model in 4 bits (bitsandbytes), LoRA adapters trained by IVON; the saved adapter is the mean."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ivon_kernels import IVON

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
with tempfile.TemporaryDirectory() as folder:  # stands for the name of a pretrained model
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    config.initializer_range = 0.2
    LlamaForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map=device)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    tokens = torch.arange(16, device=device)[None]  # text to learn by heart
    # Frozen parameters are left alone.
    optimizer = IVON.for_lora(model.parameters(), num_data=1000, learning_rate=5e-3, steps=40)
    for _ in range(40):
        optimizer.train()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
print(f"loss {loss.item():.3f}")
