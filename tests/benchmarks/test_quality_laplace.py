"""Laplace-LoRA: its factors, its predictive covariance and its prior against what they are by definition."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.finetune import data, model
from benchmarks.finetune.data import EncodedExamples
from benchmarks.finetune.scorers import scorer_of
from benchmarks.finetune.tasks import TASKS
from benchmarks.finetune.train import InterruptGuard
from benchmarks.quality.method import Job, Method, State
from benchmarks.quality.methods import all_methods, laplace
from benchmarks.quality.methods.laplace import Layers, lora_layers
from tests.support.finetune_model import save_tiny_model

# laplace-torch's dependencies call what torch has deprecated while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

CPU = torch.device("cpu")
DATA = data.load_dataset(TASKS["vader_nyt"], split="validation", train_size=10, test_size=9, max_words=12, seed=0)
METHODS = ["laplace_all", "laplace_last"]
ROUNDING = 1e-4
"""Relative to the largest entry: float32 through two layers and an eigendecomposition; a wrong factor is off by 0.1."""

Encode = Callable[..., EncodedExamples]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Encode]:
    """A trained job, in training mode as training leaves it; and what encodes examples for it."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    base, tokenizer = model.load_model(str(folder), device=CPU, in_8bit=False)
    adapted = model.add_lora(base, seed=0)
    scorer = scorer_of(TASKS["vader_nyt"], adapted, tokenizer, DATA.train[0])

    def encode(examples: list[data.Example], max_tokens: int = 320) -> EncodedExamples:
        return EncodedExamples(examples, tokenizer, max_tokens, CPU)

    job = Job(adapted, scorer, encode(DATA.train), seed=0, steps=12, batch_size=4, samples=2, guard=InterruptGuard())
    all_methods()["adamw"].train(job, {"lr": 2e-2})
    return job, encode


@pytest.fixture(scope="module")
def job(trained: tuple[Job, Encode]) -> Job:
    return trained[0]


@pytest.fixture(scope="module")
def examples(trained: tuple[Job, Encode]) -> EncodedExamples:
    return trained[1](DATA.test)


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return all_methods()[request.param]


def jacobians(job: Job, layers: Layers, examples: EncodedExamples) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[examples, classes]`` and derivatives ``[examples, classes, weights]`` as autograd gives them.

    One example at a time, in the order of their lengths.
    """
    logits = []
    slopes: dict[str, list[Tensor]] = {name: [] for name in layers}
    weights = [layer.weight for layer in layers.values()]
    job.model.eval()
    for batch in examples.in_length_order(1):
        logit = job.scorer(batch)[0]
        rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in logit]
        for name, row in zip(layers, zip(*rows, strict=True), strict=True):
            slopes[name].append(torch.stack(row).flatten(1))
        logits.append(logit.detach())
    job.model.train()
    return torch.stack(logits).double(), {name: torch.stack(found).double() for name, found in slopes.items()}


def factor(state: State, name: str, side: str) -> Tensor:
    """A Kronecker factor, put together again from what is kept of it."""
    vectors = state[f"{name}.{side}.vectors"].double()
    return vectors * state[f"{name}.{side}.values"].double() @ vectors.T


def precision(state: State, name: str) -> Tensor:
    """The likelihood's part of a layer's posterior precision ``[out * in, out * in]``."""
    return torch.kron(factor(state, name, "out"), factor(state, name, "in"))


def curvature(logits: Tensor) -> Tensor:
    """Second derivative ``[classes, classes]`` of the cross-entropy by the logits."""
    p = logits.softmax(0)
    return p.diag() - torch.outer(p, p)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_factors_of_one_token_of_one_example_are_the_fisher_matrix(trained: tuple[Job, Encode]) -> None:
    """Where the Kronecker product is no approximation, against the Fisher matrix of the weights."""
    job, encode = trained
    one = encode(DATA.train[:1], max_tokens=1)
    layers = lora_layers(job.model, last_only=False)
    state = laplace.fit(replace(job, training_set=one), layers)
    logits, slopes = jacobians(job, layers, one)
    values = {name: slope for name, slope in slopes.items() if ".v_proj." in name}  # one token has nothing to attend to
    assert len(values) == 4
    for name, slope in values.items():
        fisher = slope[0].T @ curvature(logits[0]) @ slope[0]
        assert_near(precision(state, name), fisher)


def test_factors_average_over_examples_of_any_length(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums over examples and tokens, written out."""
    monkeypatch.setattr(laplace, "RANK", 1000)
    layers = lora_layers(job.model, last_only=False)
    state = laplace.fit(job, layers)
    lengths = set()
    inputs = {name: torch.zeros(()).double() for name in layers}
    slopes = {name: torch.zeros(()).double() for name in layers}
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda module, given, output: seen.update({module: (given[0], output)}))
        for layer in layers.values()
    ]
    job.model.eval()
    for batch in job.training_set.in_length_order(1):
        lengths.add(batch.input_ids.shape[1])
        logits = job.scorer(batch)[0]
        for name, layer in layers.items():
            given, output = (tensor for tensor in seen[layer])
            given = given[0].detach().double()
            inputs[name] = inputs[name] + given.T @ given / len(given) / len(job.training_set)
            rows = [torch.autograd.grad(value, output, retain_graph=True)[0][0].double() for value in logits]
            both = torch.stack(rows)  # [classes, tokens, out]
            slopes[name] = slopes[name] + torch.einsum("cto,cd,dtp->op", both, curvature(logits.double()), both)
    job.model.train()
    for hook in hooks:
        hook.remove()
    assert len(lengths) > 2
    for name in layers:
        assert_near(factor(state, name, "in"), inputs[name])
        assert_near(factor(state, name, "out"), slopes[name].detach())


