"""A loss whose Hessian is known, and how far the mean of IVON's estimate of it may be off after some steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CURVATURE = 4.0
ROWS, COLUMNS = 500, 8
BETA2 = 0.95
NOISE_ONLY: dict[str, Any] = {"lr": 1e-7, "ess": 1.0, "hess_init": 1.0, "beta2": BETA2, "weight_decay": 1e-6, "seed": 3}
"""The weights stay where they are; the noise gets through the Hessian estimate only."""


def initial_weights() -> Tensor:
    """The minimum of `quadratic`."""
    return torch.zeros(ROWS, COLUMNS)


def quadratic(weight: Tensor, target: float | Tensor = 0.0) -> Tensor:
    """A loss whose Hessian is `CURVATURE` times the identity, with a matrix product that autocast runs in 16 bits."""
    output = nn.functional.linear(2.0 * torch.eye(COLUMNS, dtype=weight.dtype), weight)
    return (output.float() - target).square().sum() / 2


def expected_hessian(steps: int, beta2: float = BETA2, start: float = 1.0) -> float:
    """The mean of h after `steps` steps at the minimum of `quadratic`, to first order in ``q = 1 - beta2``.

    There h^ = c eps^2, of mean c and variance 2 c^2. The update's last term, q^2 (h - h^)^2 / (2 (h + d)), moves the
    fixed point from c to c (1 + q); the start decays with beta2^steps.
    """
    fixed = CURVATURE * (1 + (1 - beta2))
    return fixed + (start - fixed) * beta2**steps


def hessian_tolerance(beta2: float = BETA2, numel: int = ROWS * COLUMNS) -> float:
    """Five standard deviations of the mean of `numel` stationary averages, and the second order in q.

    The average of values of variance 2 c^2 has variance 2 c^2 q / (1 + beta2). What `expected_hessian` leaves out is
    c q^2 times a small number (variance of h, about q c^2, in the expectation of (h - h^)^2 / h): 4 bounds it.
    """
    q = 1 - beta2
    return CURVATURE * (5 * (2 * q / (1 + beta2) / numel) ** 0.5 + 4 * q**2)
