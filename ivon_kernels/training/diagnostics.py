"""Is the optimizer learning anything? Summaries of the posterior, per parameter group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivon_kernels.backends.state import ParamState
from ivon_kernels.hyperparameters import step_scalars

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MAX_ELEMENTS = 2**22  # quantiles of larger groups are taken over a regular subsample of this many elements


def _flat(states: list[ParamState], key: str) -> Tensor:
    return torch.cat([getattr(state, key).detach().reshape(-1).double().cpu() for state in states])


def _quantiles(values: Tensor) -> dict[float, float]:
    stride = -(-values.numel() // _MAX_ELEMENTS)
    levels = torch.tensor(QUANTILES, dtype=values.dtype)
    return dict(zip(QUANTILES, torch.quantile(values[::stride], levels).tolist(), strict=True))


def summarize(group: dict[str, Any], states: list[ParamState]) -> dict[str, Any]:
    """Summary of one parameter group; see :meth:`ivon_kernels.IVON.diagnostics`."""
    states = [state for state in states if state.param.numel()]
    if not states:
        return {"elements": 0, "steps": 0}
    mean, momentum, hess = (_flat(states, key) for key in ("mean", "momentum", "hess"))
    # Of the last update: the momentum that is there now went into that one.
    scalars = [step_scalars(group, max(state.step - 1, 0)) for state in states]
    inv_debias = torch.cat(
        [mean.new_full((s.param.numel(),), k.inv_debias) for s, k in zip(states, scalars, strict=True)]
    )
    precision = hess + scalars[0].weight_decay
    sigma = (scalars[0].ess * precision).rsqrt()
    direction = (momentum * inv_debias + scalars[0].weight_decay * mean) / precision
    return {
        "elements": mean.numel(),
        "steps": max(state.step for state in states),
        "sigma": _quantiles(sigma),
        "snr": _quantiles(mean.abs() / sigma),
        "hess_over_init": _quantiles(hess / float(group["hess_init"])),
        "clipped": float((direction.abs() >= scalars[0].clip_radius).double().mean()),
    }