def test_covariance_is_that_of_explicit_jacobians(job: Job, examples: EncodedExamples, method: Method) -> None:
    """The low-rank formula on padded batches, against a dense inverse and one example at a time."""
    layers = lora_layers(job.model, last_only=method.name == "laplace_last")
    state = method.fit(job, {}, {})
    logits, slopes = jacobians(job, layers, examples)
    contrast = torch.eye(3, dtype=torch.float64) - torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    precisions = [0.3, 20.0]
    mean, covariances = laplace.moments(job, state, layers, precisions, examples)
    back = torch.tensor([i for batch in examples.in_length_order(1) for i in batch.index])
    assert_near(mean[back], logits @ contrast.T)
    for delta, covariance in zip(precisions, covariances, strict=True):
        expected = torch.zeros(())
        for name, slope in slopes.items():
            dense = precision(state, name)
            slope = contrast @ slope
            expected = expected + slope @ torch.linalg.inv(dense + delta * torch.eye(len(dense))) @ slope.mT
        assert_near(covariance[back], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # laplace-torch's Jacobians
def test_agrees_with_laplace_torch_where_nothing_is_left_out(
    job: Job, examples: EncodedExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    from laplace import KronLaplace

    monkeypatch.setattr(laplace, "RANK", 1000)
    layers = lora_layers(job.model, last_only=True)
    state = laplace.fit(job, layers)
    with laplace.only_trainable(job.model, layers):
        theirs = KronLaplace(laplace._Classifier(job.scorer, layers), "classification", prior_precision=3.0)
        theirs.fit(laplace._EqualLengths(job))
        mean, covariances = laplace.moments(job, state, layers, [3.0], examples)
        for batch in examples.in_length_order(1):
            logits, covariance = theirs._glm_predictive_distribution(batch.input_ids)
            contrast = torch.eye(3) - torch.tensor([[0.0, 0.0, 1.0]])
            assert_near(mean[batch.index], (logits @ contrast.T).double())
            assert_near(covariances[0, batch.index], (contrast @ covariance @ contrast.T).double())

    eigenvalues = torch.cat([laplace._eigenvalues(state, name) for name in layers])
    squares = sum(layer.weight.detach().double().square().sum().item() for layer in layers.values())
    ours = [laplace.log_evidence(delta, eigenvalues, squares) for delta in (0.5, 5.0)]
    expected = [theirs.log_marginal_likelihood(torch.tensor([delta])).item() for delta in (0.5, 5.0)]
    assert math.isclose(ours[1] - ours[0], expected[1] - expected[0], rel_tol=1e-3)


def test_prior_precision_maximises_the_evidence(job: Job, method: Method) -> None:
    """Against the evidence by dense determinants."""
    layers = lora_layers(job.model, last_only=method.name == "laplace_last")
    state = method.fit(job, {}, {})
    found = state["prior_precision"].item()

    def evidence(delta: float) -> float:
        total = 0.0
        for name, layer in layers.items():
            dense = precision(state, name)
            ratio = torch.linalg.slogdet(dense / delta + torch.eye(len(dense))).logabsdet
            total -= 0.5 * (ratio.item() + delta * layer.weight.double().square().sum().item())
        return total

    assert 1e-3 < found < 1e6
    assert evidence(found) > max(evidence(found * 0.9), evidence(found * 1.1))
    assert evidence(found) > max(evidence(found * 0.1), evidence(found * 10))


def test_predictions_are_valid_repeatable_and_leave_no_trace(
    job: Job, examples: EncodedExamples, method: Method
) -> None:
    before = [p.detach().clone() for p in job.model.parameters()]
    wanted = [p.requires_grad for p in job.model.parameters()]
    modes = [m.training for m in job.model.modules()]
    state = method.fit(job, {}, {})
    dials = method.tune(job, state, {}, examples)
    job.passes = 0
    found = method.predict(job, state, dials, examples)
    assert job.passes == len(examples) * (3 if method.name == "laplace_all" else 1)
    assert found.dtype == torch.float64 and found.shape == (len(examples), 3)
    assert (found > 0).all() and torch.allclose(found.sum(1), torch.ones(len(examples)).double())
    again = method.fit(job, {}, {})
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in state.values())
    assert torch.equal(method.predict(job, again, dials, examples), found)
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))
    assert [p.requires_grad for p in job.model.parameters()] == wanted
    assert [m.training for m in job.model.modules()] == modes and any(modes)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in job.model.modules())
    assert all(p.grad is None for p in job.model.parameters())


