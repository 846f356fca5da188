"""Dials on Gaussians: temperature and pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from ivon_kernels.gaussians.gaussian import Gaussian

__all__ = ["pruned", "tempered"]


def tempered(gaussians: Mapping[str, Gaussian], temperature: float) -> dict[str, Gaussian]:
    """See :meth:`ivon_kernels.gaussians.gaussians.Gaussians.tempered`."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    return {name: replace(gaussian, ess=gaussian.ess * temperature) for name, gaussian in gaussians.items()}


def pruned(gaussians: Mapping[str, Gaussian], fraction: float) -> dict[str, Gaussian]:
    """See :meth:`ivon_kernels.gaussians.gaussians.Gaussians.pruned`."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    if not gaussians:
        return {}
    scores = torch.cat([gaussian.snr.flatten() for gaussian in gaussians.values()])
    dropped = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    dropped[scores.argsort(stable=True)[: round(fraction * scores.numel())]] = True
    result = {}
    parts = dropped.split([gaussian.mean.numel() for gaussian in gaussians.values()])
    for (name, gaussian), part in zip(gaussians.items(), parts, strict=True):
        mask = part.view(gaussian.mean.shape)
        result[name] = replace(
            gaussian, mean=gaussian.mean.masked_fill(mask, 0.0), hess=gaussian.hess.masked_fill(mask, math.inf)
        )
    return result
