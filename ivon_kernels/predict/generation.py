"""Text from a posterior: each sequence under one sample, or each token from the average over the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ivon_kernels.extras import HF, needed_for
from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.predict.batches import sample_numbers, to_device
from ivon_kernels.predict.passes import Sampler, device_of, evaluating
from ivon_kernels.predict.scoring import accepted

__all__ = ["AveragedGeneration", "generate", "generate_averaged"]

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""``processor(input_ids [B, T], scores [B, V]) -> scores``, as in transformers."""


def generate(
    posterior: Gaussians,
    model: nn.Module,
    inputs: Any,
    *,
    samples: int | Sequence[int] = 10,
    options: Mapping[str, Any] | None = None,
    stacked: bool | None = None,
    max_rows: int = 128,
    device: torch.device | str | None = None,
    adapter: str | None = None,
    **keywords: Any,
) -> Tensor:
    """Generate sequences by ``model.generate``, each under one sample of the posterior from first to last token.

    Where tokens are drawn (``do_sample``), they come from torch's global generator, in the order of the passes.

    Args:
        posterior: Where the samples come from.
        model: A model of transformers, perhaps wrapped by PEFT.
        inputs: ``input_ids [B, T]``, or a mapping with these and what else ``generate`` takes (``attention_mask``).
        samples: How many, or their numbers; 0 generates at the mean.
        options: Keyword arguments of ``model.generate`` as a mapping, for those that have a name of this list.
        stacked: Whether several samples share a pass; None: in LoRA models that allow it.
        max_rows: The most rows of a call that several samples share.
        device: Where the inputs go; None is where the model's first parameter is.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.
        **keywords: Keyword arguments of ``model.generate``: ``max_new_tokens=20, do_sample=True``.

    Returns:
        int64 ``[S, B, T']``: prompt and continuation as ``generate`` returns them, shorter ones padded at the end. At
        the mean ``S`` is 1.

    Raises:
        ValueError, TypeError: For inputs or options that do not fit.
    """
    numbers = sample_numbers(samples)
    batch, rows = _prompts(inputs, device_of(model) if device is None else torch.device(device))
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of generate()'s keyword arguments, got {type(options).__name__}")
    chosen = dict(options or {})
    if twice := chosen.keys() & keywords.keys():
        raise TypeError(f"generate() got {', '.join(sorted(twice))} twice: in options and as a keyword")
    if taken := ((chosen.keys() | keywords.keys()) & batch.keys()):
        raise TypeError(f"generate() got {', '.join(sorted(taken))} twice: in the inputs and as a keyword")
    chosen |= keywords

    def passes() -> list[Tensor]:
        sequences: list[Tensor] = []
        for passed in sampler.passes(numbers, rows):
            output = model.generate(**passed.repeat(batch), **chosen)  # type: ignore[operator]
            if not isinstance(output, Tensor):
                raise ValueError("generate() returns sequences alone: leave return_dict_in_generate out of the options")
            # Beams and returned sequences of a prompt lie beside each other, so that a sample's rows stay together.
            sequences += output.chunk(passed.samples)
        return sequences

    sampler = Sampler(posterior, model, adapter=adapter, stacked=stacked, max_rows=max_rows)
    with evaluating(model), torch.no_grad(), sampler:
        sequences = sampler.attempt(passes)
    length = max(part.shape[1] for part in sequences)
    _, pad = special_tokens(model, chosen.get("eos_token_id"), chosen.get("pad_token_id"))
    padded = [nn.functional.pad(part, (0, length - part.shape[1]), value=pad) for part in sequences]
    return torch.stack(padded)


@dataclass(frozen=True)
class AveragedGeneration:
    """Sequences whose tokens come from the average over samples, and how sure the model was of each token.

    Attributes:
        sequences: int64 ``[B, T + new]``: prompts and continuations, padded after their end.
        entropy: Of the averaged distribution that each new token was chosen from, before temperature, top-k and the
            like, in nats; float32 ``[B, new]``, nan after the end.
        mutual_information: The part of it that the samples disagree about, as in
            :class:`~ivon_kernels.posterior.Prediction`; float32 ``[B, new]``, nan after the end.
    """

    sequences: Tensor
    entropy: Tensor
    mutual_information: Tensor


