"""Left-out examples from the posterior, against fitting again without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.posterior import Gaussians
from ivon_kernels.predict.influence import Influence
from ivon_kernels.predict.leave_one_out import leverage, shift_without

DOUBLE = torch.float64


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
@pytest.mark.parametrize("ess", [12.0, 300.0, 2.0])
def test_linear_regression_and_ridge_are_exact(penalty: float, ess: float) -> None:
    x, y = orthogonal_regression()
    rows = len(x)
    model = nn.Linear(4, 1, bias=False, dtype=DOUBLE)
    # The mean loss has the curvature x^T x / N, which is diagonal, and N times the weight decay is the penalty.
    hess = x.square().sum(0) / rows
    gaussian = Gaussian(ridge(x, y, penalty)[None], hess[None], 0, ess, penalty / rows)
    influence = Influence(Gaussians({"weight": gaussian}, seed=1), model)
    outputs, covariances = [], []
    with influence.at_mean():
        for row in x:
            output = model(row)
            outputs.append(output.detach())
            covariances.append(influence.covariance(output) / rows)
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
