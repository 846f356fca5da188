"""Class logits that are the likelihoods of the answers' own words: a question and all of its answers in one pass."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.finetune.data import Batch

BLOCK = 1024  # tokens whose logits over the vocabulary are in memory at once


class AnswerScorer:
    """Computes the mean log-likelihood of every answer's tokens after the question, in nats.

    A row of a batch holds the question once, and behind it the answers, which do not see each other: each one's
    positions go on from the question's end. That takes a third of the tokens that a row for every answer takes.
    """

    def __init__(self, model: peft.PeftModel, classes: int) -> None:
        self.model, self.classes = model, classes

    def __call__(self, batch: Batch) -> Tensor:
        """Float32 logits `[batch, classes]`."""
        return self.logits(batch.input_ids, batch.last)

    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Float32 logits `[rows, classes]` of packed questions int64 `[rows, 2, tokens]`; `last` says nothing here.

        The first of two is the token, the second its part: 0 is the question, k > 0 the k-th answer, and -1 padding.
        """
        tokens, parts = input_ids.clamp_min(0).unbind(1)[0], input_ids[:, 1]
        model: Any = self.model.get_base_model()
        order = torch.arange(tokens.shape[1], device=tokens.device)
        question = (parts == 0).sum(1, keepdim=True)
        # An answer's tokens stand together: how many there are before one of them is how far it is from the first.
        same = parts[:, :, None] == parts[:, None, :]
        before = (same & (order < order[:, None])).sum(2)
        positions = torch.where(parts > 0, question + before, before)
        seen = (order <= order[:, None]) & (same | (parts == 0)[:, None, :])
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(seen.shape, device=seen.device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        hidden = model.base_model(
            input_ids=tokens, attention_mask=mask[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
        rows, places = (parts > 0).nonzero(as_tuple=True)
        previous = torch.where(before[rows, places] == 0, question[rows, 0] - 1, places - 1)
        found = self._log_likelihoods(model.get_output_embeddings(), hidden[rows, previous], tokens[rows, places])
        where = rows * self.classes + parts[rows, places] - 1
        sums = found.new_zeros(len(tokens) * self.classes).index_add(0, where, found)
        counts = found.new_zeros(len(sums)).index_add(0, where, torch.ones_like(found))
        return (sums / counts).view(-1, self.classes)

    def _log_likelihoods(self, head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        """Float32 `[tokens]` of the tokens `targets` after the hidden states `[tokens, width]`."""
        blocks = zip(hidden.split(BLOCK), targets.split(BLOCK), strict=True)
        found = [nn.functional.cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in blocks]
        return -torch.cat(found)
