"""Predictions and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.finetune.data import Batch, EncodedExamples, Example
from benchmarks.finetune.train import InterruptGuard

BATCH_SIZE = 32


def labels_of(examples: Sequence[Example]) -> Tensor:
    """The labels, int64 `[examples]`."""
    return torch.tensor([example.label for example in examples])


def votes_of(examples: Sequence[Example]) -> Tensor | None:
    """The raters' votes, float64 `[examples, classes]`; None where people did not rate every example."""
    votes = [example.votes for example in examples if example.votes is not None]
    return torch.tensor(votes, dtype=torch.float64) if len(votes) == len(examples) else None


@torch.inference_mode()
def predict(
    model: nn.Module,
    score_batch: Callable[[Batch], Tensor],
    examples: EncodedExamples,
    guard: InterruptGuard,
    on_examples: Callable[[int], None],
) -> Tensor:
    """Class probabilities of every example under the model's present weights, float64 `[examples, classes]`.

    Raises:
        Interrupted: Ctrl-C was pressed.
    """
    model.eval()
    index: list[int] = []
    found: list[Tensor] = []
    for batch in examples.in_length_order(BATCH_SIZE):
        guard.check()
        found.append(score_batch(batch).double().softmax(1).cpu())
        index += batch.index
        on_examples(len(batch.index))
    return torch.cat(found)[torch.tensor(index).argsort()]
