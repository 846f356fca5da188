"""The main job: LoRA finetuning of a language model with AdamW and with IVON, side by side."""
