"""What several test files share: small training loops, ivon-opt fed with our normals, and the equations in float64."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, noise

Loss = Callable[[Sequence[Tensor], int], Tensor]


OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01}
"""Settings under which everything moves visibly within a few steps."""


def slow_but(values: Iterable[Any], *daily: Any) -> list[Any]:
    """The values of a parameter, of which daily work (``-m "not slow"``) runs those that are named here alone."""
    return [value if value in daily else pytest.param(value, marks=pytest.mark.slow) for value in values]


def parameters(*shapes: int | tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """Parameters of the given shapes, normal, the same float32 values (rounded to ``dtype``) for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.empty(shape).normal_(generator=generator).to(dtype)) for shape in shapes]


def bowl(params: Sequence[Tensor], step: int) -> Tensor:
    """A convex loss, not quadratic, whose minimum moves with the step: every state variable keeps changing."""
    terms = [(p - 0.3 * math.sin(0.1 * step + i)).cosh().sum() * (0.5 + 0.5 * i) for i, p in enumerate(params)]
    return torch.stack(terms).sum()


def train(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: int,
    *,
    samples: int = 1,
    start: int = 0,
    loss: Loss = bowl,
) -> list[Tensor]:
    """ivon-opt's loop. Returns the flattened mean after every step."""
    trajectory = []
    for step in range(start, start + steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):  # type: ignore[attr-defined]
                optimizer.zero_grad()
                loss(params, step).backward()
        optimizer.step()
        trajectory.append(flat(params))
    return trajectory


def train_modes(
    optimizer: IVON, params: Sequence[Tensor], steps: int, *, samples: int = 1, start: int = 0, loss: Loss = bowl
) -> list[Tensor]:
    """The same training as `train`, by ``train()``, ``next_sample()`` and ``eval()``."""
    trajectory = []
    for step in range(start, start + steps):
        for sample in range(samples):
            if sample:
                optimizer.next_sample()
            optimizer.train()
            optimizer.zero_grad()
            loss(params, step).backward()
        optimizer.step()
        optimizer.eval()
        trajectory.append(flat(params))
    return trajectory


def two_groups(
    backend: str, dtype: torch.dtype = torch.float32, seed: int = 5, **options: Any
) -> tuple[IVON, list[nn.Parameter]]:
    """Two groups with different hyperparameters; ``seed`` is that of weights and noise alike."""
    params = parameters((4, 3), 5, 1, dtype=dtype, seed=seed)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, "beta1": 0.8, "hess_init": 0.2}]
    return IVON(groups, backend=backend, seed=seed, **{**OPTIONS, **options}), params


def put(params: list[nn.Parameter], values: list[nn.Parameter]) -> None:
    """What a model's load_state_dict does."""
    with torch.no_grad():
        for p, v in zip(params, values, strict=True):
            p.copy_(v)


def through_file(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of ``tensors`` as one detached copy."""
    return torch.cat([t.detach().clone().flatten() for t in tensors])


def state(optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    """``momentum`` or ``hess`` of every parameter, flat and in order, of ours or of ivon-opt."""
    if isinstance(optimizer, IVON):
        return flat([optimizer.state[p][key] for group in optimizer.param_groups for p in group["params"]])
    return flat([group[key] for group in optimizer.param_groups])


def snapshot(optimizer: IVON) -> dict[str, Tensor]:
    """Copies of everything that a step may change: the parameters and every tensor of the state."""
    result = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        result[f"{i}.param"] = p.detach().clone()
        for key, value in optimizer.state[p].items():
            result[f"{i}.{key}"] = value.clone() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    return result


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit, NaN equal to NaN."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(
            right[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Greatest absolute difference over the greatest expected magnitude, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def sample_of(optimizer: IVON, step: int, sample: int = 0) -> list[Tensor]:
    """What the weights are under one sample, in the state's precision, from the public state and the public noise."""
    result = []
    index = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            s = optimizer.state[p]
            eps = noise.normals(p.numel(), seed=optimizer.seed, step=step, sample=sample, param=index).view(p.shape)
            sigma = (group["ess"] * (s["hess"].double() + group["weight_decay"])).rsqrt()
            result.append(s["mean"].double() + sigma * eps.double())
            index += 1
    return result


@contextlib.contextmanager
def normals_computed_once() -> Iterator[None]:
    """Remembers the noise's normals, for many runs that see the same ones: plain PyTorch takes its time for them."""
    known = functools.cache(noise.normals)
    with mock.patch.object(noise, "normals", lambda *args, **options: known(*args, **options).clone()):
        yield


@contextlib.contextmanager
def fed_with_our_normals(
    seed: int, numels: Sequence[Sequence[int]], samples: int = 1, first_step: int = 0
) -> Iterator[None]:
    """Answers ivon-opt's draws, one ``torch.randn`` for each group and sample, with the normals that ours would use.

    Args:
        seed: Our seed.
        numels: For every group, the sizes of its parameters.
        samples: MC samples drawn in every step.
        first_step: The noise's ``step`` of the first draw; training counts from 0.
    """
    offsets = [sum(len(group) for group in numels[:g]) for g in range(len(numels))]
    calls = 0

    def randn(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        nonlocal calls
        drawn, group = divmod(calls, len(numels))
        calls += 1
        step, sample = divmod(drawn, samples)
        values = torch.cat(
            [
                noise.normals(n, seed=seed, step=first_step + step, sample=sample, param=offsets[group] + i)
                for i, n in enumerate(numels[group])
            ]
        )
        assert torch.Size(size if isinstance(size[0], int) else size[0]) == values.shape
        return values.to(dtype)

    with mock.patch("torch.randn", randn):
        yield


class Equations:
    """DESIGN section 2 in float64, one tensor at a time and nothing else: what the optimizer is compared with."""

    def __init__(self, mean: Tensor, group: dict[str, Any]) -> None:
        self.mean = mean.detach().double().clone()
        self.group = {k: v for k, v in group.items() if k != "params"}
        self.momentum = torch.zeros_like(self.mean)
        self.hess = torch.full_like(self.mean, group["hess_init"])
        self.count = 0

    def sigma(self) -> Tensor:
        return (self.group["ess"] * (self.hess + self.group["weight_decay"])).rsqrt()

    def update(self, grads: Sequence[Tensor], eps: Sequence[Tensor]) -> None:
        """One step from the gradient and the noise of every MC sample."""
        h = self.group
        self.count += 1
        grads = [g.double() for g in grads]
        grad = sum(grads) / len(grads)
        if h["hess_approx"] == "price":
            estimate = sum(g * e.double() for g, e in zip(grads, eps, strict=True)) / len(grads) / self.sigma()
        else:
            estimate = h["ess"] * sum(g * g for g in grads) / len(grads)
        b1, b2, decay = h["beta1"], h["beta2"], h["weight_decay"]
        self.momentum = b1 * self.momentum + (1 - b1) * grad
        correction = 0.5 * (1 - b2) ** 2 * (self.hess - estimate) ** 2 / (self.hess + decay)
        self.hess = b2 * self.hess + (1 - b2) * estimate + correction
        momentum = self.momentum / (1 - b1**self.count) if h["debias"] else self.momentum
        lr = h["lr"] * (h["hess_init"] + decay) if h["rescale_lr"] else h["lr"]
        direction = (momentum + decay * self.mean) / (self.hess + decay)
        self.mean = self.mean - lr * direction.clamp(-h["clip_radius"], h["clip_radius"])