@dataclass(frozen=True)
class _Choice:
    """How a token is chosen from a distribution."""

    do_sample: bool
    processors: list[LogitsProcessor]
    generator: torch.Generator | None

    def __call__(self, input_ids: Tensor, log_probabilities: Tensor) -> Tensor:
        scores = log_probabilities
        for processor in self.processors:
            scores = processor(input_ids, scores)
        if not self.do_sample:
            return scores.argmax(1)
        return torch.multinomial(scores.softmax(1), 1, generator=self.generator).squeeze(1)


def generate_averaged(
    posterior: Gaussians,
    model: nn.Module,
    inputs: Any,
    *,
    max_new_tokens: int,
    samples: int | Sequence[int] = 10,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    processors: Sequence[LogitsProcessor] = (),
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    stacked: bool | None = None,
    max_rows: int | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
) -> AveragedGeneration:
    """Generate one sequence for each prompt, each token from ``p(token) = mean_s p_s(token | prompt, tokens so far)``.

    All samples read the same sequence, each with a key-value cache of its own. A loop of its own calls the model:
    transformers' ``generate`` draws a token for every row alone, so that the rows of one prompt under several samples
    would part, and it applies temperature and top-p to each row before they could be averaged.

    Args:
        posterior: Where the samples come from.
        model: A decoder-only language model of transformers, perhaps wrapped by PEFT.
        inputs: ``input_ids [B, T]``, or a mapping with these and an ``attention_mask``; padded on the left.
        max_new_tokens: Where a sequence ends at the latest.
        samples: How many, or their numbers; 0 generates at the mean.
        do_sample: Draw the tokens; otherwise the most probable one is taken.
        temperature: Divides the averaged log-probabilities, with `do_sample`.
        top_k: Keep that many tokens, with `do_sample`.
        top_p: Keep the most probable tokens that have this probability together, with `do_sample`.
        processors: Applied to the averaged log-probabilities first, such as a LogitsProcessor of transformers.
        eos_token_id: Ends a sequence; None is that of the model's generation config.
        pad_token_id: Comes after the end; None is that of the generation config, or the first `eos_token_id`.
        generator: Draws the tokens; None is torch's global one.
        stacked: Whether several samples share a pass; None: in LoRA models that allow it.
        max_rows: The most rows of a pass that several samples share. None puts all samples into one.
        device: Where the inputs go; None is where the model's first parameter is.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.

    Raises:
        ValueError, TypeError: For inputs, options or a model that do not fit.
    """
    numbers = sample_numbers(samples)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("generate_averaged() is for decoder-only models; generate() takes encoder-decoder ones too")
    batch, _ = _prompts(inputs, device_of(model) if device is None else torch.device(device))
    if unknown := batch.keys() - {"input_ids", "attention_mask"}:
        raise ValueError(f"generate_averaged() takes input_ids and attention_mask, got {sorted(unknown)} too")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if not mask[:, -1].all():
        raise ValueError("prompts must be padded on the left: tokenizer(..., padding_side='left')")
    choose = _Choice(do_sample, [*processors, *_warpers(do_sample, temperature, top_k, top_p)], generator)
    ends, pad = special_tokens(model, eos_token_id, pad_token_id)
    sampler = Sampler(posterior, model, adapter=adapter, stacked=stacked, max_rows=max_rows)
    with evaluating(model), torch.no_grad(), sampler:
        return sampler.attempt(
            lambda: _decode(_Readers(sampler, numbers, mask), choose, ids, max_new_tokens, ends, pad)
        )


