"""The two ways to train give the same numbers, and neither ever loses the mean."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, noise
from tests.support.helpers import (
    Equations,
    assert_same,
    bowl,
    flat,
    parameters,
    relative_error,
    sample_of,
    slow_but,
    snapshot,
    train,
    train_modes,
)

pytestmark = pytest.mark.usefixtures("known_normals")

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 77}
SHAPES = ((4, 3), (5,), (1,))


def fresh(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters(*SHAPES, dtype=dtype)
    return IVON(params, backend=backend, **{**OPTIONS, **options}), params


def closure_of(optimizer: IVON, params: list[nn.Parameter], step: int = 0) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bowl(params, step)
        loss.backward()
        return loss

    return closure


def train_sample_in_step(optimizer: IVON, params: list[nn.Parameter], steps: int, samples: int = 1) -> list[Tensor]:
    """The loop of ``sample_in_step=True``: the weights hold a sample from one step to the next."""
    trajectory = []
    optimizer.train()
    for step in range(steps):
        for sample in range(samples):
            if sample:
                optimizer.next_sample()
            optimizer.zero_grad()
            bowl(params, step).backward()
        optimizer.step()
        trajectory.append(flat([optimizer.state[p]["mean"] for p in params]))
    optimizer.eval()
    return trajectory


def train_closures(optimizer: IVON, params: list[nn.Parameter], steps: int, samples: int = 1) -> list[Tensor]:
    trajectory = []
    for step in range(steps):
        optimizer.step(closure_of(optimizer, params, step))
        trajectory.append(flat(params))
    return trajectory


def train_again(optimizer: IVON, params: list[nn.Parameter], steps: int, samples: int = 1) -> list[Tensor]:
    """A loop full of calls that must change nothing."""
    trajectory = []
    for step in range(steps):
        optimizer.eval()
        for sample in range(samples):
            if sample:
                optimizer.next_sample()
            optimizer.train()
            optimizer.train()
            optimizer.eval()
            optimizer.eval()
            optimizer.train()
            with optimizer.sampled_params():
                bowl(params, 0)
            optimizer.zero_grad()
            bowl(params, step).backward()
        optimizer.step()
        optimizer.eval()
        trajectory.append(flat(params))
    return trajectory


@functools.cache
def in_contexts(
    backend: str, dtype: torch.dtype, samples: int, hess_approx: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    optimizer, params = fresh(backend, dtype, mc_samples=samples, hess_approx=hess_approx)
    return train(optimizer, params, 8, samples=samples), snapshot(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hess_approx", slow_but(["price", "gradsq"], "price"))
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("loop", [train_modes, train_sample_in_step, train_closures, train_again])
def test_every_loop_gives_the_same_bits(
    backend: str, loop: Any, samples: int, hess_approx: str, dtype: torch.dtype
) -> None:
    left, expected = in_contexts(backend, dtype, samples, hess_approx)
    in_step = loop is train_sample_in_step
    actual = fresh(backend, dtype, mc_samples=samples, hess_approx=hess_approx, sample_in_step=in_step)
    right = loop(*actual, 8, samples=samples)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(left, right, strict=True))
    assert_same(expected, snapshot(actual[0]))


@pytest.mark.on_triton
def test_sample_in_step_leaves_the_next_sample(backend: str) -> None:
    one, params = fresh(backend, sample_in_step=True)
    two, others = fresh(backend)
    one.train()
    for step in range(3):
        two.train()
        assert torch.equal(flat(params), flat(others))
        for optimizer, weights in ((one, params), (two, others)):
            optimizer.zero_grad()
            bowl(weights, step).backward()
            optimizer.step()
        assert torch.equal(flat([one.state[p]["mean"] for p in params]), flat(others))
    one.train()
    two.train()
    assert torch.equal(flat(params), flat(others))
    one.eval()
    two.eval()
    assert torch.equal(flat(params), flat(others))


@pytest.mark.on_triton
def test_a_block_after_a_loop_with_sample_in_step(backend: str) -> None:
    """The sample that the last step drew was for a step that never came: it is not one of the block's."""
    one, params = fresh(backend, sample_in_step=True)
    two, others = fresh(backend)
    train_sample_in_step(one, params, 3)
    train_modes(two, others, 3)
    for optimizer, weights in ((one, params), (two, others)):
        train(optimizer, weights, 2, start=3)
    assert_same(snapshot(one), snapshot(two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sample_is_the_mean_plus_sigma_times_the_public_noise(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = fresh(backend, dtype)
    train(optimizer, params, 3)
    expected = sample_of(optimizer, step=3)
    with optimizer.sampled_params(train=True):
        for p, e in zip(params, expected, strict=True):
            # A few float32 roundings of terms of size 1, then one rounding to the parameter's dtype.
            torch.testing.assert_close(p.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)
        bowl(params, 0).backward()


def test_samples_of_one_step_and_of_the_next_differ(backend: str) -> None:
    optimizer, params = fresh(backend, mc_samples=3)
    seen = []
    for _ in range(2):
        for sample in range(3):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                bowl(params, 0).backward()
                for p, e in zip(params, sample_of(optimizer, len(seen) // 3, sample), strict=True):
                    torch.testing.assert_close(p.double(), e, rtol=1e-6, atol=1e-6)
                seen.append(flat(params))
        optimizer.step()
    assert len({tuple(s.tolist()) for s in seen}) == 6


# --- the mean is in the weights outside the sample ------------------------------------------------------------------


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_raising_block_restores_the_mean_and_does_not_count(backend: str, exception: type[BaseException]) -> None:
    expected, other = fresh(backend)
    train(expected, other, 4)
    optimizer, params = fresh(backend)
    for step in range(4):
        before = flat(params)
        tried = []

        def body(seen: list[Tensor] = tried) -> None:
            bowl(params, 99).backward()
            seen.append(flat(params))
            raise exception("in the block")

        with pytest.raises(exception, match="in the block"), optimizer.sampled_params(train=True):
            body()
        assert torch.equal(flat(params), before)
        with optimizer.sampled_params(train=True):
            assert torch.equal(flat(params), tried[0]), "the same sample is drawn again"
            optimizer.zero_grad()
            bowl(params, step).backward()
        optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_a_raising_block_is_no_sample_for_step(backend: str) -> None:
    optimizer, params = fresh(backend)
    with contextlib.suppress(ValueError), optimizer.sampled_params(train=True):
        bowl(params, 0).backward()
        raise ValueError
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_a_raising_evaluation_restores_what_was_there(backend: str) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    with pytest.raises(KeyError), optimizer.sampled_params():
        raise KeyError
    assert torch.equal(flat(params), mean)
    optimizer.train()
    sample = flat(params)
    with pytest.raises(KeyError), optimizer.sampled_params():
        raise KeyError
    assert torch.equal(flat(params), sample)


def test_train_and_eval_are_idempotent(backend: str) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    optimizer.train()
    sample = flat(params)
    assert not torch.equal(sample, mean)
    for _ in range(2):
        optimizer.train()
        assert torch.equal(flat(params), sample)
    for _ in range(2):
        optimizer.eval()
        assert torch.equal(flat(params), mean)
    optimizer.train()
    assert torch.equal(flat(params), sample)


def test_evaluation_in_the_middle_of_accumulation(backend: str) -> None:
    expected, others = fresh(backend)
    expected.train()
    for _ in range(2):
        bowl(others, 0).backward()
    expected.step()

    optimizer, params = fresh(backend)
    optimizer.train()
    bowl(params, 0).backward()
    optimizer.eval()
    with torch.no_grad():
        bowl(params, 0)
    with optimizer.sampled_params(sample=3):
        bowl(params, 0)
    optimizer.train()
    bowl(params, 0).backward()
    optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_the_sample_survives_eval_before_step(backend: str) -> None:
    """eval() between backward() and step() puts the mean back but does not forget the sample."""
    expected, others = fresh(backend)
    train(expected, others, 3)
    optimizer, params = fresh(backend)
    for step in range(3):
        optimizer.train()
        optimizer.zero_grad()
        bowl(params, step).backward()
        optimizer.eval()
        optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_discard_samples_forgets_the_unfinished_step(backend: str) -> None:
    expected, others = fresh(backend, mc_samples=2)
    train(expected, others, 2, samples=2)
    optimizer, params = fresh(backend, mc_samples=2)
    mean = flat(params)
    optimizer.train()
    sample = flat(params)
    bowl(params, 50).backward()
    optimizer.next_sample()
    bowl(params, 60).backward()
    optimizer.discard_samples()
    assert torch.equal(flat(params), mean)
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.train()
    assert torch.equal(flat(params), sample)
    optimizer.discard_samples()
    train(optimizer, params, 2, samples=2)
    assert_same(snapshot(expected), snapshot(optimizer))


# --- errors ---------------------------------------------------------------------------------------------------------


def test_step_without_a_sample_is_an_error(backend: str) -> None:
    optimizer, params = fresh(backend)
    bowl(params, 0).backward()
    for _ in range(2):
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"sample"):
            optimizer.step()
        assert_same(before, snapshot(optimizer))
        train(optimizer, params, 1)


def test_next_sample_with_nothing_drawn_draws_the_first(backend: str) -> None:
    expected, others = fresh(backend)
    expected.train()
    optimizer, params = fresh(backend)
    optimizer.next_sample()
    assert torch.equal(flat(params), flat(others))


def test_step_inside_the_block_equals_step_after_it(backend: str) -> None:
    expected, others = fresh(backend)
    train(expected, others, 3)
    optimizer, params = fresh(backend)
    for step in range(3):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            bowl(params, step).backward()
            optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.parametrize("call", ["train", "next_sample", "step"])
def test_training_calls_inside_an_evaluation_sample_are_errors(backend: str, call: str) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    with pytest.raises(RuntimeError, match="evaluation"), optimizer.sampled_params():
        getattr(optimizer, call)()
    assert torch.equal(flat(params), mean)


def test_a_training_block_inside_a_training_block_is_an_error(backend: str) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    with pytest.raises(RuntimeError), optimizer.sampled_params(train=True), optimizer.sampled_params(train=True):
        pass
    assert torch.equal(flat(params), mean)


@pytest.mark.parametrize("sample", [-1, 2**17, 1.5, "0"])
def test_a_bad_evaluation_sample_is_an_error(backend: str, sample: Any) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    with pytest.raises((ValueError, TypeError)), optimizer.sampled_params(sample=sample):
        pass
    assert torch.equal(flat(params), mean)


# --- closures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_closure_returns_the_mean_loss(backend: str, samples: int) -> None:
    optimizer, params = fresh(backend, mc_samples=samples)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bowl(params, 0)
        losses.append(loss.detach())
        loss.backward()
        return loss

    returned = optimizer.step(closure)
    assert len(losses) == samples and len({float(x) for x in losses}) == samples
    torch.testing.assert_close(torch.as_tensor(returned, dtype=torch.float32), torch.stack(losses).mean())


def test_closure_runs_with_gradients_under_no_grad(backend: str) -> None:
    expected, others = fresh(backend)
    train(expected, others, 1)
    optimizer, params = fresh(backend)
    with torch.no_grad():
        optimizer.step(closure_of(optimizer, params))
    assert_same(snapshot(expected), snapshot(optimizer))


def test_a_raising_closure_restores_the_mean_and_does_not_count(backend: str) -> None:
    expected, others = fresh(backend, mc_samples=2)
    train(expected, others, 1, samples=2)
    optimizer, params = fresh(backend, mc_samples=2)
    before = snapshot(optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("in the closure")
        return closure_of(optimizer, params)()

    with pytest.raises(ValueError, match="in the closure"):
        optimizer.step(closure)
    assert_same(before, snapshot(optimizer))
    optimizer.step(closure_of(optimizer, params))
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_one_step_equals_the_equations(backend: str) -> None:
    """The smallest statement of what a step is, with the noise read off the weights' own specification."""
    optimizer, params = fresh(backend, mc_samples=2)
    models = [Equations(p, optimizer.param_groups[0]) for p in params]
    for step in range(4):
        train(optimizer, params, 1, samples=2, start=step)
        for i, model in enumerate(models):
            eps = [
                noise.normals(model.mean.numel(), seed=77, step=step, sample=s, param=i).view(model.mean.shape)
                for s in range(2)
            ]
            thetas = [(model.mean + model.sigma() * e.double()).requires_grad_() for e in eps]
            grads = [torch.autograd.grad(_single(theta, step, i), theta)[0] for theta in thetas]
            model.update(grads, eps)
            for key in ("mean", "momentum", "hess"):
                assert relative_error(optimizer.state[params[i]][key], getattr(model, key)) < 1e-5, key


def _single(theta: Tensor, step: int, index: int) -> Tensor:
    """The term of `bowl` that belongs to one parameter."""
    empty = theta.new_zeros(0)
    return bowl([empty] * index + [theta], step)
