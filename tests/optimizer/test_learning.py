"""On losses of known curvature the mean finds the minimum and the Hessian estimate the curvature.

The bounds are derived. With ``h^`` the estimate of one step, ``E h^ = c`` for a quadratic of curvature c. The update
``h <- h + (1 - b2) (h^ - h) + (1 - b2)^2 (h^ - h)^2 / (2 (h + d))`` settles at ``c + (1 - b2) Var(h^) / (2 (c + d))``
with variance ``(1 - b2) Var(h^) / 2``, and forgets its start as ``b2^t``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, available_backends
from tests.support.helpers import slow_but, train

# The backends have the same bits, which tests/kernels shows: one of them learns, and plain PyTorch would take 20 times
# as long for its noise.
BACKEND = "reference" if available_backends()["cpu"] else "cpu"
ELEMENTS = 4000
ESS = 50.0


def stationary_variance(rate: float, beta1: float, curvature: float, sigma: float) -> float:
    """Variance of the mean around the minimum: ``v <- b1 v + (1 - b1) c (x + sigma eps)``, ``x <- x - rate v``."""
    a = torch.tensor(
        [[beta1, (1 - beta1) * curvature], [-rate * beta1, 1 - rate * (1 - beta1) * curvature]], dtype=torch.float64
    )
    kick = torch.tensor([1.0, -rate], dtype=torch.float64) * (1 - beta1) * curvature * sigma
    covariance = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(2000):
        covariance = a @ covariance @ a.T + torch.outer(kick, kick)
    return float(covariance[1, 1])


@pytest.mark.parametrize("curvature", slow_but([0.2, 4.0], 4.0))
@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_a_quadratic_of_known_curvature(hess_approx: str, curvature: float) -> None:
    beta1, beta2, steps, hess_init = 0.9, 0.99, 1000, 1.0
    target = 1.5 if hess_approx == "price" else 0.05  # far away "gradsq" sees the slope as curvature, and creeps
    p = nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = IVON(
        [p], 0.02, ESS, hess_init, beta1, beta2, weight_decay=0.0, hess_approx=hess_approx, seed=0, backend=BACKEND
    )

    def quadratic(params: Any, step: int) -> Tensor:
        return 0.5 * curvature * (params[0] - target).square().sum()

    train(optimizer, [p], steps, loss=quadratic)

    sigma = (ESS * curvature) ** -0.5
    moving = stationary_variance(0.02 * hess_init / curvature, beta1, curvature, sigma)
    assert moving < 0.05 * sigma**2
    errors = p.detach().double() - target
    # 5 standard errors of a mean and of a variance over independent elements; 10% for the moving preconditioner.
    assert abs(float(errors.mean())) < 5 * math.sqrt(moving / ELEMENTS)
    assert abs(float(errors.var()) / moving - 1) < 5 * math.sqrt(2 / ELEMENTS) + 0.1

    hess = optimizer.state[p]["hess"].double()
    extra = moving / sigma**2  # the mean's own motion, in units of the posterior's variance
    if hess_approx == "price":
        # h^ = c (eps^2 + eps x / sigma)
        expected, variance = curvature, curvature**2 * (2 + extra)
    else:
        # h^ = ess g^2 with E = ess c^2 (1 / (ess h) + Var x): the fixed point of h = c^2 / h + ess c^2 Var x
        expected = curvature * (extra / 2 + math.sqrt(1 + extra**2 / 4))
        variance = 2 * expected**2
    bias = 0.5 * (1 - beta2) * variance / curvature
    start = 5 * beta2**steps * abs(hess_init - curvature)
    spread = 5 * math.sqrt(0.5 * (1 - beta2) * variance / ELEMENTS)
    assert expected - start - spread - 0.5 * bias < float(hess.mean()) < expected + start + spread + 1.5 * bias
    assert 0.7 < float(hess.var()) / (0.5 * (1 - beta2) * variance) < 1.5 or hess_approx == "gradsq"


@pytest.mark.slow
def test_linear_regression() -> None:
    """A dense Hessian: each diagonal entry within five standard errors, the weights at the solution."""
    generator = torch.Generator().manual_seed(1)
    features = 8
    x = torch.randn(300, features, generator=generator) * torch.logspace(-0.5, 0.5, features)
    x = x @ (torch.eye(features) + 0.1 * torch.randn(features, features, generator=generator))
    y = x @ torch.linspace(-1, 1, features) + 0.1 * torch.randn(300, generator=generator)
    hessian = (x.T @ x / 300).double()
    solution = torch.linalg.lstsq(x.double(), y.double()).solution

    p = nn.Parameter(torch.zeros(features))
    ess, beta2, steps = 1e4, 0.998, 2500
    optimizer = IVON([p], 0.05, ess, beta2=beta2, weight_decay=0.0, seed=0, backend=BACKEND)
    train(optimizer, [p], steps, loss=lambda params, _: 0.5 * (x @ params[0] - y).square().mean())

    hess = optimizer.state[p]["hess"].double()
    diagonal = hessian.diagonal()
    # h^_i = H_ii eps_i^2 + sum_j H_ij eps_j eps_i sigma_j / sigma_i with sigma_j / sigma_i = sqrt(H_ii / H_jj)
    off = hessian.square() * diagonal[:, None] / diagonal[None, :]
    variance = 2 * diagonal**2 + off.sum(1) - off.diagonal() + 0.1 * diagonal**2
    bound = (
        beta2**steps * (1 - diagonal).abs()
        + 0.5 * (1 - beta2) * variance / diagonal
        + 5 * (0.5 * (1 - beta2) * variance).sqrt()
    )
    assert ((hess - diagonal).abs() < bound).all()
    assert float((bound / diagonal).max()) < 0.5, "the bound says something"
    # The mean moves less than the posterior is wide.
    assert ((p.detach().double() - solution).abs() < (ess * diagonal).rsqrt()).all()


def test_negative_curvature_is_survived() -> None:
    """On a concave loss every estimate is negative in expectation: hess shrinks, and stays positive."""
    p = nn.Parameter(torch.zeros(1000))
    optimizer = IVON([p], 1e-3, 100.0, beta2=0.9, seed=0, clip_radius=1.0, backend=BACKEND)
    train(optimizer, [p], 200, loss=lambda params, _: -0.5 * params[0].square().sum())
    hess = optimizer.state[p]["hess"]
    assert (hess + 1e-4 > 0).all() and float(hess.median()) < 0.5 and p.isfinite().all()
