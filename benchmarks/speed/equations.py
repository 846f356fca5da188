"""IVON without a kernel: what torch.compile makes of the functions of `backends/reference.py`.

This is not the `reference` backend, whose host code cannot be compiled, but its functions (noise, sample, update) over
flat tensors of all elements together. That flatters it: one tensor instead of hundreds, no bookkeeping, no check for
edits or for inf and nan, no bias correction. Its bits are not ours: the compiler contracts and approximates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from benchmarks.speed.contender import Parameters, Recipe, Step
from ivon_kernels import noise
from ivon_kernels.backends.reference import draw_weights, update
from ivon_kernels.hyperparameters import StepScalars

_BETA1, _BETA2, _WEIGHT_DECAY = 0.9, 0.99999, 1e-4  # IVON's defaults


def _scalars(lr: float, ess: float, hess_init: float) -> StepScalars:
    return StepScalars(
        ess=ess,
        weight_decay=_WEIGHT_DECAY,
        beta1=_BETA1,
        one_minus_beta1=1 - _BETA1,
        one_minus_beta2=1 - _BETA2,
        inv_debias=1.0,
        lr=lr * (hess_init + _WEIGHT_DECAY),
        clip_radius=math.inf,
        hess_floor=0.0,
        hess_ceiling=1e30,
        grad_scale=1.0,
        second_scale=1.0,
        gradsq=0.0,
    )


def normals(like: Tensor, count: Tensor) -> Tensor:
    """The normals of one step for a flat tensor; `count` is the step as an int64 scalar on the device.

    As :func:`ivon_kernels.noise.normals` for seed, sample, replica and parameter 0, in one piece and without the step
    as a Python number, which would compile anew for every step.
    """
    block = torch.arange((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    zeros = torch.zeros_like(block)
    counter = torch.stack((block, zeros, zeros + count, zeros), dim=-1)
    w0, w1, w2, w3 = noise.philox4x32(counter, (0, 0)).unbind(-1)
    z = torch.stack((*noise.box_muller(w0, w1), *noise.box_muller(w2, w3)), dim=-1)
    return z.flatten()[: like.numel()]


def _sample(param: Tensor, mean: Tensor, hess: Tensor, count: Tensor, k: StepScalars) -> None:
    param.copy_(draw_weights(mean, hess, normals(mean, count), k))


def _update(param: Tensor, grad: Tensor, state: tuple[Tensor, Tensor, Tensor], count: Tensor, k: StepScalars) -> None:
    mean, momentum, hess = state
    g = grad.to(mean.dtype)
    new = update(g, g * normals(mean, count), mean, momentum, hess, k)
    for old, value in zip(state, new, strict=True):
        old.copy_(value)
    param.copy_(new[0])


@cache
def _compiled() -> tuple[Callable[..., None], ...]:
    compile_one = cast("Callable[..., Callable[..., None]]", torch.compile)
    return tuple(compile_one(function, dynamic=True) for function in (_sample, _update))  # once for all sizes


def build(params: Parameters, recipe: Recipe) -> Step:
    """The compiled sample and update over all elements; it takes the parameters' memory."""
    sample, update_ = _compiled()
    k = _scalars(**recipe.ivon)
    flat = torch.cat([param.detach().flatten() for param in params])
    grad = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    for param in params:  # the flat copies replace them
        param.data, param.grad = param.data.new_empty(0), None
    mean = flat.float() if flat.dtype != torch.float32 else flat.clone()
    state = (mean, torch.zeros_like(mean), torch.full_like(mean, recipe.ivon["hess_init"]))
    count = torch.zeros((), dtype=torch.int64, device=mean.device)

    @torch.no_grad()
    def step() -> None:
        sample(flat, mean, state[2], count, k)
        update_(flat, grad, state, count, k)
        count.add_(1)

    return Step(step, tensors=lambda: [flat])
