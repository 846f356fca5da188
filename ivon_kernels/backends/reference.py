"""The defining equations of IVON in plain PyTorch: boring and complete. Every other backend is tested against it.

IVON (Shen et al., ICML 2024, arXiv 2402.17641, algorithm 1) keeps a Gaussian with mean m and variance
1 / (ess (h + weight_decay)) over the weights. The compiled backends perform the same individually rounded operations in
the same order (csrc/ivon_math.h), so that float32 results are equal bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ivon_kernels import noise
from ivon_kernels.backends.base import Backend, Draw, Launch
from ivon_kernels.backends.state import ParamState
from ivon_kernels.hyperparameters import StepScalars


class Precision(Protocol):
    """What a standard deviation depends on besides the Hessian."""

    @property
    def ess(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


def inv_sigma(hess: Tensor, k: Precision) -> Tensor:
    """1 / sigma = sqrt(ess (h + d)), elementwise."""
    return noise.sqrt((hess + k.weight_decay) * k.ess)


def draw_weights(mean: Tensor, hess: Tensor, eps: Tensor, k: Precision) -> Tensor:
    """Theta = m + sigma eps, elementwise."""
    return mean + eps / inv_sigma(hess, k)


def update(
    grad: Tensor, second: Tensor, mean: Tensor, momentum: Tensor, hess: Tensor, k: StepScalars
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of IVON.

    Args:
        grad: Sum over the MC samples of the gradients at the sampled weights.
        second: Sum over the MC samples of ``g * eps`` (price) or ``g * g`` (gradsq).
        mean, momentum, hess: State before the step.
        k: Scalars of the step.

    Returns:
        New mean, momentum and hess. All tensors are elementwise of one shape and dtype.
    """
    grad = grad * k.grad_scale
    second = second * k.second_scale
    precision = hess + k.weight_decay
    hess_estimate = second * k.ess if k.gradsq else second * noise.sqrt(precision * k.ess)
    momentum = momentum * k.beta1 + grad * k.one_minus_beta1
    # b2 h + (1 - b2) h^ + (1 - b2)^2 (h - h^)^2 / (2 (h + d)), written around h: small changes keep their precision.
    delta = (hess_estimate - hess) * k.one_minus_beta2
    hess = (hess + (delta + (delta * 0.5) * (delta / precision))).clamp(k.hess_floor, k.hess_ceiling)
    direction = (momentum * k.inv_debias + mean * k.weight_decay) / (hess + k.weight_decay)
    mean = mean - direction.clamp(-k.clip_radius, k.clip_radius) * k.lr
    return mean, momentum, hess


def _eps(state: ParamState, draw: Draw) -> Tensor:
    numel, device, (start, run, pitch) = state.param.numel(), state.param.device, state.placement
    stream = {
        "seed": draw.seed,
        "step": state.step if draw.step is None else draw.step,
        "sample": draw.sample,
        "replica": draw.replica,
        "param": state.index,
    }
    if run >= numel:
        z = noise.normals(numel, start=start, device=device, **stream)
    else:
        i = torch.arange(numel, dtype=torch.int64, device=device)
        z = noise.normals_at(start + i // run * pitch + i % run, **stream)
    return z.view(state.param.shape).to(state.mean.dtype)


def _statistics(state: ParamState, draw: Draw, k: StepScalars) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian statistic of the sample `draw`."""
    if state.grad is None:
        return torch.zeros_like(state.mean), torch.zeros_like(state.mean)
    grad = state.grad.detach().to(state.mean.dtype)
    return grad, grad * (grad if k.gradsq else _eps(state, draw))


class ReferenceBackend(Backend):
    """Plain PyTorch on any device; float32 state, or float64 for float64 parameters."""

    name = "reference"
    compiled = False

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def sample(self, launch: Launch, draw: Draw, adopt: bool) -> None:
        for state in launch.states:
            if adopt:
                state.adopt_edits()
            k = launch.scalars.scalars(state.group, state.step)
            state.param.detach().copy_(draw_weights(state.mean, state.hess, _eps(state, draw), k))

    def restore(self, launch: Launch) -> None:
        for state in launch.states:
            state.param.detach().copy_(state.mean)

    def find_nonfinite(self, launch: Launch) -> int | None:
        for position, state in enumerate(launch.states):
            if state.grad is not None and not bool(torch.isfinite(state.grad).all()):
                return position
        return None

    def accumulate(self, launch: Launch, draw: Draw) -> None:
        for state in launch.states:
            assert state.sums is not None
            k = launch.scalars.scalars(state.group, state.step)
            for total, value in zip(state.sums, _statistics(state, draw, k), strict=True):
                total += value

    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool) -> None:
        for state in launch.states:
            if adopt:
                state.adopt_edits()
            k = launch.scalars.scalars(state.group, state.step)
            grad, second = _statistics(state, draw, k)
            if state.sums is not None:
                grad, second = state.sums[0] + grad, state.sums[1] + second
            new = update(grad, second, state.mean, state.momentum, state.hess, k)
            for old, value in zip((state.mean, state.momentum, state.hess), new, strict=True):
                old.copy_(value)
            weights = state.mean
            if draw_next:
                eps = _eps(state, draw._replace(sample=0, step=state.step + 1))
                weights = draw_weights(state.mean, state.hess, eps, k)
            state.param.detach().copy_(weights)
            state.arena.steps[state.position] += 1
