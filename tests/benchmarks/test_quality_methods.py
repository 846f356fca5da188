"""The methods of the quality suite: what the harness relies on, for every one, and what defines each peer of IVON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from benchmarks.finetune import data, model
from benchmarks.finetune.scorers import scorer_of
from benchmarks.finetune.tasks import TASKS
from benchmarks.finetune.train import InterruptGuard
from benchmarks.quality.method import TRAINING, Hyper, Job, State, nll
from benchmarks.quality.methods import adamw, all_methods, blob, swag
from ivon_kernels.posterior import fit_temperature
from tests.support.finetune_model import save_tiny_model

# laplace-torch's dependencies call what torch has deprecated while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]

METHODS = all_methods()
CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What a method did: as the harness would keep it. `chosen` are the hyperparameters with the dials over them."""

    weights: Tensor
    state: State
    hyper: Hyper
    chosen: Hyper
    probabilities: Tensor


@dataclass
class Bench:
    """Makes jobs: a few steps of a tiny model on a few sentences."""

    folder: Path

    def __post_init__(self) -> None:
        self.sentences = data.load_dataset(
            TASKS["vader_nyt"], split="validation", train_size=24, test_size=14, max_words=12, seed=0
        )
        self.outcome = cache(self.run)

    def job(self, seed: int = 0) -> Job:
        """A job of its own, with a model of its own; the adapter is at the seed's start."""
        base, tokenizer = model.load_model(str(self.folder), device=CPU, in_8bit=False)
        adapted = model.add_lora(base, seed=99)
        task, sentences = TASKS["vader_nyt"], self.sentences
        scorer = scorer_of(task, adapted, tokenizer, sentences.train[0])
        examples = data.EncodedExamples(sentences.train, tokenizer, 320, CPU)
        self.test = data.EncodedExamples(sentences.test, tokenizer, 320, CPU)
        job = Job(adapted, scorer, examples, seed, 6, 6, 3, InterruptGuard())
        job.restart()
        return job

    def run(self, name: str, seed: int) -> Outcome:
        """Trains, or takes what the base has trained, and predicts the test sentences."""
        method, job = METHODS[name], self.job(seed)
        if method.base is None:
            hyper = METHODS[method.like or name].candidates[0]
            state = method.train(job, hyper)
        else:
            trained = self.outcome(method.base, seed)
            hyper, state = trained.hyper, trained.state
            job.write(trained.weights)
        before = job.weights()
        state = method.fit(job, state, hyper)
        chosen = {**hyper, **method.tune(replace(job, samples=2), state, hyper, self.test)}
        return Outcome(before, state, hyper, chosen, method.predict(job, state, chosen, self.test))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def job(bench: Bench) -> Job:
    return bench.job()


def circumstances(job: Job) -> list[object]:
    """What a method may change in a model only for a while."""
    parameters = [(name, p.requires_grad, p.dtype, p.data_ptr()) for name, p in job.model.named_parameters()]
    modules = [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), getattr(m, "p", None))
        for name, m in job.model.named_modules()
    ]
    return [*parameters, *modules]


