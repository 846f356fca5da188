"""Text from samples: every sequence under one of them, or every token from their average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, TopPLogitsWarper

from ivon_kernels.posterior import generate, generate_averaged
from tests.support.posterior_models import ROUNDING, Trained, speaking_llama, tokens
from tests.support.tiny_llm import same, tokenizer, weights

# PEFT reads what transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Entropies of 32 tokens: each probability is off by 2e-5 (see ROUNDING), relative to itself, and times log p below 10.
ENTROPY_ROUNDING = 2e-4
NEW = 5


@pytest.fixture(scope="module")
def llm() -> Trained:
    return speaking_llama(end=None)


def padded() -> dict[str, Tensor]:
    texts = ["abcd", "e", "fgh"]
    return dict(tokenizer()(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False))


def greedy(**options: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "do_sample": False, **options}


# ---- a sample for each sequence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
def test_each_sequence_is_its_samples_own(llm: Trained, stacked: bool) -> None:
    expected = []
    for sample in (4, 1, 2):
        with llm.optimizer.sampled_params(sample=sample):
            expected.append(llm.model.generate(**padded(), **greedy()))
    before = weights(llm.model)
    found = generate(llm.posterior, llm.model, padded(), samples=[4, 1, 2], options=greedy(), stacked=stacked)
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found[0], found[1])  # the samples do differ
    assert same(weights(llm.model), before)


def test_the_mean_generates_without_samples(llm: Trained) -> None:
    found = generate(llm.posterior, llm.model, tokens(2, 3), samples=0, options=greedy())
    assert torch.equal(found[0], llm.model.generate(input_ids=tokens(2, 3), **greedy())) and len(found) == 1


@pytest.mark.parametrize("stacked", [True, False])
def test_shorter_sequences_are_padded(llm: Trained, stacked: bool) -> None:
    ids = tokens(1, 4)
    free = generate(llm.posterior, llm.model, ids, samples=3, options=greedy(), stacked=False)
    end = int(free[0, 0, 5])  # the second new token of sample 0
    found = generate(llm.posterior, llm.model, ids, samples=3, options=greedy(eos_token_id=end), stacked=stacked)
    for row, whole in zip(found[:, 0], free[:, 0], strict=True):
        ends = (whole[4:] == end).nonzero()
        stop = 5 + int(ends[0]) if len(ends) else len(whole)
        assert torch.equal(row[:stop], whole[:stop]) and not row[stop:].any()


def test_beams_stay_with_their_sample(llm: Trained) -> None:
    options = greedy(num_beams=3)
    stacked = generate(llm.posterior, llm.model, padded(), samples=3, options=options)
    assert torch.equal(stacked, generate(llm.posterior, llm.model, padded(), samples=3, options=options, stacked=False))


# ---- a token from the average ---------------------------------------------------------------------------------------


def likeliest(_: Tensor, p: Tensor) -> Tensor:
    """The token that every way to compute the probabilities chooses: the second best is further off than rounding."""
    first, second = p.topk(2, 1).values.T
    assert bool((first - second > 2 * ROUNDING).all())
    return p.argmax(1)


def by_hand(llm: Trained, ids: Tensor, samples: list[int], choose: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt, without padding, cache or stack; float64. Sequence, entropies, mutual information."""
    entropies, mutual = [], []
    for _ in range(NEW):
        every = []
        for sample in samples:
            with llm.optimizer.sampled_params(sample=sample), torch.no_grad():
                every.append(llm.model(input_ids=ids).logits[:, -1].double().softmax(1))
        p = torch.stack(every).mean(0)
        entropies.append(-(p * p.log()).sum())
        mutual.append(entropies[-1] + sum((q * q.log()).sum() for q in every) / len(every))
        ids = torch.cat([ids, choose(ids, p)[:, None]], 1)
    return ids, torch.stack(entropies), torch.stack(mutual)


@pytest.mark.parametrize("stacked", [True, False])
def test_averaged_tokens_equal_a_loop_without_cache(llm: Trained, stacked: bool) -> None:
    batch = padded()
    found = generate_averaged(
        llm.posterior, llm.model, batch, samples=[3, 0, 5, 9], max_new_tokens=NEW, stacked=stacked
    )
    for row in range(3):
        prompt = batch["input_ids"][row, batch["attention_mask"][row].bool()]
        ids, entropy, mutual = by_hand(llm, prompt[None], [3, 0, 5, 9], likeliest)
        assert torch.equal(found.sequences[row, -ids.shape[1] :], ids[0])
        torch.testing.assert_close(found.entropy[row].double(), entropy, rtol=0, atol=ENTROPY_ROUNDING)
        torch.testing.assert_close(found.mutual_information[row].double(), mutual, rtol=0, atol=2 * ENTROPY_ROUNDING)
    assert found.mutual_information.max() > 0.05


