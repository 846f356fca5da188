"""The posterior of one weight tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ivon_kernels.backends.reference import inv_sigma

__all__ = ["Gaussian"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Independent normals over the elements of one weight tensor: ``N(mean, 1 / (ess (hess + weight_decay)))``.

    Attributes:
        mean: float32 (float64 for float64 weights), in the shape of the weight, contiguous.
        hess: Like `mean`. inf means an element without noise, one that was pruned for example.
        index: The noise's parameter index: the position of the parameter in its optimizer.
        ess: Effective sample size lambda.
        weight_decay: ``d``; the prior is ``N(0, 1 / (ess weight_decay))``.
    """

    mean: Tensor
    hess: Tensor
    index: int
    ess: float
    weight_decay: float

    @property
    def inv_sigma(self) -> Tensor:
        """``1 / sigma``, with the bits that every kernel computes; inf where there is no noise."""
        return inv_sigma(self.hess, self)

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, in the shape and dtype of the mean."""
        return 1.0 / self.inv_sigma

    @property
    def variance(self) -> Tensor:
        """``sigma^2 = 1 / (ess (hess + weight_decay))``, in the shape and dtype of the mean."""
        return 1.0 / ((self.hess + self.weight_decay) * self.ess)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ``|mean| / sigma``; 0 where the mean is 0, inf at other elements without noise."""
        ratio = self.mean.abs() * self.inv_sigma
        return torch.where(self.mean == 0, torch.zeros_like(ratio), ratio)

    @property
    def kl(self) -> float:
        """Kullback-Leibler divergence from the prior, in nats.

        Sum over the elements of ``(sigma^2 + mean^2) / (2 s^2) - 1/2 - log(sigma / s)`` with ``s^2 = 1 / (ess
        weight_decay)``. inf without weight decay (a flat prior), and for an element without noise.
        """
        prior = self.ess * self.weight_decay
        if prior == 0.0:
            return math.inf if self.mean.numel() else 0.0
        precision = self.ess * (self.hess.double() + self.weight_decay)
        mean = self.mean.double()
        terms = prior * (1.0 / precision + mean * mean) - 1.0 + (precision / prior).log()
        return float(0.5 * terms.sum())
