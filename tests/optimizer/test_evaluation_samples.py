"""Evaluation samples: replayable by number, the same at any time, and without a trace in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, noise
from tests.support.helpers import assert_same, bowl, flat, parameters, sample_of, snapshot, train

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 77}
SHAPES = ((4, 3), (5,), (1,))


def fresh(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters(*SHAPES, dtype=dtype)
    return IVON(params, backend=backend, **{**OPTIONS, **options}), params


def evaluation_weights(optimizer: IVON, params: list[nn.Parameter], sample: int | None) -> Tensor:
    with optimizer.sampled_params(sample=sample):
        return flat(params)


@pytest.mark.on_triton
def test_evaluation_samples_are_replayable_by_index(backend: str) -> None:
    optimizer, params = fresh(backend)
    train(optimizer, params, 2)
    first = {k: evaluation_weights(optimizer, params, k) for k in (0, 5, 2**17 - 1)}
    evaluation_weights(optimizer, params, None)
    for k in (5, 2**17 - 1, 0):
        assert torch.equal(evaluation_weights(optimizer, params, k), first[k])
        expected = torch.cat([w.flatten() for w in sample_of(optimizer, noise.EVAL_STEP, k)])
        torch.testing.assert_close(first[k].double(), expected, rtol=1e-6, atol=1e-6)
    assert len({tuple(w.tolist()) for w in first.values()}) == 3


def test_evaluation_noise_does_not_depend_on_the_step(backend: str) -> None:
    optimizer, params = fresh(backend)
    draws = []
    for _ in range(2):
        weights = evaluation_weights(optimizer, params, 4).double()
        sigma = torch.cat([(100 * (optimizer.state[p]["hess"].double() + 0.01)).rsqrt().flatten() for p in params])
        draws.append((weights - flat(params)) / sigma)
        train(optimizer, params, 3)
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=1e-4)


def test_counted_evaluation_samples_differ(backend: str) -> None:
    optimizer, params = fresh(backend)
    draws = [evaluation_weights(optimizer, params, None) for _ in range(4)]
    assert len({tuple(w.tolist()) for w in draws}) == 4


@pytest.mark.parametrize("sample", [None, 0, 7])
def test_evaluation_disturbs_neither_training_nor_the_global_rng(backend: str, sample: int | None) -> None:
    expected, others = fresh(backend)
    left = train(expected, others, 5)
    optimizer, params = fresh(backend)
    right = []
    rng = torch.get_rng_state()
    for step in range(5):
        mean = flat(params)
        evaluation_weights(optimizer, params, sample)
        assert torch.equal(flat(params), mean)
        with optimizer.sampled_params(train=True):
            inside = flat(params)
            evaluation_weights(optimizer, params, sample)
            assert torch.equal(flat(params), inside)
            optimizer.zero_grad()
            bowl(params, step).backward()
            evaluation_weights(optimizer, params, sample)
        evaluation_weights(optimizer, params, sample)
        optimizer.step()
        right.append(flat(params))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_evaluation_samples_may_be_nested(backend: str) -> None:
    optimizer, params = fresh(backend)
    mean = flat(params)
    with optimizer.sampled_params(sample=1):
        outer = flat(params)
        with optimizer.sampled_params(sample=2):
            assert not torch.equal(flat(params), outer)
        assert torch.equal(flat(params), outer)
    assert torch.equal(flat(params), mean)


def test_evaluation_samples_have_the_right_spread(backend: str) -> None:
    params = [nn.Parameter(torch.full((20000,), 3.0))]
    optimizer = IVON(params, backend=backend, **OPTIONS)
    sigma = (100 * 0.51) ** -0.5
    draws = (torch.stack([evaluation_weights(optimizer, params, k) for k in range(5)]).double() - 3) / sigma
    # 1e5 normals: the mean's standard error is 0.0032, that of the variance 0.0045; five of each.
    assert abs(float(draws.mean())) < 0.016 and abs(float(draws.var()) - 1) < 0.0225