# ---- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_probabilities_are_some_and_the_same_again(bench: Bench, name: str) -> None:
    first, again, other = bench.outcome(name, 0), bench.run(name, 0), bench.outcome(name, 1)
    probabilities = first.probabilities
    assert probabilities.shape == (14, 3) and probabilities.dtype == torch.float64
    assert (probabilities > 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(14, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(again.weights, first.weights)
    assert again.state.keys() == first.state.keys()
    assert all(torch.equal(again.state[key], value) for key, value in first.state.items())
    assert again.chosen == first.chosen
    assert torch.equal(again.probabilities, probabilities)
    assert not torch.equal(other.probabilities, probabilities)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_state_predicts_the_same_in_another_process(bench: Bench, name: str, tmp_path: Path) -> None:
    found = bench.outcome(name, 0)
    save_file(
        {"weights": found.weights, **{f"state.{key}": value for key, value in found.state.items()}}, tmp_path / "s"
    )
    loaded = load_file(tmp_path / "s")
    job = bench.job()
    job.write(loaded.pop("weights"))
    state = {key.removeprefix("state."): value for key, value in loaded.items()}
    assert torch.equal(METHODS[name].predict(job, state, found.chosen, bench.test), found.probabilities)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_left_as_it_was(bench: Bench, job: Job, name: str) -> None:
    method, found = METHODS[name], bench.outcome(name, 0)
    before = circumstances(job)
    frozen = {key: p.detach().clone() for key, p in job.model.named_parameters() if not p.requires_grad}
    state = METHODS[method.base or name].train(job, found.hyper)
    assert circumstances(job) == before
    job.write(found.weights)
    state = method.fit(job, state, found.hyper)
    assert torch.equal(job.weights(), found.weights)
    job.model.eval()
    method.tune(job, state, found.hyper, bench.test)
    method.predict(job, state, found.chosen, bench.test)
    assert torch.equal(job.weights(), found.weights)
    assert circumstances(job) == before
    assert not any(module.training for module in job.model.modules())
    parameters = dict(job.model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in frozen.items())


# ---- what defines each -----------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(bench: Bench, job: Job) -> tuple[Job, Tensor]:
    """A job with AdamW's weights of seed 0 in it, and what AdamW predicts."""
    found = bench.outcome("adamw", 0)
    job.write(found.weights)
    return job, found.probabilities


def test_temperature_1_is_adamw(bench: Bench, fitted: tuple[Job, Tensor]) -> None:
    job, expected = fitted
    method = METHODS["temperature"]
    assert torch.equal(method.predict(job, {}, {"temperature": 1.0}, bench.test), expected)
    assert not torch.equal(method.predict(job, {}, {"temperature": 2.0}, bench.test), expected)


def test_scaled_samples_are_averaged_before_they_are_scaled(bench: Bench, job: Job) -> None:
    scaled, samples = METHODS["ivon_samples_scaled"], bench.outcome("ivon_samples", 0)
    job.write(samples.weights)
    at_1 = scaled.predict(job, samples.state, {**samples.hyper, "temperature": 1.0}, bench.test)
    torch.testing.assert_close(at_1, samples.probabilities, rtol=1e-12, atol=0)
    at_2 = scaled.predict(job, samples.state, {**samples.hyper, "temperature": 2.0}, bench.test)
    expected = samples.probabilities.sqrt()
    torch.testing.assert_close(at_2, expected / expected.sum(1, keepdim=True), rtol=1e-12, atol=0)


def test_scaled_samples_fit_the_temperature_to_the_average(bench: Bench, job: Job) -> None:
    scaled, samples = METHODS["ivon_samples_scaled"], bench.outcome("ivon_samples", 0)
    job.write(samples.weights)
    dials = scaled.tune(job, samples.state, samples.hyper, bench.test)
    assert dials["temperature"] == fit_temperature(samples.probabilities.log(), bench.test.labels)
    costs = [
        nll(scaled.predict(job, samples.state, {**samples.hyper, "temperature": value}, bench.test), bench.test)
        for value in (dials["temperature"], 1.0)
    ]
    assert costs[0] < costs[1]


def test_mc_dropout_of_rate_0_is_adamw(bench: Bench, fitted: tuple[Job, Tensor]) -> None:
    job, expected = fitted
    method = METHODS["mc_dropout"]
    torch.testing.assert_close(
        method.predict(job, {}, {"dropout": 0.0}, bench.test), expected, rtol=1e-12, atol=0
    )  # the sum of equal numbers over their count rounds
    differences = [
        (method.predict(job, {}, {"dropout": rate}, bench.test) - expected).abs().max().item() for rate in (0.05, 0.6)
    ]
    assert 0 < differences[0] < differences[1]


def test_mc_dropout_leaves_the_global_generator_alone(bench: Bench, fitted: tuple[Job, Tensor]) -> None:
    before = torch.get_rng_state()
    METHODS["mc_dropout"].predict(fitted[0], {}, {"dropout": 0.4}, bench.test)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_ensemble_of_equal_seeds_is_one_member(
    bench: Bench, fitted: tuple[Job, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, expected = fitted
    method, hyper = METHODS["ensemble"], METHODS["adamw"].candidates[0]
    monkeypatch.setattr(adamw, "SPACING", 0)
    state = method.fit(job, {}, hyper)
    assert torch.equal(state["members"], job.weights().expand(2, -1))
    torch.testing.assert_close(method.predict(job, state, hyper, bench.test), expected, rtol=1e-12, atol=0)


def test_an_ensemble_averages_runs_of_adamw(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "SPACING", 1)
    found = bench.run("ensemble", 0)
    members = [bench.outcome("adamw", seed).probabilities for seed in (0, 1, 2)]
    torch.testing.assert_close(found.probabilities, sum(members) / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("samples", "members"), [(1, 1), (10, adamw.MEMBERS)])
def test_an_ensemble_has_at_most_five_members(bench: Bench, job: Job, samples: int, members: int) -> None:
    job = replace(job, samples=samples, steps=1)
    method, hyper = METHODS["ensemble"], METHODS["adamw"].candidates[0]
    state = method.fit(job, {}, hyper)
    assert len(state.get("members", ())) == members - 1
    method.predict(job, state, hyper, bench.test)
    assert job.passes == members * len(bench.test)


def test_fixed_noise_of_sigma_0_is_adamw(bench: Bench, job: Job) -> None:
    expected = bench.outcome("adamw", 0)
    method, hyper = METHODS["fixed_noise"], {**METHODS["adamw"].candidates[0], "sigma": 0.0}
    state = method.train(job, hyper)
    assert torch.equal(job.weights(), expected.weights)
    torch.testing.assert_close(
        method.predict(job, state, hyper, bench.test), expected.probabilities, rtol=1e-12, atol=0
    )


def test_fixed_noise_is_in_the_weights_and_has_its_sigma(job: Job) -> None:
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(job.parameters, lr=0.0)
    sampled, mean = adamw.noisy(job, 0.5, TRAINING), job.weights()

    @contextmanager
    def around() -> Iterator[None]:
        with sampled():
            yield
            seen.append(job.weights() - mean)

    job.finetune(optimizer, around=around)
    draws = torch.stack(seen)
    assert torch.equal(job.weights(), mean)
    # standard errors of the mean and of the standard deviation, five of them
    assert abs(draws.mean()) < 5 * 0.5 / math.sqrt(draws.numel())
    assert abs(draws.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * draws.numel())
    assert abs((draws[0] * draws[1]).mean()) < 5 * 0.25 / math.sqrt(len(mean))


def test_swag_moments_are_those_of_the_iterates() -> None:
    rng = torch.Generator().manual_seed(0)
    iterates = 3 + 1e-3 * torch.randn(9, 40, generator=rng)
    moments = swag.Moments()
    for iterate in iterates:
        moments.add(iterate)
    exact = iterates.double()
    torch.testing.assert_close(moments.mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.state()["variance"].double(), exact.var(0, correction=0), rtol=1e-2, atol=0)
    running = torch.stack([exact[: i + 1].mean(0) for i in range(9)])
    expected = (exact - running)[-swag.RANK :]
    torch.testing.assert_close(moments.state()["deviations"].double(), expected, rtol=0, atol=1e-6)


def test_swag_samples_have_its_covariance() -> None:
    rng = torch.Generator().manual_seed(1)
    state = {"variance": torch.tensor([4.0, 1.0, 0.25]), "deviations": torch.randn(5, 3, generator=rng)}
    draws = torch.stack([swag.deviation(state, rng) for _ in range(5_000)]).double()
    deviations = state["deviations"].double()
    expected = (torch.diag(state["variance"].double()) + deviations.T @ deviations / 4) / 2
    # an entry's variance is (c_ii c_jj + c_ij^2) / n; five standard errors
    diagonal = expected.diagonal()
    errors = ((torch.outer(diagonal, diagonal) + expected**2) / len(draws)).sqrt()
    assert ((draws.T @ draws / len(draws) - expected).abs() < 5 * errors).all()
    assert (draws.mean(0).abs() < 5 * (diagonal / len(draws)).sqrt()).all()


def test_swag_collects_the_iterates_of_the_last_part(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.steps, hyper = 8, {"lr": 1e-2, "swa_lr": 5e-3, "start": 0.5}
    collected: list[Tensor] = []
    add = swag.Moments.add

    def spy(self: swag.Moments, iterate: Tensor) -> None:
        collected.append(iterate)
        add(self, iterate)

    monkeypatch.setattr(swag.Moments, "add", spy)
    state = METHODS["swag"].train(job, hyper)
    iterates = torch.stack(collected).double()
    assert len(iterates) == 4
    torch.testing.assert_close(job.weights().double(), iterates.mean(0), rtol=0, atol=1e-6)
    assert state["deviations"].shape == (4, len(job.weights()))


def test_swag_without_spread_predicts_at_its_mean(bench: Bench, job: Job) -> None:
    found = bench.outcome("swag", 0)
    job.write(found.weights)
    state = {key: torch.zeros_like(value) for key, value in found.state.items()}
    at_mean = job.logits(bench.test).softmax(1)
    predicted = METHODS["swag"].predict(job, state, found.hyper, bench.test)
    torch.testing.assert_close(predicted, at_mean, rtol=1e-12, atol=0)
    assert not torch.allclose(found.probabilities, at_mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("period", [1, 2, 25, 5000])
def test_blob_weights_of_a_period_add_up_to_1(period: int) -> None:
    found = [blob.kl_weight(i, period) for i in range(period)]
    assert math.fsum(found) == pytest.approx(1, rel=1e-12)
    assert found[-1] == pytest.approx(1 if period == 1 else 2 * found[-2])


def test_flipout_noise_has_mean_0_and_the_weights_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=rng)  # two examples of three tokens
    x[1] = x[0]
    sigma = torch.rand(4, 5, generator=rng) + 0.1
    draws = torch.stack([blob.flipout_noise(x, sigma, rng) for _ in range(5_000)]).double()
    count = len(draws)
    variance = (x.double() ** 2) @ (sigma.double() ** 2).T
    assert (draws.mean(0).abs() < 5 * (variance / count).sqrt()).all()
    # the product of a normal and independent signs is normal: the variance's standard error is sqrt(2 / n) of it
    assert ((draws.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / count)).all()
    # tokens of an example see the same weight; two examples, though equal, see uncorrelated ones
    together = (draws[:, 0, 0] * draws[:, 0, 1]).mean(0)
    expected = (x[0, 0].double() * x[0, 1].double()) @ (sigma.double() ** 2).T
    bound = 5 * (2 * variance[0, 0] * variance[0, 1] / count).sqrt()
    assert ((together - expected).abs() < bound).all()
    apart = (draws[:, 0, 0] * draws[:, 1, 0]).mean(0)
    assert (apart.abs() < 5 * math.sqrt(3) * variance[0, 0] / math.sqrt(count)).all()


def test_flipout_turns_every_output_of_an_example_by_itself() -> None:
    """With one input, signs of the inputs alone would leave the product of two outputs the same for all examples."""
    rng = torch.Generator().manual_seed(0)
    found = blob.flipout_noise(torch.ones(64, 1), torch.ones(2, 1), rng)
    assert 16 < (found[:, 0] * found[:, 1] > 0).sum() < 48


def test_flipout_draws_at_every_pass_and_ends_with_the_block(bench: Bench, job: Job) -> None:
    for module in job.model.modules():
        if isinstance(module, LoraLayer):
            nn.init.normal_(module.lora_B["default"].weight)
    mean = job.logits(bench.test)
    noise = torch.Generator().manual_seed(0)
    wide = {name: torch.full_like(layer.weight, 0.5) for name, layer in blob.layers(job).items()}
    none = {name: torch.zeros_like(root) for name, root in wide.items()}
    with blob.flipout(job, wide, noise):
        first, second = job.logits(bench.test), job.logits(bench.test)
    assert not torch.equal(first, mean) and not torch.equal(first, second)
    with blob.flipout(job, none, noise):
        assert torch.equal(job.logits(bench.test), mean)
    assert torch.equal(job.logits(bench.test), mean)


def test_blob_without_noise_and_prior_is_adamw_without_dropout(job: Job, bench: Bench) -> None:
    hyper: Hyper = {"lr": 1e-3, "kl_lr": 0.0, "spread": 0.0}
    METHODS["blob"].train(job, hyper)
    expected = bench.job()
    for module in expected.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    METHODS["adamw"].train(expected, hyper)
    assert torch.equal(job.weights(), expected.weights())


def test_blob_follows_the_divergence(job: Job) -> None:
    """Against many small steps of gradient descent on torch's divergence, from both sides of the prior."""
    name, layer = next(iter(blob.layers(job).items()))
    start = torch.tensor([0.05, -0.1, 0.4, 0.9]).repeat(layer.weight.numel() // 4).view_as(layer.weight)
    roots = {key: torch.ones_like(other.weight) for key, other in blob.layers(job).items()} | {name: start.clone()}
    mean, root = (value.double().detach().requires_grad_() for value in (layer.weight, start))
    prior = Normal(torch.zeros((), dtype=torch.float64), blob.PRIOR_SIGMA)
    for _ in range(2000):
        gradients = torch.autograd.grad(kl_divergence(Normal(mean, root**2), prior).sum(), (mean, root))
        with torch.no_grad():
            for variable, gradient in zip((mean, root), gradients, strict=True):
                variable.sub_(gradient, alpha=0.01 / 2000)
    blob.follow_prior(job, roots, 0.01)
    # Euler's steps of 5e-6 where the slope at the start is 40: an error of about 0.2 % of G
    torch.testing.assert_close(layer.weight.detach().double(), mean.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(roots[name].double(), root.detach(), rtol=5e-3, atol=0)


def test_blob_ends_at_its_prior(job: Job) -> None:
    roots = {name: torch.zeros_like(layer.weight) for name, layer in blob.layers(job).items()}
    blob.follow_prior(job, roots, 1.0)
    for name, layer in blob.layers(job).items():
        torch.testing.assert_close(roots[name].square(), torch.full_like(layer.weight, blob.PRIOR_SIGMA))
        assert layer.weight.abs().max() < 1e-9


def test_blob_predicts_with_samples_of_a(bench: Bench, job: Job) -> None:
    found = bench.outcome("blob", 0)
    job.write(found.weights)
    mean = {name: layer.weight.detach().clone() for name, layer in blob.layers(job).items()}
    noise = torch.Generator().manual_seed(0)
    scores: list[Tensor] = []
    for _ in range(50):
        with blob.sampled(job, found.state, noise):
            scores += [
                ((layer.weight - mean[name]) / found.state[name].square()).flatten()
                for name, layer in blob.layers(job).items()
            ]
    drawn = torch.cat(scores).detach().double()
    assert abs(drawn.mean()) < 5 / math.sqrt(len(drawn))
    assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * len(drawn))
