"""Left-out examples from the posterior, against fitting again without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ivon_kernels.gaussians import names
from ivon_kernels.gaussians.adapters import Origin
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.posterior import (
    Gaussians,
    Posterior,
    Prediction,
    class_logits,
    leave_one_out,
    next_token,
    predict,
    sensitivity,
)
from ivon_kernels.predict.influence import Influence
from ivon_kernels.predict.left_out import leverage, shift_without
from ivon_kernels.predict.scoring import Score
from tests.support.posterior_models import Trained, features, tokens, trained_classifier, trained_llama
from tests.support.tiny_llm import lora_llama

# PEFT reads what transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def mlp() -> Trained:
    return trained_classifier()


@pytest.fixture(scope="module")
def llm() -> Trained:
    return trained_llama()


# ---- exact: quadratic losses ---------------------------------------------------------------------------------------


def orthogonal_regression(rows: int = 12, width: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs whose columns are orthogonal, of different lengths, and targets."""
    rng = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(rows, width, generator=rng, dtype=DOUBLE)).Q
    x = q * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=DOUBLE)
    return x, torch.randn(rows, generator=rng, dtype=DOUBLE)


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The weights that minimise ``sum (x w - y)^2 / 2 + penalty / 2 |w|^2``."""
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=DOUBLE), x.T @ y)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize(("ess", "num_data"), [(12.0, None), (12.0, 12), (300.0, 12), (2.0, 12)])
def test_linear_regression_and_ridge_are_exact(penalty: float, ess: float, num_data: int | None) -> None:
    x, y = orthogonal_regression()
    rows = len(x)
    model = nn.Linear(4, 1, bias=False, dtype=DOUBLE)
    # The mean loss has the curvature x^T x / N, which is diagonal, and N times the weight decay is the penalty.
    hess = x.square().sum(0) / rows
    gaussian = Gaussian(ridge(x, y, penalty)[None], hess[None], 0, ess, penalty / rows)
    influence = Influence(Gaussians({"weight": gaussian}, seed=1), model, num_data=num_data)
    outputs, covariances = [], []
    with influence.at_mean():
        for row in x:
            output = model(row)
            outputs.append(output.detach())
            covariances.append(influence.covariance(output))
    f, v = torch.stack(outputs), torch.stack(covariances)
    one = torch.ones(rows, 1, 1, dtype=DOUBLE)
    found = f + shift_without(v, f - y[:, None], one)
    kept = [[j for j in range(rows) if j != i] for i in range(rows)]
    refitted = torch.stack([x[i] @ ridge(x[kept[i]], y[kept[i]], penalty) for i in range(rows)])
    torch.testing.assert_close(found[:, 0], refitted, rtol=0, atol=1e-9)
    # The hat matrix says the same of the leverage, and the first order alone is not exact.
    hat = (x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(4, dtype=DOUBLE), x.T)).diagonal()
    torch.testing.assert_close(leverage(v, one), hat)
    assert (f + shift_without(v, f - y[:, None]) - refitted[:, None]).abs().max() > 1e-2


def test_any_design_is_exact_with_the_whole_covariance() -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(15, 3, generator=rng, dtype=DOUBLE)
    y = torch.randn(15, 2, generator=rng, dtype=DOUBLE)  # two outputs, which share their inputs
    weights = ridge(x, y, 0.3)
    inverse = torch.linalg.inv(x.T @ x + 0.3 * torch.eye(3, dtype=DOUBLE))
    variance = torch.einsum("ni,ij,nj->n", x, inverse, x)
    eye = torch.eye(2, dtype=DOUBLE).expand(15, 2, 2)
    found = x @ weights + shift_without(variance[:, None, None] * eye, x @ weights - y, eye)
    for i in range(15):
        others = torch.arange(15) != i
        torch.testing.assert_close(found[i], x[i] @ ridge(x[others], y[others], 0.3), rtol=0, atol=1e-9)


# ---- against refits: networks --------------------------------------------------------------------------------------


class Fitted:
    """A float64 model at the minimum of ``mean loss + d/2 |theta|^2``, and the posterior of the curvature there."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, decay: float, score: Score = class_logits) -> None:
        self.model, self.x, self.y, self.decay, self.score = model.double().eval(), x, y, decay, score
        self.batch = {"input_ids": x, "labels": y} if not x.is_floating_point() else (x, y)
        self.fit(self.model, torch.ones(len(x), dtype=DOUBLE))

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.score(model, x if x.is_floating_point() else {"input_ids": x})

    def fit(self, model: nn.Module, weights: Tensor) -> None:
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.LBFGS(
            params, max_iter=2000, tolerance_grad=1e-7, tolerance_change=1e-11, line_search_fn="strong_wolfe"
        )

        def cost() -> Tensor:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(self.logits(model, self.x), self.y, reduction="none")
            found = losses @ weights / len(losses) + self.decay / 2 * sum(p.square().sum() for p in params)
            found.backward()
            return found

        optimizer.step(cost)

    def posterior(self) -> Gaussians:
        """Of Bayes (``ess`` is the number of examples), with the diagonal of the Gauss-Newton matrix as Hessian."""
        params = {name: param for name, param in names.weight_names(self.model, None).items() if param.requires_grad}
        hess = {name: torch.zeros_like(param) for name, param in params.items()}
        for i in range(len(self.x)):
            logits = self.logits(self.model, self.x[i : i + 1])[0]
            p = logits.detach().softmax(0)
            rows = [torch.autograd.grad(f, list(params.values()), retain_graph=True) for f in logits]
            for position, name in enumerate(hess):
                jacobian = torch.stack([gradients[position] for gradients in rows])
                middle = torch.einsum("c,c...->...", p, jacobian)
                hess[name] += torch.einsum("c,c...->...", p, (jacobian - middle).square()) / len(self.x)
        ess = float(len(self.x))
        named = enumerate(params.items())
        gaussians = {n: Gaussian(p.detach().clone(), hess[n], i, ess, self.decay) for i, (n, p) in named}
        return Gaussians(gaussians, seed=1)

    def shifts(self, count: int = 20) -> Tensor:
        """Of `count` examples, how the difference of the two logits moves: as predicted, and in refits, ``[2, N]``."""
        left_out = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1))[:count].tolist()
        posterior, options = self.posterior(), {"samples": 0, "score": self.score}
        before = difference(predict(posterior, self.model, self.batch, **options))
        predicted = difference(leave_one_out(posterior, self.model, self.batch, **options))
        real = []
        for i in left_out:
            model, weights = copy.deepcopy(self.model), torch.ones(len(self.x), dtype=DOUBLE)
            weights[i] = 0
            self.fit(model, weights)
            logits = self.logits(model, self.x[i : i + 1]).detach()[0]
            real.append(logits[1] - logits[0] - before[i])
        return torch.stack([(predicted - before)[left_out], torch.stack(real)])