def test_tuning_chooses_what_the_harness_would(job: Job, examples: EncodedExamples, method: Method) -> None:
    state = method.fit(job, {}, {})
    before = job.passes
    found = method.tune(job, state, {}, examples)
    once = job.passes - before
    assert found == Method.tune(method, job, state, {}, examples)
    assert job.passes - before == once * (1 + len(method.dials))
    assert found in method.dials


def test_a_wider_posterior_is_less_certain(job: Job, examples: EncodedExamples, method: Method) -> None:
    state = method.fit(job, {}, {})
    narrow, wide = (method.predict(job, state, {"prior_scale": scale}, examples) for scale in (1e9, 1e-2))
    plain = job.logits(examples).softmax(1)
    job.model.train()
    assert (narrow - plain).abs().max() < 1e-3
    assert (wide.max(1).values < narrow.max(1).values).double().mean() > 0.5


def test_probabilities_average_the_softmax_over_the_gaussian() -> None:
    mean = torch.tensor([[1.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)
    covariance = torch.zeros(2, 2, 2, dtype=torch.float64)
    covariance[:, 0, 0] = torch.tensor([4.0, 9.0])
    found = laplace.probabilities(mean, covariance, seed=3)
    points = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = (-0.5 * points**2).exp()
    for row, (center, variance) in enumerate(((1.5, 4.0), (-0.5, 9.0))):
        expected = (torch.sigmoid(center + math.sqrt(variance) * points) * density).sum() / density.sum()
        assert abs(found[row, 0] - expected) < 4 * 0.5 / math.sqrt(laplace.LOGIT_SAMPLES)


def test_the_last_layer_is_the_last_block_or_the_output_layer(job: Job) -> None:
    everything, last = (lora_layers(job.model, last_only=last) for last in (False, True))
    assert len(everything) == 8
    assert list(last) == [name for name in everything if ".layers.1." in name] and len(last) == 4
    assert {id(layer.weight) for layer in everything.values()} == {id(p) for p in job.parameters}
    assert laplace._block("base_model.model.model.layers.1.mlp.experts.7.up") == "base_model.model.model.layers.1"
    assert laplace._block("base_model.model.lm_head") == "base_model.model.lm_head"


def test_says_what_to_install(job: Job, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(RuntimeError, match=r"\(import of laplace halted.*run: pip install --no-deps"):
        method.fit(job, {}, {})
