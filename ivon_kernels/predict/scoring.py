"""How class logits are read off a model: what :func:`~ivon_kernels.posterior.predict` calls for every batch."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Score = Callable[[nn.Module, Any], Tensor]
"""``score(model, batch) -> logits [rows, classes]``, for a batch on the model's device, without labels."""


def class_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits of a classification model: its output ``[rows, classes]``, or the ``logits`` of its output.

    Args:
        model: Called with the batch: a mapping as keyword arguments, anything else as one argument.
        batch: Inputs without labels.

    Raises:
        ValueError: If the output is not of that shape.
    """
    logits = _logits(model(**batch) if isinstance(batch, Mapping) else model(batch))
    if logits.dim() == 2:
        return logits
    advice = "give predict() a function as score"
    if logits.dim() == 3:
        advice = "for a causal language model give predict() score=next_token(...) or score=choices(...)"
    raise ValueError(f"the model's logits have the shape {list(logits.shape)}, not [rows, classes]: {advice}")


def next_token(choices: Sequence[int] | None = None) -> Score:
    """The score of a causal language model whose answer is the token after the prompt.

    The batch is a mapping with ``input_ids [rows, T]`` and, where there is padding on either side, the
    ``attention_mask [rows, T]``. Logits are computed at the prompts' last tokens alone where the model can do that.

    Args:
        choices: The tokens that answer; class ``i`` is ``choices[i]``. None takes the whole vocabulary.

    Raises:
        ValueError: If there are fewer than two choices, one twice, or something else than token ids.
    """
    try:
        tokens = None if choices is None else [operator.index(token) for token in choices]
    except TypeError:
        raise ValueError(
            f"choices must be token ids, got {choices!r}: take tokenizer(text, add_special_tokens=False).input_ids, "
            "or score=choices() with encode_choices() for answers of any length"
        ) from None
    if tokens is not None and (len(tokens) < 2 or len(set(tokens)) < len(tokens) or min(tokens) < 0):
        raise ValueError(f"choices must be at least two different token ids, got {tokens}")

    def score(model: nn.Module, batch: Any) -> Tensor:
        ids = _input_ids(batch, "next_token", 2)
        length = ids.shape[1]
        mask = batch.get("attention_mask")
        last = torch.full((len(ids),), length - 1, dtype=torch.int64, device=ids.device)
        if mask is not None:
            last = last - mask.flip(1).bool().int().argmax(1)
        positions, place = last.unique(return_inverse=True)
        # As a number it counts from the end, as a tensor it indexes: prompts that are padded on the right end anywhere.
        keep = 1 if positions.tolist() == [length - 1] else positions
        options = _options(model, batch, logits_to_keep=keep)
        logits = _logits(model(**batch, **options))
        each = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        logits = logits[each, place if "logits_to_keep" in options else last]
        if tokens is None:
            return logits
        if max(tokens) >= logits.shape[1]:
            raise ValueError(f"token {max(tokens)} is outside the model's vocabulary of {logits.shape[1]}")
        return logits[:, tokens]

    return score


def choices(*, normalize: bool = False) -> Score:
    """The score of a causal language model that chooses between answers of any length.

    The logit of an answer is its log-likelihood after the prompt, ``sum_t log p(answer_t | prompt, answer_<t)``. The
    batch, as :func:`encode_choices` makes it, is a mapping with ``input_ids [rows, C, T]``, ``attention_mask`` and
    ``answer_mask`` of that shape: which tokens are the answer's. An answer without tokens gets probability 0, so that
    rows may have fewer than ``C`` answers. A pass runs ``rows * C`` sequences, and computes the logits of the whole
    vocabulary from the first answer token on: mind ``max_rows`` of ``predict``.

    Args:
        normalize: Average the log-likelihood over the answer's tokens instead, lest longer answers lose by length.
    """

    def score(model: nn.Module, batch: Any) -> Tensor:
        ids = _input_ids(batch, "choices", 3)
        rows, count, _ = ids.shape
        if "answer_mask" not in batch:
            raise ValueError("choices() needs answer_mask [rows, C, T] in the batch: encode_choices makes it")
        answer = batch["answer_mask"].bool().flatten(0, 1)
        flat = {name: value.flatten(0, 1) for name, value in batch.items() if name != "answer_mask"}
        start = int(answer.any(0).int().argmax())  # of the first answer token in the batch
        if start == 0:
            raise ValueError("choices() needs a prompt token before every answer, and a token in some answer")
        likelihoods = token_likelihoods(model, flat, start)
        answer = answer[:, start:]
        total, number = likelihoods.masked_fill(~answer, 0).sum(1), answer.sum(1)
        if normalize:
            total = total / number.clamp(min=1)
        return total.masked_fill(number == 0, -torch.inf).view(rows, count)

    return score


def token_likelihoods(model: nn.Module, batch: Mapping[str, Any], start: int) -> Tensor:
    """``log p(token | those before it)`` of a causal language model, float32 ``[rows, T - start]``.

    Args:
        model: Runs once.
        batch: ``input_ids [rows, T]`` and, where there is padding on either side, ``attention_mask``.
        start: The first token that is asked for, at least 1.
    """
    tokens = batch["input_ids"][:, start:, None]
    kept = tokens.shape[1] + 1  # the token before predicts it
    options = _options(model, batch, logits_to_keep=kept)
    logits = _logits(model(**batch, **options))[:, -kept:-1].float()
    return logits.gather(2, tokens).squeeze(2) - logits.logsumexp(2)


def encode_choices(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[str]],
    labels: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """Tokens of prompts, each with each of its answers, for :func:`choices`.

    An answer's tokens are those after the beginning that a prompt's own tokens and its tokens with every answer share:
    a tokenizer may merge the end of the prompt with an answer.

    Args:
        tokenizer: Of transformers.
        prompts: ``N`` texts.
        answers: Texts that are put behind the prompts as they are (mind the space): the same for every prompt, or a
            sequence of them for each.
        labels: The number of the right answer of each prompt.

    Returns:
        ``input_ids``, ``attention_mask`` and ``answer_mask``, int64 and bool ``[N, C, T]``, padded on the right; a
        prompt with fewer than ``C`` answers has empty ones. ``labels``, int64 ``[N]``, where given.

    Raises:
        ValueError: If a prompt has fewer than two answers, or an answer adds no token.
    """
    if all(isinstance(answer, str) for answer in answers):
        answers = [cast("Sequence[str]", answers)] * len(prompts)
    each = [list(texts) for texts in answers]
    if isinstance(prompts, str) or not prompts or len(each) != len(prompts) or min(map(len, each)) < 2:
        raise ValueError("encode_choices() needs a list of prompts, and at least two answers for each of them")
    encoded = [_encode_one(tokenizer, prompt, texts) for prompt, texts in zip(prompts, each, strict=True)]
    count, length = max(map(len, each)), max(len(ids) for rows, _ in encoded for ids in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    shape = len(prompts), count, length
    ids = torch.full(shape, pad, dtype=torch.int64, device="cpu")
    mask = torch.zeros(shape, dtype=torch.int64, device="cpu")
    answer_mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    for i, (rows, start) in enumerate(encoded):
        for j in range(count):
            tokens = rows[min(j, len(rows) - 1)]
            ids[i, j, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
            mask[i, j, : len(tokens)] = 1
            answer_mask[i, j, start : len(tokens)] = j < len(rows)
    batch = {"input_ids": ids, "attention_mask": mask, "answer_mask": answer_mask}
    return batch if labels is None else {**batch, "labels": torch.as_tensor(labels, dtype=torch.int64, device="cpu")}


def _encode_one(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[list[list[int]], int]:
    """Tokens of the prompt with each answer, and where the answers begin."""
    alone: list[int] = tokenizer(prompt)["input_ids"]
    rows: list[list[int]] = [tokenizer(prompt + answer)["input_ids"] for answer in answers]
    start = 0
    for column in zip(alone, *rows, strict=False):
        if len(set(column)) > 1:
            break
        start += 1
    for answer, row in zip(answers, rows, strict=True):
        if len(row) == start or start == 0:
            what = "adds no token to" if start else "leaves nothing in common with"
            raise ValueError(f"the answer {answer!r} {what} the prompt {prompt!r}")
    return rows, start


def _input_ids(batch: Any, name: str, dims: int) -> Tensor:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != dims:
        shape = "[rows, T]" if dims == 2 else "[rows, C, T]"
        got = f"of shape {list(ids.shape)}" if isinstance(ids, Tensor) else f"in a {type(batch).__name__}"
        raise ValueError(f"{name}() needs a dict with input_ids {shape}, got input_ids {got}")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"{name}() needs an attention_mask of the shape {list(ids.shape)}, got {list(mask.shape)}")
    return ids


def _options(model: nn.Module, batch: Mapping[str, Any], **wanted: Any) -> dict[str, Any]:
    """Of what would help, the arguments that the model has: no cache, fewer logits, positions that skip the padding."""
    wanted["use_cache"] = False  # nothing is read after this pass, and a cache would hold keys and values of all layers
    mask = batch.get("attention_mask")
    if mask is not None and not mask[:, 0].all():  # padded on the left
        wanted["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {name: value for name, value in accepted(model, **wanted).items() if name not in batch}


def accepted(model: nn.Module, **wanted: Any) -> dict[str, Any]:
    """Those of the arguments that the model's forward has by name."""
    get_base_model = getattr(model, "get_base_model", None)  # PEFT's own takes anything
    base: Any = model if get_base_model is None else get_base_model()
    known = inspect.signature(base.forward).parameters
    return {name: value for name, value in wanted.items() if name in known}


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__} without logits: give predict() a function as score"
        )
    return logits
