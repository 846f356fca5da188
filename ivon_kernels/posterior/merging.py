"""Several posteriors of one model to a single one, each weight by how sure each of them is of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.posterior.posterior import Posterior

__all__ = ["merge"]


def merge(posteriors: Sequence[Posterior], weights: Sequence[float] | None = None) -> Posterior:
    """Hessian-weighted merging (Daheim et al., ICLR 2024, arXiv 2310.12808, eq. 12).

    With ``H_t = ess_t hess_t`` the curvature that posterior ``t`` has seen in its data, ``H_0`` the prior's precision
    ``ess_t weight_decay_t`` and ``alpha_t`` its weight, the merged posterior has

        precision = H_0 + sum_t alpha_t H_t
        mean      = sum_t alpha_t (H_0 + H_t) mean_t / precision

    that is, the prior is counted once. With weights 1 this approximates the posterior of all their data together. Where
    the priors differ, ``H_0`` of the precision is their average. ``ess`` is the weighted sum of theirs.

    Adapters have to come from one initial adapter (the same seed for ``get_peft_model``): the two factors of a LoRA
    update mean nothing by themselves, and factors of unrelated origin cannot be averaged.

    Args:
        posteriors: Of the same weight tensors, by name and shape. Noise indices and seed are the first one's.
        weights: alpha, one for each posterior, each finite and above 0; None means 1 for all.

    Returns:
        The merged posterior; ``at_mean(model)`` or ``copy_mean_to(model)`` puts it into a model.

    Raises:
        ValueError: If there are none, they differ in names or shapes, a weight cannot be used, or one was pruned.
    """
    posteriors = list(posteriors)
    alphas = [1.0] * len(posteriors) if weights is None else [float(weight) for weight in weights]
    if not posteriors or len(alphas) != len(posteriors):
        raise ValueError(f"merge needs posteriors, and a weight for each: got {len(posteriors)} and {len(alphas)}")
    if not all(0.0 < alpha < math.inf for alpha in alphas):
        raise ValueError(f"weights must be finite and above 0, got {alphas}")
    first = posteriors[0]
    for number, other in enumerate(posteriors):
        if differing := first.keys() ^ other.keys():
            raise ValueError(f"posterior {number} differs from the first one: only one of them has {min(differing)!r}")
    merged = {name: _merged(name, [posterior[name] for posterior in posteriors], alphas) for name in first}
    return Posterior(merged, first.seed, origin=first.origin)


def _merged(name: str, gaussians: list[Gaussian], alphas: list[float]) -> Gaussian:
    first = gaussians[0]
    if len({gaussian.mean.shape for gaussian in gaussians}) > 1:
        raise ValueError(f"{name} has the shapes {[tuple(gaussian.mean.shape) for gaussian in gaussians]}")
    if any(bool(gaussian.hess.isinf().any()) for gaussian in gaussians):
        raise ValueError(f"{name} was pruned in one of the posteriors: merge first, then prune")
    ess = sum(alpha * gaussian.ess for alpha, gaussian in zip(alphas, gaussians, strict=True))
    prior = sum(gaussian.ess * gaussian.weight_decay for gaussian in gaussians) / len(gaussians)
    curvature = torch.zeros_like(first.mean, dtype=torch.float64)
    weighted = torch.zeros_like(curvature)
    for alpha, gaussian in zip(alphas, gaussians, strict=True):
        hess, mean = (_like(value, curvature) for value in (gaussian.hess, gaussian.mean))
        curvature += alpha * gaussian.ess * hess
        weighted += alpha * gaussian.ess * (hess + gaussian.weight_decay) * mean
    precision = prior + curvature
    if not bool((precision > 0).all()):
        raise ValueError(f"{name} would get a precision that is not positive: these weights cannot be used")
    dtype = first.mean.dtype
    mean, hess = (weighted / precision).to(dtype), (curvature / ess).to(dtype)
    return Gaussian(mean, hess, first.index, ess, prior / ess)


def _like(value: Tensor, other: Tensor) -> Tensor:
    return value.to(device=other.device, dtype=other.dtype)
