"""The statistics of LM-Polygraph, read by its own estimators."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivon_kernels.integrations.polygraph import generation_statistics
from tests.support.posterior_models import ROUNDING, Trained, speaking_llama
from tests.support.tiny_llm import same, tokenizer, weights

# PEFT reads what transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROMPTS, NEW, SAMPLES = ["abcd", "e", "fgh"], 12, [3, 0, 7]
END = 9


@pytest.fixture(scope="module")
def llm() -> Trained:
    return speaking_llama(end=END)


def statistics(llm: Trained, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    given = {"samples": SAMPLES, "max_new_tokens": NEW, **options}
    return generation_statistics(llm.posterior, llm.model, tokenizer(), PROMPTS, **given)


def predictive(llm: Trained, prompt: str, tokens: list[int]) -> float:
    """The log-probability of the tokens after the prompt, one sample and one token at a time."""
    ids = tokenizer()(prompt)["input_ids"]
    each = []
    for sample in SAMPLES:
        total = 0.0
        with llm.posterior.sampled(llm.model, sample=sample), torch.no_grad():
            for i, token in enumerate(tokens):
                logits = llm.model(input_ids=torch.tensor([ids + tokens[:i]])).logits[0, -1].double()
                total += logits.log_softmax(0)[token].item()
        each.append(total)
    return float(torch.tensor(each).logsumexp(0)) - math.log(len(SAMPLES))


@pytest.mark.parametrize("stacked", [True, False])
def test_likelihoods_are_of_the_average(llm: Trained, stacked: bool) -> None:
    before = weights(llm.model)
    found = statistics(llm, stacked=stacked)
    assert same(weights(llm.model), before)
    ended = 0
    for i, prompt in enumerate(PROMPTS):
        draws = zip(
            found["sample_tokens"][i], found["sample_log_likelihoods"][i], found["sample_log_probs"][i], strict=True
        )
        for tokens, likelihoods, total in draws:
            assert sum(likelihoods) == pytest.approx(predictive(llm, prompt, tokens), abs=NEW * ROUNDING)
            assert len(tokens) == len(likelihoods) and END not in tokens
            whole = tokens if len(tokens) == NEW else [*tokens, END]
            ended += len(whole) > len(tokens)
            assert total == pytest.approx(predictive(llm, prompt, whole), abs=NEW * ROUNDING)
        greedy, likelihoods = found["greedy_tokens"][i], found["greedy_log_likelihoods"][i]
        assert sum(likelihoods) == pytest.approx(predictive(llm, prompt, greedy), abs=NEW * ROUNDING)
    assert ended  # or nothing was cut
    assert found["sample_texts"] == [[tokenizer().decode(t) for t in draws] for draws in found["sample_tokens"]]
    assert found["input_texts"] == PROMPTS and len(found["greedy_texts"]) == len(PROMPTS)


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [({"samples": 0}, PROMPTS, "needs samples"), ({}, "abcd", "list of prompts"), ({}, [], "list of prompts")],
)
def test_what_is_wrong_is_said(llm: Trained, options: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation_statistics(llm.posterior, llm.model, tokenizer(), prompts, **options)


@pytest.fixture
def estimators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages without their contents, which would import forty packages more; the estimators need none."""
    spec = importlib.util.find_spec("lm_polygraph")
    assert spec and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    for name in ("lm_polygraph", "lm_polygraph.estimators"):
        bare = types.ModuleType(name)
        bare.__path__ = [str(folder.parent / name.replace(".", "/"))]
        monkeypatch.setitem(sys.modules, name, bare)
    common: Any = types.ModuleType("lm_polygraph.utils.common")
    common.polygraph_module_init = lambda function: function  # it logs
    monkeypatch.setitem(sys.modules, "lm_polygraph.utils.common", common)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("perplexity", "Perplexity"),
        ("max_probability", "MaximumSequenceProbability"),
        ("monte_carlo_sequence_entropy", "MonteCarloSequenceEntropy"),
        ("monte_carlo_normalized_sequence_entropy", "MonteCarloNormalizedSequenceEntropy"),
    ],
)
def test_its_estimators_take_them(llm: Trained, estimators: None, module: str, name: str) -> None:
    estimator = getattr(importlib.import_module(f"lm_polygraph.estimators.{module}"), name)()
    found = statistics(llm)
    assert set(estimator.stats_dependencies) <= found.keys()
    uncertain = estimator(found)
    assert uncertain.shape == (len(PROMPTS),) and np.isfinite(uncertain).all() and (uncertain > 0).all()
