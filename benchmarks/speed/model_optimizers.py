"""The optimizers of the whole finetuning step, and what they must get right before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import version
from benchmarks.speed.contenders import BASELINE, IVON_OPT
from benchmarks.speed.ours import ONE_LAUNCH, PLAIN, our_backends, our_name
from ivon_kernels import IVON, available_backends

FOREACH = "AdamW (foreach)"
_LR = 1e-4  # AdamW's
_STEPS = 2  # of the check
# The published recipe (IVON.for_lora), in ivon-opt's terms.
_IVON_OPT_ARGS = {
    "lr": 0.03,
    "ess": 1e7,
    "hess_init": 1e-3,
    "weight_decay": 1e-6,
    "clip_radius": 1e-3,
    "rescale_lr": False,
}
Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Loop:
    """An optimizer's part of a training step: before the forward pass, and after the backward pass."""

    begin: Callable[[], object]
    finish: Callable[[], None]
    rest: Callable[[], object] = lambda: None  # leaves the means in the weights


@dataclass(frozen=True)
class Optimizer:
    """A named optimizer; `build` makes it for parameters."""

    name: str
    build: Callable[[Params], Loop]
    backend: str | None = None  # of ivon_kernels
    mode: str | None = None  # PLAIN or ONE_LAUNCH
    package: str | None = None  # a peer's distribution

    @property
    def ours(self) -> bool:
        """Whether it is of this project."""
        return self.backend is not None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is not None and version(self.package) is None:
            return f"{self.package} is not installed"
        if self.backend is not None:
            return available_backends().get(self.backend, f"this version has no backend {self.backend!r}")
        return None


def optimizers(device: torch.device) -> Sequence[Optimizer]:
    """All of them; the first one is the baseline of the ratios."""
    ours = [
        Optimizer(our_name(backend, mode), _ours(backend, mode == ONE_LAUNCH), backend, mode)
        for backend in our_backends(device)
        for mode in (PLAIN, ONE_LAUNCH)
    ]
    return (
        Optimizer(BASELINE, _adamw(fused=True)),
        *ours,
        Optimizer(FOREACH, _adamw(foreach=True)),
        Optimizer(IVON_OPT, _ivon_opt, package="ivon-opt"),
    )


def _adamw(**options: Any) -> Callable[[Params], Loop]:
    def build(params: Params) -> Loop:
        optimizer = torch.optim.AdamW(params, lr=_LR, **options)

        def finish() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return Loop(lambda: None, finish)

    return build


def _ours(backend: str, one_launch: bool) -> Callable[[Params], Loop]:
    def build(params: Params) -> Loop:
        optimizer = IVON.for_lora(
            params, num_data=10_000, seed=0, backend=backend, sample_in_step=one_launch, mc_samples=1
        )

        def finish() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return Loop(optimizer.train, finish, optimizer.eval)

    return build


def _ivon_opt(params: Params) -> Loop:
    import ivon

    optimizer = ivon.IVON(params, **_IVON_OPT_ARGS)
    block = ExitStack()

    def finish() -> None:
        block.close()
        optimizer.step()
        optimizer.zero_grad()

    return Loop(lambda: block.enter_context(optimizer.sampled_params(train=True)), finish)


def wrong(
    optimizer: Optimizer, params: Params, reset: Callable[[], None], give_gradients: Callable[[], None]
) -> str | None:
    """Why an optimizer must not be timed, or None: two steps from the start on given gradients.

    Ours must equal the reference backend bit for bit. Foreach AdamW may differ from fused AdamW by rounding: the update
    of a step is `lr` at most, and with the same gradients twice only the bias correction `1 - 0.999**t` cancels, which
    multiplies a rounding error by 1000; the weight itself is rounded once in a step. Of the others, weights must be
    finite and changed.

    Args:
        optimizer: What is checked.
        params: The model's trainable parameters.
        reset: Puts their starting values back.
        give_gradients: Puts the gradients in place.
    """

    def weights() -> list[Tensor]:
        return [param.detach().clone() for param in params]

    def after(build: Callable[[Params], Loop]) -> list[Tensor]:
        """The weights that the model has in each step, and those at rest."""
        reset()
        loop = build(params)
        seen = []
        for _ in range(_STEPS):
            loop.begin()
            seen += weights()
            give_gradients()
            loop.finish()
        loop.rest()
        return [*seen, *weights()]

    reset()
    before = weights()
    result = after(optimizer.build)
    if not all(bool(weight.isfinite().all()) for weight in result):
        return "the weights are not finite after two steps; not timed"
    if all(torch.equal(a, b) for a, b in zip(before, result[-len(before) :], strict=True)):
        return "two steps changed nothing; not timed"
    if optimizer.ours:
        expected = after(_ours("reference", optimizer.mode == ONE_LAUNCH))
        if not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
            return "differs from the reference; not timed"
    if optimizer.name == FOREACH:
        expected = after(_adamw(fused=True))
        if not all(_same_but_for_rounding(a, b) for a, b in zip(result, expected, strict=True)):
            return "differs from fused AdamW; not timed"
    return None


def _same_but_for_rounding(actual: Tensor, expected: Tensor) -> bool:
    unit: Any = torch.finfo(actual.dtype).eps
    bound = _STEPS * unit * (expected.abs() + 1000 * _LR)
    return bool(((actual - expected).abs() <= bound).all())
