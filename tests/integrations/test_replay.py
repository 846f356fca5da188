"""One sample for rollouts and for the update that learns from them: ``train(sample=k)``, and the mean at any time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, noise
from tests.support.helpers import Equations, assert_same, bowl, flat, parameters, relative_error, snapshot, train

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 77}


def fresh(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters((4, 3), 5, 1, dtype=dtype)
    return IVON(params, backend=backend, **{**OPTIONS, **options}), params


def step(optimizer: IVON, params: list[nn.Parameter], number: int, sample: int | None, modes: bool) -> Tensor:
    """One step; returns the weights that the gradient was taken at."""
    if modes:
        optimizer.train(sample=sample)
        optimizer.train()  # free, as the Trainer calls it
        weights = flat(params)
        optimizer.zero_grad()
        bowl(params, number).backward()
    else:
        with optimizer.sampled_params(train=True, sample=sample):
            weights = flat(params)
            optimizer.zero_grad()
            bowl(params, number).backward()
    optimizer.step()
    return weights


@pytest.mark.parametrize("modes", [False, True])
def test_the_training_sample_is_that_of_the_rollouts(backend: str, modes: bool) -> None:
    optimizer, params = fresh(backend)
    train(optimizer, params, 2)
    with optimizer.sampled_params(sample=9):
        rollouts = flat(params)
    assert torch.equal(step(optimizer, params, 2, 9, modes), rollouts)
    assert not optimizer.holds_sample


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("modes", [False, True])
def test_replayed_steps_are_those_of_the_equations(backend: str, modes: bool, hess_approx: str) -> None:
    optimizer, params = fresh(backend, hess_approx=hess_approx)
    expected = [Equations(p, optimizer.param_groups[0]) for p in params]
    for number, sample in enumerate([3, None, 3]):
        drawn = {"step": noise.EVAL_STEP, "sample": sample} if sample is not None else {"step": number}
        eps = [noise.normals(p.numel(), seed=77, param=i, **drawn).view(p.shape) for i, p in enumerate(params)]
        at = [(e.mean + e.sigma() * z.double()).requires_grad_() for e, z in zip(expected, eps, strict=True)]
        grads = torch.autograd.grad(bowl(at, number), at)
        for equations, grad, z in zip(expected, grads, eps, strict=True):
            equations.update([grad], [z])
        step(optimizer, params, number, sample, modes)
    for p, equations in zip(params, expected, strict=True):
        assert relative_error(p, equations.mean) < 1e-5
        assert relative_error(optimizer.state[p]["hess"], equations.hess) < 1e-5


def test_several_replayed_samples_in_one_step(backend: str) -> None:
    optimizer, params = fresh(backend)
    expected = [Equations(p, optimizer.param_groups[0]) for p in params]
    grads: list[list[Tensor]] = [[] for _ in params]
    for sample in (4, 8):
        with optimizer.sampled_params(train=True, sample=sample):
            optimizer.zero_grad()
            bowl(params, 0).backward()
            for kept, p in zip(grads, params, strict=True):
                kept.append(p.grad.clone())
    optimizer.step()
    for i, (p, equations) in enumerate(zip(params, expected, strict=True)):
        draws = [noise.normals(p.numel(), seed=77, step=noise.EVAL_STEP, sample=k, param=i) for k in (4, 8)]
        equations.update(grads[i], [z.view(p.shape) for z in draws])
        assert relative_error(optimizer.state[p]["hess"], equations.hess) < 1e-5


def test_replaying_leaves_the_other_steps_alone(backend: str) -> None:
    """The step after a replayed one draws what it would have drawn after an ordinary one."""
    optimizer, params = fresh(backend, lr=0.0)
    others, same = fresh(backend, lr=0.0)
    step(optimizer, params, 0, 5, True)
    step(others, same, 0, None, True)
    with torch.no_grad():
        for p, q in zip(params, same, strict=True):
            for key in ("hess", "momentum"):
                optimizer.state[p][key].copy_(others.state[q][key])
    assert torch.equal(step(optimizer, params, 1, None, True), step(others, same, 1, None, True))


@pytest.mark.parametrize("sample_in_step", [False, True])
def test_replay_with_sample_in_step(backend: str, sample_in_step: bool) -> None:
    """A sample that step() has drawn in advance gives way to the one that is asked for."""
    expected, others = fresh(backend)
    optimizer, params = fresh(backend, sample_in_step=sample_in_step)
    for number, sample in enumerate([None, 6, None, 6, 6, None]):
        left = step(expected, others, number, sample, True)
        assert torch.equal(step(optimizer, params, number, sample, True), left)
    optimizer.eval()
    assert_same(snapshot(expected), snapshot(optimizer))


def test_another_sample_than_this_steps_is_an_error(backend: str) -> None:
    optimizer, params = fresh(backend)
    for first, second in ((None, 4), (4, 5)):
        optimizer.train(sample=first)
        weights = flat(params)
        with pytest.raises(RuntimeError, match=rf"train\(sample={second}\), but this step has another sample"):
            optimizer.train(sample=second)
        assert torch.equal(flat(params), weights)
        optimizer.discard_samples()
    optimizer.train(sample=4)
    optimizer.eval()
    optimizer.train(sample=4)
    optimizer.eval()


@pytest.mark.parametrize("sample", [-1, 2**17, 1.5, "0"])
def test_a_bad_sample_is_an_error(backend: str, sample: Any) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    with pytest.raises(ValueError, match="sample must be a whole number"):
        optimizer.train(sample=sample)
    with (
        pytest.raises(ValueError, match="sample must be a whole number"),
        optimizer.sampled_params(train=True, sample=sample),
    ):
        pass
    assert torch.equal(flat(params), mean)


def test_evaluation_inside_a_replayed_sample(backend: str) -> None:
    optimizer, params = fresh(backend)
    optimizer.train(sample=4)
    weights = flat(params)
    with optimizer.sampled_params(sample=4):
        assert torch.equal(flat(params), weights)
        with pytest.raises(RuntimeError, match="evaluation sample"):
            optimizer.train()
    assert torch.equal(flat(params), weights)
    bowl(params, 0).backward()
    optimizer.step()


def test_a_copy_in_the_middle_of_a_replayed_step(backend: str) -> None:
    optimizer, params = fresh(backend)
    optimizer.train(sample=4)
    bowl(params, 0).backward()
    others, same = copy.deepcopy((optimizer, params))
    for p, q in zip(params, same, strict=True):
        q.grad = p.grad.clone()
    for one in (optimizer, others):
        one.step()
    assert_same(snapshot(optimizer), snapshot(others))


# --- the mean while the weights hold a sample -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mean_of(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = fresh(backend, dtype)
    train(optimizer, params, 2)
    means = [p.detach().clone() for p in params]
    assert all(optimizer.mean_of(p).data_ptr() == p.data_ptr() for p in params), "the mean itself"
    optimizer.train()
    assert optimizer.holds_sample
    copies = [optimizer.mean_of(p) for p in params]
    for p, mean, found in zip(params, means, copies, strict=True):
        assert torch.equal(found, mean) and found.dtype == dtype and not found.requires_grad
        assert optimizer.mean_of(p) is found, "the same copy until the weights change"
        assert found.untyped_storage().nbytes() == p.untyped_storage().nbytes(), "not a view of all the state"
    optimizer.eval()
    assert not optimizer.holds_sample
    assert all(optimizer.mean_of(p).data_ptr() == p.data_ptr() for p in params)


def test_mean_of_has_the_strides_of_the_parameter(backend: str) -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = IVON([weight], backend=backend, **OPTIONS)
    optimizer.train()
    assert optimizer.mean_of(weight).stride() == weight.stride()


def test_mean_of_frozen_and_foreign_parameters(backend: str) -> None:
    params = parameters(3, 4)
    params[1].requires_grad_(False)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    optimizer.train()
    assert torch.equal(optimizer.mean_of(params[1]), params[1])
    with pytest.raises(ValueError, match=r"no such parameter of shape \(2,\)"):
        optimizer.mean_of(nn.Parameter(torch.zeros(2)))
