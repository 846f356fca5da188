"""Posteriors that were trained for two steps, and what makes two of them equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivon_kernels import IVON
from ivon_kernels.posterior import Posterior
from tests.support.tiny_llm import IVON_OPTIONS, lora_llama

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def trained(model: nn.Module, **options: Any) -> tuple[IVON, Posterior]:
    """A posterior that two steps have moved, in two parameter groups."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": params[:1]}, {"params": params[1:], "ess": 0.1 + 1e6, "weight_decay": 1e-7}]
    optimizer = IVON(groups, **{**IVON_OPTIONS, **options})
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            output = model(input_ids=TOKENS) if hasattr(model, "config") else model(TOKENS.float())
            getattr(output, "logits", output).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, optimizer.posterior(model)


def assert_equal(left: Posterior, right: Posterior) -> None:
    assert list(left) == list(right)
    assert left.seed == right.seed
    for name, one in left.items():
        other = right[name]
        assert (one.index, one.ess, one.weight_decay) == (other.index, other.ess, other.weight_decay)
        assert one.mean.dtype == other.mean.dtype
        assert one.mean.equal(other.mean)
        assert one.hess.equal(other.hess)
        assert one.variance.equal(other.variance)


def save_lora(folder: Path) -> Posterior:
    """A trained adapter with its posterior in a folder."""
    model = lora_llama()
    _, posterior = trained(model)
    model.save_pretrained(folder)
    posterior.save(folder)
    return posterior
