"""Every training example as if it had been left out of the training, from the posterior and gradients alone.

The memory-perturbation equation (Nickl et al., NeurIPS 2023, arXiv 2310.19273; for IVON: Shen et al., arXiv 2402.17641,
section 4.3) asks how the mean moves when one example's loss goes. IVON's mean ``m`` minimises

    sum_j l_j(theta)  +  N d / 2 |theta|^2            N examples, l_j the loss of example j, d the weight decay

whatever ``ess`` is: the posterior's precision is ``ess (h + d)``, ess times the curvature of that sum over ``N``. Without
example ``i`` a Newton step from the mean is

    m_without - m  =  S grad l_i,        S = diag(1 / (N (h + d))) = sigma^2 ess / N

so that ``sigma^2`` itself is right where ``ess = N``; a tempered posterior (``ess = tau N``) has variances that are
``tau`` times too small for this question, and is scaled back. For logits ``f = f(m) [C]`` with Jacobian ``J [C, P]``,
``g = df l_i = p - onehot(y)`` and ``Lambda = d^2f l_i = diag(p) - p p^T``, with ``V = J S J^T [C, C]``:

    first order           f_without - f  =  V g
    with the leverage     f_without - f  =  (I - V Lambda)^-1 V g

In the second the example's own curvature is taken out of the posterior too (``J (S^-1 - J^T Lambda J)^-1 J^T``).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leverage", "shift_without"]


def shift_without(covariance: Tensor, gradient: Tensor, curvature: Tensor | None = None) -> Tensor:
    """How the outputs of examples move when each is left out: ``(I - V Lambda)^-1 V g``, or ``V g`` without `curvature`.

    With the full covariance of a model that is linear in its weights, and losses that are quadratic in the outputs,
    the first is exact: linear regression (``l = (f - y)^2 / 2``, ``g = f - y``, ``Lambda = 1``) and ridge, for any
    design if ``V`` is of the whole matrix, and with the diagonal one where the inputs are orthogonal.

    Args:
        covariance: ``V``, ``[N, K, K]``: of the outputs, under the posterior of all examples.
        gradient: ``g``, ``[N, K]``: of each example's loss by its outputs.
        curvature: ``Lambda``, ``[N, K, K]``: the second derivative.

    Returns:
        ``[N, K]``.
    """
    first = covariance @ gradient[..., None]
    if curvature is not None:
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        first = torch.linalg.solve(eye - covariance @ curvature, first)
    return first.squeeze(-1)


def leverage(covariance: Tensor, curvature: Tensor) -> Tensor:
    """How much of the precision that an example's outputs have is its own: the largest eigenvalue of ``V Lambda``.

    Args:
        covariance: ``V``, ``[N, K, K]``.
        curvature: ``Lambda``, ``[N, K, K]``.

    Returns:
        ``[N]``, in [0, 1) under the covariance of a convex problem.
    """
    found: Tensor = torch.linalg.eigvals(covariance @ curvature).real.amax(-1)
    return found