class _Readers:
    """The model under every sample, each with its key-value cache of the sequences so far.

    Args:
        sampler: Puts the samples into the model.
        numbers: The samples.
        mask: Which of the prompts' tokens are none, ``[B, T]``.
    """

    def __init__(self, sampler: Sampler, numbers: tuple[int, ...], mask: Tensor) -> None:
        self._sampler, self._numbers = sampler, numbers
        self._mask = mask
        # By the number of the pass: every read has the same passes in the same order, each with its samples' rows. A
        # cache cannot be shared between samples, whose keys and values of the same tokens differ.
        self._caches: dict[int, Any] = {}

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read the next tokens ``[B, t]``: first the prompts, then one token for each.

        Returns:
            The average over the samples of the distribution of the token after them, as log-probabilities, float32
            ``[B, V]``; and the average of its entropy, float32 ``[B]``.
        """
        if self._caches:  # the mask covers what the caches hold, too
            self._mask = torch.cat([self._mask, torch.ones_like(tokens)], 1)
        # A model counts positions from the start of a row, which is padding; generate() corrects that, as here.
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": self._mask}
        inputs |= accepted(self._sampler.model, position_ids=positions)
        log_p, entropy = [], []
        for number, passed in enumerate(self._sampler.passes(self._numbers, len(tokens))):
            part = self._run(number, passed.repeat(inputs)).log_softmax(1).unflatten(0, (passed.samples, len(tokens)))
            log_p.append(part)
            entropy.append(torch.special.entr(part.exp()).sum(2))
        every = torch.cat(log_p)
        return every.logsumexp(0) - math.log(len(every)), torch.cat(entropy).mean(0)

    def _run(self, number: int, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of the next token, float32 ``[samples * B, V]``."""
        model = self._sampler.model
        options = accepted(model, logits_to_keep=1)
        output = model(**inputs, **options, past_key_values=self._caches.get(number), use_cache=True)
        # Read again from the output: some models make the cache themselves, and state-space models have none.
        self._caches[number] = getattr(output, "past_key_values", None)
        if self._caches[number] is None:
            raise ValueError(f"generate_averaged() needs a decoder with a key-value cache, got {type(model).__name__}")
        logits: Tensor = output.logits[:, -1].float()
        return logits


def _decode(
    readers: _Readers, choose: _Choice, ids: Tensor, max_new_tokens: int, ends: Sequence[int], pad: int
) -> AveragedGeneration:
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    stops = torch.tensor(list(ends), dtype=torch.int64, device=ids.device)
    entropies: list[Tensor] = []
    mutual: list[Tensor] = []
    unread = ids
    while len(entropies) < max_new_tokens and running.any():
        log_p, expected = readers.read(unread)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        entropies.append(entropy.masked_fill(~running, math.nan))
        mutual.append((entropy - expected).clamp(min=0).masked_fill(~running, math.nan))
        unread = choose(ids, log_p).masked_fill(~running, pad)[:, None]
        ids = torch.cat([ids, unread], 1)
        running = running & ~torch.isin(unread[:, 0], stops)
    return AveragedGeneration(ids, torch.stack(entropies, 1), torch.stack(mutual, 1))


def _prompts(inputs: Any, device: torch.device) -> tuple[dict[str, Any], int]:
    """The arguments of ``generate``, on the device, and how many prompts they are."""
    batch = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        got = list(ids.shape) if isinstance(ids, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs must be input_ids [B, T], or a mapping with them, got {got}")
    return to_device(batch, device), len(ids)


def special_tokens(
    model: nn.Module, eos: int | Sequence[int] | None = None, pad: int | None = None
) -> tuple[tuple[int, ...], int]:
    """The tokens that end a sequence, and the one that fills up after the end; from the model where not given."""
    config: Any = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return ends, pad if pad is not None else ends[0] if ends else 0


def _warpers(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None) -> list[LogitsProcessor]:
    """What transformers' ``generate`` does to scores before it draws from them, in its order."""
    if not do_sample:
        if temperature != 1.0 or top_k is not None or top_p is not None:
            raise ValueError("temperature, top_k and top_p need do_sample=True")
        return []
    with needed_for("do_sample=True", HF):
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[LogitsProcessor] = []
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers
