"""Trained adapters of any kind on the Llama of :mod:`tests.support.tiny_llm`."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model

from ivon_kernels import IVON
from tests.support.tiny_llm import llama

__all__ = ["BATCH", "trained"]

_IDS = torch.randint(2, 32, (4, 6), generator=torch.Generator().manual_seed(5))
_IDS[:, 2] = 3
BATCH: dict[str, torch.Tensor] = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS)}


def trained(config: Any, *, tied: bool = False, steps: int = 2) -> tuple[PeftModel, IVON]:
    """The model in eval mode with an adapter that was trained for a few steps, and its optimizer, at the mean."""
    base = llama()
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    torch.manual_seed(7)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.01, ess=100.0, seed=1)
    for _ in range(steps):
        optimizer.train()
        model(**BATCH, labels=_IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    return model.eval(), optimizer