def test_drawn_tokens_come_from_the_average(llm: Trained) -> None:
    ids = tokens(1, 4)
    warp = LogitsProcessorList([TopPLogitsWarper(0.6)])
    draws = torch.Generator().manual_seed(5)

    def choose(ids: Tensor, p: Tensor) -> Tensor:
        scores = warp(ids, p.log() / 0.7).float()
        return torch.multinomial(scores.softmax(1), 1, generator=draws).squeeze(1)

    expected, _, _ = by_hand(llm, ids, [0, 1, 2], choose)
    options: dict[str, Any] = {"samples": 3, "max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "top_p": 0.6}
    before = torch.get_rng_state()
    for stacked in (True, False):
        generator = torch.Generator().manual_seed(5)
        found = generate_averaged(llm.posterior, llm.model, ids, generator=generator, stacked=stacked, **options)
        assert torch.equal(found.sequences, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_likeliest_token_alone_is_greedy(llm: Trained) -> None:
    options: dict[str, Any] = {"samples": 3, "max_new_tokens": NEW}
    drawn = generate_averaged(llm.posterior, llm.model, tokens(2, 4), do_sample=True, top_k=1, **options)
    assert torch.equal(drawn.sequences, generate_averaged(llm.posterior, llm.model, tokens(2, 4), **options).sequences)


def test_the_mean_alone_generates_as_transformers_does(llm: Trained) -> None:
    processors = [NoRepeatNGramLogitsProcessor(1)]
    found = generate_averaged(llm.posterior, llm.model, padded(), samples=0, max_new_tokens=NEW, processors=processors)
    assert torch.equal(found.sequences, llm.model.generate(**padded(), **greedy(no_repeat_ngram_size=1)))
    assert not found.mutual_information.any()


def test_a_sequence_ends_at_its_end(llm: Trained) -> None:
    ids = tokens(3, 4)
    options: dict[str, Any] = {"samples": 3, "max_new_tokens": NEW}
    free = generate_averaged(llm.posterior, llm.model, ids, **options)
    ends = [int(free.sequences[0, 5]), int(free.sequences[1, 4])]
    found = generate_averaged(llm.posterior, llm.model, ids, eos_token_id=ends, pad_token_id=31, **options)
    for row, whole, entropy in zip(found.sequences, free.sequences, found.entropy, strict=True):
        stops = torch.isin(whole[4:], torch.tensor(ends)).nonzero()
        stop = 5 + int(stops[0]) if len(stops) else len(whole)
        assert torch.equal(row[:stop], whole[:stop]) and (row[stop:] == 31).all()
        assert torch.equal(entropy.isnan(), torch.arange(4, 4 + len(entropy)) >= stop)
    alone = generate_averaged(llm.posterior, llm.model, ids[1:2], eos_token_id=ends[1], **options)
    assert alone.sequences.shape == (1, 5)  # nothing is computed after the last end
    unpadded = generate_averaged(llm.posterior, llm.model, ids, eos_token_id=ends[1], **options)
    assert (unpadded.sequences[1, 5:] == 0).all()  # the generation config's padding


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        ({"input_ids": tokens(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}, {}, "padded on the left"),
        ({"input_ids": tokens(1, 3), "labels": tokens(1, 3)}, {}, r"got \['labels'\] too"),
        (tokens(1, 3)[0], {}, r"input_ids \[B, T\], or a mapping with them, got \[3\]"),
        ("abc", {}, "got str"),
        (tokens(1, 3), {"max_new_tokens": 0}, "max_new_tokens"),
        (tokens(1, 3), {"temperature": 0.5}, "need do_sample=True"),
        (tokens(1, 3), {"top_k": 5}, "need do_sample=True"),
    ],
)
def test_refusals(llm: Trained, inputs: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        generate_averaged(llm.posterior, llm.model, inputs, **{"max_new_tokens": 2, "samples": 2, **options})


def test_generate_returns_sequences_alone(llm: Trained) -> None:
    with pytest.raises(ValueError, match="leave return_dict_in_generate out"):
        generate(llm.posterior, llm.model, tokens(1, 3), samples=2, options=greedy(return_dict_in_generate=True))


def test_weights_and_modes_are_as_before_also_after_an_error(llm: Trained) -> None:
    before = weights(llm.model)
    modes = [module.training for module in llm.model.modules()]

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("stop")

    for stacked in (True, False):
        with pytest.raises(KeyError, match="stop"):
            generate_averaged(
                llm.posterior, llm.model, tokens(1, 3), samples=2, max_new_tokens=2, processors=[fail], stacked=stacked
            )
        assert same(weights(llm.model), before)
        assert [module.training for module in llm.model.modules()] == modes


def test_a_model_without_a_cache_is_refused(llm: Trained) -> None:
    config = llm.model.get_base_model().config

    class NoCache(nn.Module):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, config.vocab_size)})

    with pytest.raises(ValueError, match="key-value cache, got NoCache"):
        generate_averaged(type(llm.posterior)({}, 0), NoCache(), tokens(1, 3), samples=0, max_new_tokens=2)
    assert math.isfinite(config.vocab_size)


@pytest.mark.parametrize("options", [{}, {"options": {"do_sample": False}}], ids=["keywords", "both"])
def test_keywords_are_those_of_the_models_generate(llm: Trained, options: dict[str, Any]) -> None:
    expected = generate(llm.posterior, llm.model, padded(), samples=2, options=greedy(num_beams=2))
    found = llm.posterior.generate(llm.model, padded(), samples=2, max_new_tokens=NEW, num_beams=2, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 2, "options": {"max_new_tokens": 3}}, "got max_new_tokens twice: in options"),
        ({"attention_mask": torch.ones(3, 4)}, "got attention_mask twice: in the inputs"),
        ({"options": [("max_new_tokens", 3)]}, "options must be a mapping of generate"),
    ],
)
def test_keywords_that_contradict(llm: Trained, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(llm.posterior, llm.model, padded(), samples=2, **given)
