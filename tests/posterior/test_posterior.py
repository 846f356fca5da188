"""The posterior of a trained model: what it says, its samples in the weights, its dials."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from transformers import LlamaForSequenceClassification

from ivon_kernels import IVON
from ivon_kernels.posterior import Gaussian, Posterior, merge
from tests.support.fsdp_training import posterior_of_shards
from tests.support.ranks import Ranks
from tests.support.tiny_llm import IVON_OPTIONS, llama, lora_config, lora_llama, same, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def train(model: nn.Module, steps: int = 3, **options: object) -> IVON:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(trained, **{**IVON_OPTIONS, **options})
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture
def trained() -> tuple[PeftModel, IVON, Posterior]:
    model = lora_llama()
    optimizer = train(model)
    return model, optimizer, optimizer.posterior(model)


def gaussian(mean: Tensor, hess: Tensor, ess: float = 100.0, weight_decay: float = 0.01, index: int = 0) -> Gaussian:
    return Gaussian(mean, hess, index, ess, weight_decay)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_names_are_pefts(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, _, posterior = trained
    assert list(posterior) == list(get_peft_model_state_dict(model))
    assert all(posterior.mean[name].equal(value) for name, value in get_peft_model_state_dict(model).items())


def test_names_of_everything_that_peft_trains() -> None:
    base = LlamaForSequenceClassification(llama().config)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        task_type="SEQ_CLS",
        use_dora=True,
        trainable_token_indices={"embed_tokens": [3]},
    )
    model = get_peft_model(base, config)
    posterior = IVON(model.parameters(), **IVON_OPTIONS).posterior(model)
    assert set(posterior) == set(get_peft_model_state_dict(model))
    assert len(posterior) == 5  # A, B, the magnitudes, the token, the classifier


def test_the_posterior_of_another_adapter(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    model.add_adapter("other", lora_config())
    assert list(optimizer.posterior(model, "default")) == list(posterior)
    with pytest.raises(ValueError, match="has no adapter 'third'; it has"):
        optimizer.posterior(model, "third")
    with pytest.raises(ValueError, match="is not in the model or belongs to another adapter than 'other'"):
        optimizer.posterior(model, "other")


def test_names_of_transformers_own_adapters() -> None:
    model = llama()
    model.add_adapter(lora_config())
    posterior = train(model, 1).posterior(model)
    assert all(name.startswith("base_model.model.model.layers.0.self_attn.") for name in posterior)
    with posterior.sampled(model, 2):
        held = {name: p.detach().clone() for name, p in posterior.parameters_of(model).items()}
    assert same(held, posterior.draw(2))


def test_weights_trained_beside_the_adapter_keep_their_names() -> None:
    model = lora_llama()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    posterior = train(model, 1).posterior(model)
    assert "base_model.model.model.norm.weight" in posterior
    assert len(posterior) == 5


def test_values_are_the_optimizers(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    for name, param in posterior.parameters_of(model).items():
        state, found = optimizer.state[param], posterior[name]
        assert found.mean.equal(state["mean"])
        assert found.hess.equal(state["hess"])
        variance = 1 / (100 * (state["hess"].double() + 0.01))
        torch.testing.assert_close(posterior.variance[name].double(), variance, rtol=1e-6, atol=0)
        torch.testing.assert_close(posterior.sigma[name].double(), variance.sqrt(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            posterior.snr[name].double(), state["mean"].abs() / variance.sqrt(), rtol=1e-6, atol=0
        )


def test_kl_to_the_prior() -> None:
    torch.manual_seed(4)
    one = gaussian(torch.randn(5, 3), torch.rand(5, 3))
    normal = Normal(one.mean.double(), one.sigma.double())
    expected = kl_divergence(normal, Normal(0.0, (100 * 0.01) ** -0.5)).sum()
    assert one.kl == pytest.approx(float(expected), rel=1e-6)
    posterior = Posterior({"w": one, "flat": gaussian(one.mean, one.hess, weight_decay=0.0, index=1)}, seed=0)
    assert posterior.kl == {"w": one.kl, "flat": math.inf}


def test_it_is_a_copy_and_does_not_see_a_sample(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    optimizer.train()
    under_sample = optimizer.posterior(model)
    optimizer.eval()
    before = {name: value.clone() for name, value in posterior.mean.items()}
    assert same(under_sample.mean, before)
    with optimizer.sampled_params(train=True):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert same(posterior.mean, before)
    assert not same(optimizer.posterior(model).mean, before)


def test_edited_weights_are_the_mean(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    name = next(iter(posterior))
    with torch.no_grad():
        posterior.parameters_of(model)[name][0, 0] = 2.5
    assert optimizer.posterior(model).mean[name][0, 0] == 2.5


def test_frozen_after_training_and_never_trained() -> None:
    model = lora_llama()
    optimizer = train(model, 1)
    for param in model.parameters():
        param.requires_grad_(False)
    assert len(optimizer.posterior(model)) == 4
    with pytest.raises(ValueError, match="no trained parameters"):
        IVON(model.parameters(), **IVON_OPTIONS).posterior(model)
    with pytest.raises(ValueError, match="is not in the model: pass the model that is trained"):
        optimizer.posterior(llama())


# ---- samples in the weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_has_the_optimizers_bits_on_every_backend(backend: str, dtype: torch.dtype) -> None:
    model = lora_llama().to(dtype)
    optimizer = train(model, backend="reference")
    posterior = optimizer.posterior(model)
    with optimizer.sampled_params(sample=7):
        expected = weights(model)
    before = weights(model)
    with posterior.sampled(model, 7, backend=backend):
        assert same(weights(model), expected)
    assert same(weights(model), before)
    drawn = posterior.draw(7, backend=backend)
    params = posterior.parameters_of(model)
    assert all(drawn[name].to(dtype).equal(expected[_own_name(model, params[name])]) for name in posterior)


def _own_name(model: nn.Module, param: Tensor) -> str:
    return next(name for name, other in model.named_parameters() if other is param)


def test_float64(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model = lora_llama().double()
    optimizer = train(model)
    posterior = optimizer.posterior(model)
    with optimizer.sampled_params(sample=1):
        expected = weights(model)
    with posterior.sampled(model, 1):
        assert same(weights(model), expected)
    assert all(value.dtype == torch.float64 for value in posterior.mean.values())


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    before = weights(model)
    yield
    assert same(weights(model), before)


def test_what_was_there_comes_back_whatever_happens(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, _, posterior = trained
    with torch.no_grad():
        for param in posterior.parameters_of(model).values():
            param.add_(1.0)  # not the mean: it comes back all the same
    with _unchanged(model), pytest.raises(KeyboardInterrupt), posterior.sampled(model, 1):
        raise KeyboardInterrupt
    with _unchanged(model), posterior.sampled(model, 1), torch.no_grad():
        next(iter(posterior.parameters_of(model).values())).zero_()
    with _unchanged(model), posterior.sampled(model, 1):
        outer = weights(model)
        with posterior.sampled(model, 2):
            assert not same(weights(model), outer)
        assert same(weights(model), outer)
    with _unchanged(model), torch.inference_mode(), posterior.sampled(model, 1):
        assert same(weights(model), outer)


def test_a_model_that_was_made_in_inference_mode() -> None:
    """Its weights have no version that could be counted."""
    layer = nn.Linear(4, 3)
    posterior = IVON(layer.parameters(), lr=0.1, ess=50.0, seed=1).posterior(layer)
    with torch.inference_mode():
        other = nn.Linear(4, 3)
        other.load_state_dict(layer.state_dict())
        assert all(param.is_inference() for param in other.parameters())
        with posterior.sampled(layer, 1):
            expected = weights(layer)
        with _unchanged(other), posterior.sampled(other, 1):
            assert same(weights(other), expected)


def test_autograd_notices(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, _, posterior = trained
    param = next(iter(posterior.parameters_of(model).values()))
    version = param._version
    with posterior.sampled(model, 0):
        inside = param._version
        assert inside > version
    assert param._version > inside


def test_training_goes_on_as_if_nothing_had_been(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    twin, other = copy.deepcopy((model, optimizer))
    with posterior.sampled(model, 5), torch.no_grad():
        model(input_ids=TOKENS)
    for m, o in ((model, optimizer), (twin, other)):
        o.train()
        m(input_ids=TOKENS, labels=TOKENS).loss.backward()
        o.step()
    assert same(weights(model), weights(twin))


def test_optimizer_and_posterior_do_not_sample_at_once(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    optimizer.train()
    with pytest.raises(RuntimeError, match="hold a sample of another IVON optimizer"), posterior.sampled(model, 0):
        pass
    optimizer.eval()
    message = r"hold a sample of posterior.sampled\(\): leave that block first"
    with posterior.sampled(model, 0), pytest.raises(RuntimeError, match=message):
        optimizer.train()
    optimizer.train()


def test_the_model_may_change_between_samples(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, _, posterior = trained
    drawn = posterior.draw(3)
    for change in (model.to, model.to, lambda _: model.delete_adapter("default")):
        with posterior.sampled(model, 3):
            pass
        change(
            torch.bfloat16
            if posterior.parameters_of(model)[next(iter(posterior))].dtype == torch.float32
            else torch.float32
        )
        if "default" not in model.peft_config:
            model.add_adapter("default", lora_config())
            model.set_adapter("default")  # PEFT does not, and samples would have no effect
        with posterior.sampled(model, 3):
            held = posterior.parameters_of(model)
            assert all(held[name].equal(drawn[name].to(held[name].dtype)) for name in posterior)


def test_one_of_several_adapters(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, _, posterior = trained
    model.add_adapter("second", lora_config())
    first, second = (posterior.parameters_of(model, name) for name in ("default", "second"))
    before = [p.detach().clone() for p in first.values()]
    with (
        pytest.raises(RuntimeError, match=r"'second', .* is not active in .*q_proj .*set_adapter\('second'\)"),
        posterior.sampled(model, 4, adapter="second"),
    ):
        pass
    model.set_adapter("second")
    with posterior.sampled(model, 4, adapter="second"):
        assert same({n: p.detach() for n, p in second.items()}, posterior.draw(4))
        assert all(p.equal(old) for p, old in zip(first.values(), before, strict=True))
    with pytest.raises(RuntimeError, match=r"'default', .* is not active"), posterior.sampled(model, 4):
        pass  # not of the active one, which the posterior does not know
    model.set_adapter("default")
    with posterior.sampled(model, 4):
        assert same({n: p.detach() for n, p in first.items()}, posterior.draw(4))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="several adapters are active"), posterior.sampled(model, 4):
        pass


def test_wrapped_models(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, optimizer, posterior = trained
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert list(optimizer.posterior(wrapped)) == list(posterior)
        with posterior.sampled(wrapped, 1):
            assert same({n: p.detach() for n, p in posterior.parameters_of(model).items()}, posterior.draw(1))


def test_models_that_do_not_fit(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    _, _, posterior = trained
    with pytest.raises(ValueError, match=r"has no 'base_model.*lora_A.weight', one of 4 weight tensors"):
        posterior.parameters_of(llama())
    other = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r"has shape \(3, 16\) in the model and \(2, 16\) in the posterior"):
        posterior.parameters_of(other)
    with pytest.raises(ValueError, match="but LlamaForCausalLM has no PEFT adapters"):
        posterior.parameters_of(llama(), "default")
    for bad in (-1, 131072, 1.0, "1"):
        with pytest.raises(ValueError, match="sample must be a whole number in"):
            posterior.draw(bad)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP", "columns"])
def test_shards(ranks: Ranks, kind: str) -> None:
    whole = ranks.run(1, posterior_of_shards, "plain")[0]
    for of_rank in ranks.run(2, posterior_of_shards, kind):
        for part, expected in zip(of_rank, whole, strict=True):
            assert same(part, expected)


# ---- dials -----------------------------------------------------------------------------------------------------------


def test_tempered() -> None:
    posterior = Posterior({"w": gaussian(torch.randn(40), torch.rand(40))}, seed=1)
    cold = posterior.tempered(4.0)
    torch.testing.assert_close(cold.variance["w"], posterior.variance["w"] / 4)
    noise, less = (p.draw(0)["w"] - posterior.mean["w"] for p in (posterior, cold))
    torch.testing.assert_close(less, noise / 2, rtol=1e-4, atol=1e-6)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            posterior.tempered(bad)


def test_pruned(backend: str) -> None:
    mean = torch.tensor([[0.5, -2.0, 0.01], [3.0, 0.0, -0.2]])
    posterior = Posterior(
        {"w": gaussian(mean, torch.ones(2, 3)), "v": gaussian(torch.tensor([0.1]), torch.ones(1), index=1)}, 1
    )
    half = posterior.pruned(4 / 7)
    assert half.mean["w"].tolist() == [[0.5, -2.0, 0.0], [3.0, 0.0, 0.0]]
    assert half.mean["v"].tolist() == [0.0]
    kept = half.mean["w"] != 0
    assert half.sigma["w"][kept].equal(posterior.sigma["w"][kept])
    for sample in (0, 1):
        drawn, full = half.draw(sample, backend=backend), posterior.draw(sample, backend=backend)
        assert drawn["w"][kept].equal(full["w"][kept])
        assert not drawn["w"][~kept].any()
        assert not drawn["v"].any()
    assert not half.snr["w"][~kept].any()
    assert half.pruned(4 / 7).mean["w"].equal(half.mean["w"])  # the same ones again


def test_pruning_looks_at_sigma_and_breaks_ties_by_order() -> None:
    sure, unsure = torch.full((4,), 100.0), torch.full((4,), 0.01)
    posterior = Posterior(
        {"sure": gaussian(torch.ones(4), sure), "unsure": gaussian(2 * torch.ones(4), unsure, index=1)}, 0
    )
    assert posterior.pruned(0.25).mean["unsure"].tolist() == [0, 0, 2, 2]
    assert posterior.pruned(0.625).mean["sure"].tolist() == [0, 1, 1, 1]
    assert posterior.pruned(0.0).mean["sure"].all()
    assert not any(value.any() for value in posterior.pruned(1.0).mean.values())
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
            posterior.pruned(bad)


def test_at_mean_and_copy_mean(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    model, _, posterior = trained
    pruned = posterior.pruned(0.5)
    with _unchanged(model), pruned.at_mean(model):
        assert same({n: p.detach() for n, p in pruned.parameters_of(model).items()}, pruned.mean)
    pruned.copy_mean_to(model)
    assert same({n: p.detach() for n, p in pruned.parameters_of(model).items()}, pruned.mean)


def test_merging_quadratic_problems_is_exact() -> None:
    """Two least-squares problems with diagonal Hessians and one prior: the posterior of both together is known."""
    torch.manual_seed(0)
    prior, curvatures, centers = 2.0, torch.rand(2, 6, dtype=torch.float64) * 50, torch.randn(2, 6, dtype=torch.float64)
    posteriors = []
    for curvature, center, ess in zip(curvatures, centers, (100.0, 400.0), strict=True):
        mean = curvature * center / (curvature + prior)
        posteriors.append(Posterior({"w": gaussian(mean, curvature / ess, ess, prior / ess, index=3)}, seed=9))
    merged = merge(posteriors)
    precision = prior + curvatures.sum(0)
    torch.testing.assert_close(1 / merged.variance["w"], precision)
    torch.testing.assert_close(merged.mean["w"], (curvatures * centers).sum(0) / precision)
    assert (merged["w"].index, merged.seed, merged["w"].ess) == (3, 9, 500.0)
    weighted = merge(posteriors, [0.5, 2.0])
    precision = prior + (curvatures * torch.tensor([[0.5], [2.0]])).sum(0)
    torch.testing.assert_close(1 / weighted.variance["w"], precision)


def test_merging_one_changes_nothing_and_refusals(trained: tuple[PeftModel, IVON, Posterior]) -> None:
    _, _, posterior = trained
    alone = merge([posterior])
    for name in posterior:
        torch.testing.assert_close(alone.mean[name], posterior.mean[name])
        torch.testing.assert_close(alone.variance[name], posterior.variance[name])
    name = next(iter(posterior))
    fewer = Posterior({n: g for n, g in posterior.items() if n != name}, 0)
    other = Posterior({**posterior, name: gaussian(torch.zeros(3), torch.ones(3))}, 0)
    for bad, message in (
        (([], None), "needs posteriors"),
        (([posterior], [1.0, 1.0]), "a weight for each"),
        (([posterior], [-1.0]), "finite and above 0"),
        (([posterior, fewer], None), "only one of them has"),
        (([posterior, other], None), "has the shapes"),
        (([posterior, posterior.pruned(0.5)], None), "merge first, then prune"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(*bad)
