"""Caches of what was made of weights are empty whenever samples change."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.helpers import DoraCaching
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import cached

from ivon_kernels import IVON, lora
from ivon_kernels.posterior import Posterior, next_token
from tests.support.adapted_llama import BATCH, trained

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)
SCORE = next_token([3, 5, 7])


@pytest.fixture(scope="module")
def dora() -> tuple[PeftModel, IVON, Posterior]:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_dora=True, task_type="CAUSAL_LM"
    )
    model, optimizer = trained(config)
    return model, optimizer, optimizer.posterior(model)


@pytest.mark.parametrize("stacked", [None, False, True])
def test_dora_caching_around_a_prediction(dora: tuple[PeftModel, IVON, Posterior], stacked: bool | None) -> None:
    model, _, posterior = dora
    expected = posterior.predict(model, BATCH, samples=4, score=SCORE, stacked=stacked)
    with DoraCaching(), torch.no_grad():
        mean = model(**BATCH).logits
        found = posterior.predict(model, BATCH, samples=4, score=SCORE, stacked=stacked)
        assert torch.equal(model(**BATCH).logits, mean)  # and nothing of the samples is left behind
    assert torch.equal(found.probabilities, expected.probabilities)
    assert torch.equal(found.mutual_information, expected.mutual_information)


def test_dora_caching_within_a_sample(dora: tuple[PeftModel, IVON, Posterior]) -> None:
    """PEFT's cache outlives its own block."""
    model, _, posterior = dora
    with torch.no_grad():
        mean = model(**BATCH).logits
        with posterior.sampled(model, 0), DoraCaching():
            model(**BATCH)
        with DoraCaching():
            assert torch.equal(model(**BATCH).logits, mean)


def test_dora_caching_while_the_optimizer_samples(dora: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = dora
    with DoraCaching(), torch.no_grad():
        mean = model(**BATCH).logits
        with optimizer.sampled_params(sample=1):
            found = model(**BATCH).logits
        assert torch.equal(model(**BATCH).logits, mean)
    with posterior.sampled(model, 1), torch.no_grad():
        assert torch.equal(model(**BATCH).logits, found)


def test_parametrizations_are_made_again() -> None:
    net = parametrizations.weight_norm(nn.Linear(4, 4))
    optimizer = IVON(net.parameters(), lr=0.1, ess=50.0, seed=1)
    posterior, rows = optimizer.posterior(net), torch.randn(3, 4)

    def weights() -> list[Tensor]:
        found = [net.weight.clone()]
        for sample in (0, 1):
            with posterior.sampled(net, sample):
                found.append(net.weight.clone())
            with optimizer.sampled_params(sample=sample):
                found.append(net.weight.clone())
        with lora.stack(net, posterior, 2) as stack:
            found.append(net(stack.repeat(rows)))
        return [*found, net.weight.clone()]

    with torch.no_grad():
        expected = weights()
        with cached():
            found = weights()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[1], found[3])


def test_autocast_casts_again() -> None:
    net, rows = nn.Linear(4, 4), torch.randn(3, 4)
    posterior = IVON(net.parameters(), lr=0.1, ess=5.0, seed=1).posterior(net)
    with torch.autocast("cpu", torch.bfloat16):
        mean = net(rows)
        with posterior.sampled(net, 0):
            assert not torch.equal(net(rows), mean)
        assert torch.equal(net(rows), mean)
