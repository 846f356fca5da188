"""Predictions and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.finetune.data import Batch, EncodedExamples, Example
from benchmarks.finetune.train import InterruptGuard
from ivon_kernels.predict import metrics

BATCH_SIZE = 32


@dataclass(frozen=True)
class Scores:
    """The scores that a record holds; `ivon_kernels.predict.metrics.Scores` says what they are.

    `rater_kl` is the divergence from the raters' votes, where there are votes.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    rater_kl: float | None


def labels_of(examples: Sequence[Example]) -> Tensor:
    """The labels, int64 `[examples]`."""
    return torch.tensor([example.label for example in examples])


def votes_of(examples: Sequence[Example]) -> Tensor | None:
    """The raters' votes, float64 `[examples, classes]`; None where people did not rate every example."""
    votes = [example.votes for example in examples if example.votes is not None]
    return torch.tensor(votes, dtype=torch.float64) if len(votes) == len(examples) else None


def score(probabilities: Tensor, examples: Sequence[Example]) -> Scores:
    """Judges `probabilities`, float64 `[examples, classes]`."""
    found = metrics.evaluate(probabilities, labels_of(examples), votes_of(examples))
    return Scores(found.accuracy, found.nll, found.ece, found.brier, found.vote_kl)


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
