"""What a posterior needs of an optimizer: the Gaussians of its parameters, as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivon_kernels import sharding

__all__ = ["Snapshot", "TrainedWeight", "snapshot"]


class TrainedWeight(NamedTuple):
    """One trained parameter and its Gaussian ``N(mean, 1 / (ess (hess + weight_decay)))``.

    Attributes:
        param: The parameter, by which a model names it.
        mean: float32 (float64 for float64 parameters), in the unsharded parameter's shape, contiguous.
        hess: Like `mean`.
        index: The noise's parameter index: the position among all parameters that the optimizer was given.
        ess: Effective sample size lambda, of the parameter's group.
        weight_decay: ``d``, of the parameter's group.
    """

    param: Tensor
    mean: Tensor
    hess: Tensor
    index: int  # type: ignore[assignment]  # hides tuple.index
    ess: float
    weight_decay: float


class Snapshot(NamedTuple):
    """A copy of what an optimizer has learned.

    Attributes:
        weights: Of the parameters that have state, in the optimizer's order.
        seed: Of the noise, in ``[0, 2^64)``.
    """

    weights: list[TrainedWeight]
    seed: int


def snapshot(
    param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]], seed: int
) -> Snapshot:
    """Copy the means and Hessians of all parameters that have some.

    Args:
        param_groups: The optimizer's, or those of a state dict with parameters in the place of their numbers.
        state: ``mean`` and ``hess`` by parameter. DTensors are gathered, so all their ranks have to call this.
        seed: Of the noise.
    """
    weights = []
    index = 0
    for group in param_groups:
        for param in group["params"]:
            if param in state:
                # A state dict may hold less than float32, or another float than the parameter's: ivon-opt's does.
                dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                mean, hess = (_whole(state[param][key]).to(dtype) for key in ("mean", "hess"))
                weights.append(
                    TrainedWeight(param, mean, hess, index, float(group["ess"]), float(group["weight_decay"]))
                )
            # Frozen and unused parameters count too: the index decides the noise, and must not change with them.
            index += 1
    return Snapshot(weights, seed)


def _whole(value: Tensor) -> Tensor:
    """A copy of a state tensor; of a DTensor all of it, for which its ranks communicate."""
    distributed = sharding.as_dtensor(value)
    value = value if distributed is None else distributed.full_tensor()
    return value.detach().clone(memory_format=torch.contiguous_format)
