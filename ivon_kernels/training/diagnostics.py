"""Is the optimizer learning anything? Summaries of the posterior: of a parameter group, and of all in four numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivon_kernels.backends.state import STATE_KEYS, ParamState
from ivon_kernels.hyperparameters import StepScalars, group_scalars, inv_debias

__all__ = ["Elements", "elements", "glance", "quantiles", "root_mean_square", "summarize"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MAX_ELEMENTS = 2**22  # a summary of more is one of a regular subsample of about this many
_GLANCE = 2**14  # the median of so many is that of all but for half a percent of the ranks


class Elements(NamedTuple):
    """Elements of some parameters, or a regular subsample of them: float64 ``[n]`` on the CPU.

    Attributes:
        mean: The mean.
        hess: The Hessian estimate.
        sigma: ``1 / sqrt(ess (hess + weight_decay))``.
        hess_over_init: ``hess / hess_init``.
        direction: Of the last update, before clipping: ``(momentum + weight_decay mean) / (hess + weight_decay)``.
        clip_radius: The bound on it.
        owner: int64 ``[n]``, the position of each element's parameter.
    """

    mean: Tensor
    hess: Tensor
    sigma: Tensor
    hess_over_init: Tensor
    direction: Tensor
    clip_radius: Tensor
    owner: Tensor

    @property
    def clipped(self) -> float:
        """The share of elements whose last direction the clip radius binds."""
        return float((self.direction.abs() >= self.clip_radius).double().mean())


def _whole_numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _positions(sizes: Tensor, offsets: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Every `stride`-th element of parameters that lie at `offsets` in an arena, and whose it is."""
    counts = -(-sizes // stride)
    owner = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return offsets[owner] + (torch.arange(len(owner), dtype=torch.int64, device="cpu") - first[owner]) * stride, owner


def elements(groups: Sequence[dict[str, Any]], states: Sequence[ParamState], limit: int = _MAX_ELEMENTS) -> Elements:
    """What the summaries are made of: one look at each arena, however many parameters it has.

    Args:
        groups: The optimizer's ``param_groups``.
        states: Of the parameters; none of them empty.
        limit: About how many elements to look at.
    """
    total = sum(state.param.numel() for state in states)
    # Odd, lest it falls on the same columns of every matrix.
    stride = 1 if total <= limit else -(-total // limit) | 1
    arenas = list(dict.fromkeys(state.arena for state in states))
    parts: list[tuple[Tensor, ...]] = []
    for arena in arenas:
        inside = [number for number, state in enumerate(states) if state.arena is arena]
        sizes = _whole_numbers([states[number].param.numel() for number in inside])
        offsets = _whole_numbers([arena.offsets[states[number].position] for number in inside])
        where, owner = _positions(sizes, offsets, stride)
        steps = arena.steps.tolist()
        # Of the last update: the momentum that is there now went into that one.
        debias = [inv_debias(groups[states[n].group], max(steps[states[n].position] - 1, 0)) for n in inside]
        at = where.to(arena.mean.device)
        values = [getattr(arena, key)[at].double().cpu() for key in STATE_KEYS]
        parts.append(
            (*values, torch.tensor(debias, dtype=torch.float64, device="cpu")[owner], _whole_numbers(inside)[owner])
        )
    mean, momentum, hess, debias_of, owner = (torch.cat(column) for column in zip(*parts, strict=True))
    scalars = [group_scalars(group, 1.0, 1) for group in groups]
    group_of = _whole_numbers([state.group for state in states])[owner]
    ess, decay, clip, init = _columns(groups, scalars)[:, group_of]
    precision = hess + decay
    return Elements(
        mean=mean,
        hess=hess,
        sigma=(ess * precision).rsqrt(),
        hess_over_init=hess / init,
        direction=(momentum * debias_of + decay * mean) / precision,
        clip_radius=clip,
        owner=owner,
    )


def _columns(groups: Sequence[dict[str, Any]], scalars: list[StepScalars]) -> Tensor:
    """By group: ess, weight decay, clip radius and initial Hessian."""
    rows = [
        (row.ess, row.weight_decay, row.clip_radius, float(group["hess_init"]))
        for group, row in zip(groups, scalars, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").T


def quantiles(values: Tensor) -> dict[float, float]:
    """The values at `QUANTILES`."""
    levels = torch.tensor(QUANTILES, dtype=values.dtype, device="cpu")
    return dict(zip(QUANTILES, torch.quantile(values, levels).tolist(), strict=True))


def root_mean_square(found: Elements) -> float:
    """The size of the weights: of those tensors that are not all zero, as LoRA's B is at first; nan if all are."""
    squares = found.mean.square()
    of_each = torch.zeros(int(found.owner.max()) + 1, dtype=torch.float64, device="cpu").index_add_(
        0, found.owner, squares
    )
    nonzero = of_each[found.owner] > 0
    return math.sqrt(float(squares[nonzero].mean())) if bool(nonzero.any()) else math.nan


def summarize(
    groups: Sequence[dict[str, Any]], states: Sequence[ParamState], limit: int = _MAX_ELEMENTS
) -> dict[str, Any]:
    """Summary of one parameter group's states; see :meth:`ivon_kernels.IVON.diagnostics`."""
    states = [state for state in states if state.param.numel()]
    if not states:
        return {"elements": 0, "steps": 0}
    found = elements(groups, states, limit)
    steps = {arena: arena.steps.tolist() for arena in {state.arena for state in states}}
    return {
        "elements": sum(state.param.numel() for state in states),
        "steps": max(steps[state.arena][state.position] for state in states),
        "sigma": quantiles(found.sigma),
        "snr": quantiles(found.mean.abs() / found.sigma),
        "hess_over_init": quantiles(found.hess_over_init),
        "clipped": found.clipped,
        "weights": root_mean_square(found),
        "direction": quantiles(found.direction.abs()),
        "step": math.sqrt(float(found.direction.clamp(-found.clip_radius, found.clip_radius).square().mean())),
    }


def glance(groups: Sequence[dict[str, Any]], states: Sequence[ParamState]) -> dict[str, float]:
    """The posterior in four numbers, over all groups; see :meth:`ivon_kernels.IVON.glance`."""
    states = [state for state in states if state.param.numel()]
    if not states:
        return {}
    found = elements(groups, states, _GLANCE)
    return {
        "sigma": float(found.sigma.median()),
        "snr": float((found.mean.abs() / found.sigma).median()),
        "clipped": found.clipped,
        "hess": float(found.hess_over_init.median()),
    }