def difference(prediction: Prediction) -> Tensor:
    log_probabilities = prediction.probabilities.log()
    return log_probabilities[:, 1] - log_probabilities[:, 0]


def points(rows: int, seed: int, *, inside: bool) -> tuple[Tensor, Tensor]:
    """Points in the plane; whether they lie in a circle, or on one side of a line; a tenth of the labels is wrong."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=rng, dtype=DOUBLE)
    y = x.square().sum(1) < 1.2 if inside else x.sum(1) > 0
    return x, (y ^ (torch.rand(rows, generator=rng) < 0.1)).long()


def network(hidden: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2))


def adapted_llama() -> Fitted:
    """A Llama with LoRA, which learns whether the last letter is in the second half of the alphabet."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 29, (40, 5), generator=rng)
    y = ((ids[:, -1] >= 16) ^ (torch.rand(40, generator=rng) < 0.1)).long()
    return Fitted(lora_llama(), ids, y, 3e-2, next_token([4, 5]))


CASES: dict[str, tuple[Callable[[], Fitted], float]] = {
    "logistic regression": (lambda: Fitted(nn.Linear(2, 2), *points(60, 0, inside=False), 3e-3), 0.9),
    "network": (lambda: Fitted(network(6), *points(60, 0, inside=True), 3e-3), 0.85),
    "LoRA": (adapted_llama, 0.75),
}
"""Models, and the least correlation with refits; docs/posterior.md has the measured ones."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_shifts_are_those_of_refits(case: str) -> None:
    build, least = CASES[case]
    shifts = build().shifts()
    assert torch.corrcoef(shifts)[0, 1] > least


@pytest.mark.slow
def test_a_temperature_needs_no_validation_split() -> None:
    """Of a network that has learned its noisy labels by heart: too sure, which its training data alone cannot tell."""
    fitted = Fitted(network(16), *points(60, 0, inside=True), 3e-4)
    x, y = points(2000, 5, inside=True)
    posterior = fitted.posterior()
    seen = predict(posterior, fitted.model, fitted.batch, samples=0)
    temperature = leave_one_out(posterior, fitted.model, fitted.batch, samples=0).fit_temperature()
    assert seen.fit_temperature() < 1 < temperature
    new = predict(posterior, fitted.model, (x, y), samples=0)
    own = nn.functional.nll_loss(new.probabilities.log(), y)
    scaled = nn.functional.nll_loss(new.scaled(temperature).log(), y)
    best = nn.functional.nll_loss(new.scaled(new.fit_temperature()).log(), y)
    assert best <= scaled < own - 0.8 * (own - best)


# ---- the function --------------------------------------------------------------------------------------------------


def shift_of(trained: Trained, batch: Any, **options: Any) -> Tensor:
    """How the log-odds to the first class move, ``[N, C]``."""
    found = leave_one_out(trained.posterior, trained.model, batch, samples=0, **options).probabilities.log()
    before = predict(trained.posterior, trained.model, batch, samples=0)
    old = before.probabilities.log()
    return (found - found[:, :1]) - (old - old[:, :1])


def test_it_is_the_equation(mlp: Trained) -> None:
    x, y = features(6)
    mean = {name: gaussian.mean.double() for name, gaussian in mlp.posterior.items()}
    double = copy.deepcopy(mlp.model).double()
    jacobian = torch.func.jacrev(lambda weights: torch.func.functional_call(double, weights, (x.double(),)))(mean)
    v = torch.zeros(6, 3, 3, dtype=DOUBLE)
    for name, gaussian in mlp.posterior.items():
        rows = jacobian[name].flatten(2)
        v += (rows * gaussian.variance.double().flatten()) @ rows.mT
    p = predict(mlp.posterior, mlp.model, x, samples=0).probabilities
    g = p - nn.functional.one_hot(y, 3)
    expected = (v @ g[..., None]).squeeze(2)
    found = shift_of(mlp, (x, y))
    # Float32 gradients: 2^-24 of each of a few dozen products of size 1, times shifts of up to 10.
    torch.testing.assert_close(found, expected - expected[:, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        mlp.posterior.sensitivity(mlp.model, (x, y)),
        torch.einsum("na,nab,nb->n", g, v, g),
        rtol=1e-4,
        atol=1e-5,
    )
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    cold = Trained(mlp.model, mlp.optimizer, mlp.posterior.tempered(100.0))
    corrected = shift_without(v / 100, g, curvature)
    torch.testing.assert_close(
        shift_of(cold, (x, y), corrected=True), corrected - corrected[:, :1], rtol=1e-4, atol=1e-4
    )


def test_batches_and_their_kind_do_not_matter(mlp: Trained) -> None:
    x, y = features(6)
    whole = leave_one_out(mlp.posterior, mlp.model, (x, y), samples=3)
    assert torch.equal(whole.labels, y) and len(whole) == 6 and whole.sample_probabilities is None
    for batches in (
        DataLoader(TensorDataset(x, y), batch_size=4),
        [(x[:1], y[:1]), (x[1:], y[1:])],
        iter([(x, y)]),
    ):
        found = leave_one_out(mlp.posterior, mlp.model, batches, samples=3)
        torch.testing.assert_close(found.probabilities, whole.probabilities, rtol=1e-4, atol=1e-5)


def test_samples_move_like_the_mean(mlp: Trained) -> None:
    x, y = features(6)
    shift = shift_of(mlp, (x, y))
    before = predict(mlp.posterior, mlp.model, (x, y), samples=[2, 5], keep_samples=True).sample_probabilities
    expected = (before.log() + shift).softmax(2)
    found = leave_one_out(mlp.posterior, mlp.model, (x, y), samples=[2, 5], keep_samples=True)
    torch.testing.assert_close(found.sample_probabilities, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.probabilities, expected.mean(0), rtol=1e-4, atol=1e-6)


def test_num_data_takes_the_place_of_ess(mlp: Trained) -> None:
    batch = features(6)
    expected = sensitivity(mlp.posterior, mlp.model, batch, num_data=6)
    for factor in (0.1, 1.0, 30.0):
        tempered = mlp.posterior.tempered(factor)
        # Two roundings of the variances, to float32.
        torch.testing.assert_close(sensitivity(tempered, mlp.model, batch, num_data=6), expected, rtol=1e-5, atol=0)
        plain = sensitivity(mlp.posterior, mlp.model, batch) / factor
        torch.testing.assert_close(sensitivity(tempered, mlp.model, batch), plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        sensitivity(mlp.posterior, mlp.model, batch, num_data=12), expected / 2, rtol=1e-5, atol=0
    )


def test_language_models_by_their_label_tokens(llm: Trained) -> None:
    score = next_token([4, 5, 9])
    ids = tokens(3, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2, -100])}
    before = predict(llm.posterior, llm.model, batch, score=score, samples=2)
    after = llm.posterior.leave_one_out(llm.model, batch, score=score, samples=2)
    right = torch.arange(2), torch.tensor([0, 2])
    assert (after.probabilities[right] < before.probabilities[right]).all()
    torch.testing.assert_close(after.probabilities[2], before.probabilities[2])  # it was not trained on
    found = llm.posterior.sensitivity(llm.model, batch, score=score)
    assert found[0] > 0 < found[1] and found[2] == 0
    assert torch.equal(llm.posterior.sensitivity(llm.model, [batch, batch], score=score), torch.cat([found, found]))


def test_an_answer_that_is_not_offered_stays_impossible(mlp: Trained) -> None:
    def two_of_three(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    x, _ = features(6)
    labels = torch.tensor([0, 2, 0, 2, 0, 2])
    found = leave_one_out(mlp.posterior, mlp.model, (x, labels), score=two_of_three, samples=2)
    assert (found.probabilities[:, 1] == 0).all() and found.probabilities.isfinite().all()


def test_weights_apart_that_are_one_in_the_posterior() -> None:
    class Twice(nn.Module):
        def __init__(self, *, tied: bool) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False, dtype=DOUBLE)
            self.two = nn.Linear(3, 3, bias=False, dtype=DOUBLE)
            if tied:
                self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).tanh())

    rng = torch.Generator().manual_seed(3)
    x, y = torch.randn(5, 3, generator=rng, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1])
    weight = torch.randn(3, 3, generator=rng, dtype=DOUBLE)
    gaussians = {"one.weight": Gaussian(weight, torch.ones_like(weight), 0, 5.0, 0.1)}
    posterior = Posterior(gaussians, seed=1, origin=Origin(aliases={"two.weight": "one.weight"}))
    tied = sensitivity(posterior, Twice(tied=True), (x, y))
    torch.testing.assert_close(sensitivity(posterior, Twice(tied=False), (x, y)), tied)


def test_the_model_is_as_it_was(mlp: Trained) -> None:
    model = copy.deepcopy(mlp.model).train()
    model.hidden.requires_grad_(False)
    with torch.no_grad():
        model.out.weight.add_(1.0)  # not the mean
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = leave_one_out(mlp.posterior, mlp.model, features(6), samples=2)
    with torch.no_grad():
        found = leave_one_out(mlp.posterior, model, features(6), samples=2)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.drop.training and not model.hidden.weight.requires_grad
    assert model.out.weight.requires_grad and all(param.grad is None for param in model.parameters())


BAD: list[tuple[Callable[[Trained], Any], str]] = [
    (lambda t: leave_one_out(t.posterior, t.model, features(6)[0]), "needs its label"),
    (lambda t: sensitivity(t.posterior, t.model, [features(6)[0]]), "needs its label"),
    (lambda t: sensitivity(t.posterior, t.model, []), "no batches"),
    (lambda t: leave_one_out(t.posterior, t.model, []), "no batches"),
    (lambda t: leave_one_out(t.posterior, t.model, features(6), num_data=0), "num_data must be"),
    (lambda t: sensitivity(t.posterior, t.model, features(6), num_data=float("nan")), "num_data must be"),
    (lambda t: sensitivity(t.posterior, t.model, (features(6)[0], torch.full((6,), 3))), "between 0 and 2"),
    (lambda t: leave_one_out(t.posterior.tempered(1e-4), t.model, features(6), corrected=True), "leave corrected out"),
    (
        lambda t: sensitivity(t.posterior, t.model, features(6), score=lambda m, b: m(b).detach()),
        "with a gradient by the weights",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_is_wrong_is_said(mlp: Trained, call: Callable[[Trained], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(mlp)
