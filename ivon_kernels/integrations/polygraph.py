"""What LM-Polygraph's estimators of uncertainty read, of texts that a posterior has generated.

LM-Polygraph (https://github.com/IINemo/lm-polygraph) splits its work: calculators run a model and leave statistics by
name, estimators turn these into one number a text. Here are the statistics of greedy and sampled generation, so that
estimators can be used with a posterior, and without the rest of that package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.predict.batches import sample_numbers
from ivon_kernels.predict.generation import generate, generate_averaged, special_tokens
from ivon_kernels.predict.passes import Sampler, device_of, evaluating
from ivon_kernels.predict.scoring import token_likelihoods

__all__ = ["generation_statistics"]


def generation_statistics(
    posterior: Gaussians,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int | Sequence[int] = 10,
    max_new_tokens: int = 32,
    stacked: bool | None = None,
    max_rows: int = 128,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Generate from a posterior, and say how likely it is what was said: the statistics that estimators read.

    For each prompt a text is drawn under each sample, at temperature 1: a draw of the posterior predictive
    distribution. One more takes the likeliest token of the average each time. All likelihoods are predictive,
    ``p(y) = mean_s p_s(y)``, of whole texts; the tokens' ``log p(y_t | y_<t)`` add up to them. So an estimator of
    entropy sees what the samples disagree about, too. ``S`` samples of ``B`` prompts take about ``S (S + 1) B``
    passes over the texts, beside generating them; tokens come from torch's global generator.

    Args:
        posterior: Where the samples come from.
        model: A decoder-only language model of Transformers, perhaps wrapped by PEFT.
        tokenizer: The model's.
        prompts: ``B`` texts.
        samples: How many, or their numbers; at least one.
        max_new_tokens: Where a text ends at the latest.
        stacked: Whether several samples share a pass; None: in LoRA models that allow it.
        max_rows: The most rows of a pass that several samples share.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.

    Returns:
        By the names that LM-Polygraph 0.7 gives them, log-probabilities in nats: ``input_texts`` and ``greedy_texts``,
        texts by prompt; ``greedy_tokens`` and ``greedy_log_likelihoods``, token by token, with the one that ends the
        text; ``sample_texts``, ``sample_tokens`` and ``sample_log_likelihoods``, the same for each draw, without the
        token that ends it; ``sample_log_probs``, the log-probability of each draw, with that token. Draws without a
        token are left out.

    Raises:
        ValueError, TypeError: For prompts, samples or a model that do not fit.
    """
    numbers = sample_numbers(samples)
    if not numbers:
        raise ValueError("generation_statistics() needs samples to draw texts under: samples=10")
    if isinstance(prompts, str) or not prompts:
        raise ValueError("generation_statistics() needs a list of prompts")
    device = device_of(model)
    encoded = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    how: dict[str, Any] = {"stacked": stacked, "max_rows": max_rows, "adapter": adapter}
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    drawn = generate(posterior, model, inputs, samples=numbers, options=drawing, **how)
    greedy = generate_averaged(posterior, model, inputs, samples=numbers, max_new_tokens=max_new_tokens, **how)
    ends, _ = special_tokens(model)
    found: dict[str, Any] = {"input_texts": list(prompts)}
    found |= {f"greedy_{name}": [] for name in ("texts", "tokens", "log_likelihoods")}
    found |= {f"sample_{name}": [] for name in ("texts", "tokens", "log_likelihoods", "log_probs")}
    with evaluating(model), torch.no_grad(), Sampler(posterior, model, **how) as sampler:
        for i, mask in enumerate(inputs["attention_mask"]):
            *draws, best = _scored(sampler, numbers, [*drawn[:, i], greedy.sequences[i]], mask, ends)
            found["greedy_texts"].append(tokenizer.decode(_without(ends, best[0])))
            found["greedy_tokens"].append(best[0])
            found["greedy_log_likelihoods"].append(best[1])
            draws = [(_without(ends, tokens), likelihoods) for tokens, likelihoods in draws]
            draws = [(tokens, likelihoods) for tokens, likelihoods in draws if tokens]
            found["sample_texts"].append([tokenizer.decode(tokens) for tokens, _ in draws])
            found["sample_tokens"].append([tokens for tokens, _ in draws])
            found["sample_log_likelihoods"].append([likelihoods[: len(tokens)] for tokens, likelihoods in draws])
            found["sample_log_probs"].append([math.fsum(likelihoods) for _, likelihoods in draws])
    return found


def _scored(
    sampler: Sampler, numbers: tuple[int, ...], texts: list[Tensor], mask: Tensor, ends: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """Of each text after a prompt, of which `mask` tells its padding: new tokens, and their predictive log p."""
    start, length = len(mask), max(map(len, texts))
    ids = torch.stack([nn.functional.pad(text, (0, length - len(text))) for text in texts])
    whole = nn.functional.pad(mask, (0, length - start), value=1).expand(len(texts), -1)
    inputs = {"input_ids": ids, "attention_mask": whole}

    def passes() -> Tensor:
        each = []
        for passed in sampler.passes(numbers, len(texts)):
            found = token_likelihoods(sampler.model, passed.repeat(inputs), start)
            each.append(found.double().unflatten(0, (passed.samples, len(texts))))
        return torch.cat(each)

    together = sampler.attempt(passes).cumsum(2).logsumexp(0) - math.log(len(numbers))  # log p(y_1..y_t)
    steps = together.diff(dim=1, prepend=torch.zeros_like(together[:, :1]))
    said = [_until(ends, text[start:].tolist()) for text in texts]
    return [(tokens, row[: len(tokens)].tolist()) for tokens, row in zip(said, steps, strict=True)]


def _until(ends: Sequence[int], tokens: list[int]) -> list[int]:
    """The tokens to the first one that ends a text, and that one."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def _without(ends: Sequence[int], tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens
