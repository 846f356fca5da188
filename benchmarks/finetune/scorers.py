"""Class logits of prompts: those of label words after them, or the likelihoods of the answers' own words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks import UserError
from benchmarks.finetune.data import Batch, Example
from benchmarks.finetune.tasks import Task

BLOCK = 1024  # tokens whose logits over the vocabulary are in memory at once


class Scorer(ABC):
    """What a model, read as a classifier, says of prompts."""

    @abstractmethod
    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Float32 logits `[rows, classes]` of what a :class:`Batch` has under these names."""

    def __call__(self, batch: Batch) -> Tensor:
        """Float32 logits `[batch, classes]`."""
        return self.logits(batch.input_ids, batch.last)

    def score(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The `score` of a posterior's predictions, for the ``inputs`` of batches; `model` is the scorer's own."""
        return self.logits(**inputs)


class LabelScorer(Scorer):
    """Computes the logits of the label words that may follow a prompt.

    The vocabulary has tens of thousands of rows, the label words are a handful: where it gives the same logits, only
    their rows of the output layer are computed, and only at the last token. Models that do more after the output layer
    (soft caps, scales) are run whole.
    """

    def __init__(self, model: peft.PeftModel, tokenizer: Any, label_words: tuple[str, ...], suffix: str) -> None:
        """Finds the label words' tokens as they come after `suffix`, the end of a prompt."""
        self.model = model
        self.label_ids = _label_ids(tokenizer, label_words, suffix)
        self._direct = self._direct_agrees(tokenizer(suffix, return_tensors="pt")["input_ids"])

    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Float32 logits `[rows, classes]` of right-padded prompts `[rows, tokens]` that end at `last` `[rows]`."""
        return (self._label_rows if self._direct else self._whole_model)(input_ids, last)

    def _whole_model(self, input_ids: Tensor, last: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits[torch.arange(len(last), device=last.device), last][:, self.label_ids].float()

    def _label_rows(self, input_ids: Tensor, last: Tensor) -> Tensor:
        model: Any = self.model.get_base_model()
        head = model.get_output_embeddings()
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(last), device=last.device), last]
        bias = None if head.bias is None else head.bias[self.label_ids]
        return nn.functional.linear(hidden, head.weight[self.label_ids], bias).float()

    @torch.no_grad()
    def _direct_agrees(self, input_ids: Tensor) -> bool:
        base: Any = self.model.get_base_model()
        if type(base.get_output_embeddings()) is not nn.Linear:
            return False
        self.model.eval()
        input_ids = input_ids.to(self.model.device)
        last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
        found, wanted = self._label_rows(input_ids, last), self._whole_model(input_ids, last)
        return torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)


class AnswerScorer(Scorer):
    """The mean log-likelihood of every answer's tokens after the question, in nats: all answers in one pass.

    A row of a batch holds the question once, and behind it the answers, which do not see each other: each one's
    positions go on from the question's end. That takes a third of the tokens that a row for every answer takes.
    """

    def __init__(self, model: peft.PeftModel, classes: int) -> None:
        self.model, self.classes = model, classes

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


def scorer_of(task: Task, model: peft.PeftModel, tokenizer: Any, example: Example) -> Scorer:
    """Class logits as the task's examples have them, of which one is given."""
    if example.answers:
        return AnswerScorer(model, len(example.answers))
    end = example.prompt.split()[-1]  # that of every prompt
    return LabelScorer(model, tokenizer, task.label_words, end)


def _label_ids(tokenizer: Any, label_words: tuple[str, ...], suffix: str) -> list[int]:
    prefix = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    ids = []
    for word in label_words:
        tokens = tokenizer(suffix + word, add_special_tokens=False)["input_ids"]
        if tokens[: len(prefix)] != prefix or len(tokens) == len(prefix):
            raise UserError(f"This model's tokenizer does not keep the label word '{word}' apart from the prompt.")
        ids.append(tokens[len(prefix)])
    if len(set(ids)) < len(ids):
        raise UserError(f"This model's tokenizer gives two of the label words {label_words} the same first token.")
    return ids
