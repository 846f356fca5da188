"""Models with a posterior, small enough to be predicted with in a millisecond."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.posterior import Posterior
from tests.support.tiny_llm import IVON_OPTIONS, lora_llama

# Logits are sums of a few dozen float32 products of size 1, in an order that stacking, padding and threads change: they
# differ by less than 50 * 2^-24 * their size (below 10), and a probability by at most half as much.
ROUNDING = 2e-5


class Trained(NamedTuple):
    """A model, the optimizer that trained it, and what they learned."""

    model: Any
    optimizer: IVON
    posterior: Posterior


def train(model: nn.Module, batch: dict[str, Tensor]) -> Trained:
    """Three steps on the loss that the model computes of a batch."""
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(model.eval(), optimizer, optimizer.posterior(model))


def trained_llama() -> Trained:
    """`lora_llama`; its samples differ by some tenths in the probability of a token."""
    ids = tokens(4, 6)
    return train(lora_llama(), {"input_ids": ids, "labels": ids})


def speaking_llama(end: int | None) -> Trained:
    """`trained_llama` that pads with 0 and ends a text with the token `end`, or never."""
    trained = trained_llama()
    trained.model.generation_config.pad_token_id = 0
    trained.model.generation_config.eos_token_id = end
    return trained


def tokens(rows: int, length: int, seed: int = 4) -> Tensor:
    """Random letters of the tiny tokenizer."""
    return torch.randint(3, 29, (rows, length), generator=torch.Generator().manual_seed(seed))


class Classifier(nn.Module):
    """Four numbers in, three classes out; the output is the logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.drop, self.out = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)
        for param in self.parameters():
            nn.init.normal_(param, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.hidden(x).tanh()))


def trained_classifier() -> Trained:
    """Every weight of a `Classifier` has a posterior."""
    model = Classifier()
    optimizer = IVON(model.parameters(), **IVON_OPTIONS)
    x, y = features(6)
    with optimizer.sampled_params(train=True):
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return Trained(model.eval(), optimizer, optimizer.posterior(model))


def features(rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes for a `Classifier`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)
