"""One finetuning run: optimizers, training loop, timing, and stopping on Ctrl-C."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.data import Batch
from benchmarks.finetune.settings import Settings
from ivon_kernels import IVON


class Interrupted(Exception):
    """Ctrl-C was pressed, or SIGTERM came; raised between two steps, where nothing is half done."""


class InterruptGuard:
    """Turns the first Ctrl-C or SIGTERM into a request that the loops see between steps; a second one stops at once.

    SIGTERM is what schedulers, containers and `timeout` send before they kill.

    Interrupted ends its block quietly; `interrupted` says so afterwards.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)
    requested = interrupted = False

    def check(self) -> None:
        """Raises Interrupted if one of them came."""
        if self.requested:
            raise Interrupted

    def __enter__(self) -> InterruptGuard:
        self._previous = {number: signal.signal(number, self._on_interrupt) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.interrupted = kind is Interrupted
        return self.interrupted

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class Training:
    """What a training loop did, and how long it took."""

    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def optimizer_ms(self) -> float:
        """Median milliseconds per step that the optimizer took, drawing samples included."""
        return 1e3 * statistics.median(self.optimizer_seconds) if self.optimizer_seconds else 0.0

    def record(self) -> dict[str, Any]:
        """The training as JSON can hold it."""
        return {name: getattr(self, name) for name in ("steps", "seconds", "optimizer_ms", "losses")}


def make_optimizer(name: str, parameters: list[nn.Parameter], settings: Settings, count: int) -> torch.optim.Optimizer:
    """AdamW (PyTorch's fused one where there is one) or IVON by its recipe for LoRA, for `count` training examples."""
    if name == "adamw":
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, settings.adamw_lr, weight_decay=settings.weight_decay, fused=fused)
    names = ("ess", "hess_init", "beta2", "weight_decay", "clip_radius", "seed")
    options = {name: getattr(settings, name) for name in names}
    if settings.ivon_lr is None:
        options |= {"learning_rate": settings.adamw_lr, "steps": settings.steps}
        options |= {"epochs": settings.steps * settings.batch_size / count}
    return IVON.for_lora(parameters, count, lr=settings.ivon_lr, **options)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def cross_entropy(score: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Mean negative log-likelihood of a batch's labels, by the class logits of `score`, in nats."""
    return nn.functional.cross_entropy(score(batch), batch.labels)


def train(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batches: Iterator[Batch],
    *,
    steps: int,
    seed: int,  # of the dropout: the same for every optimizer
    guard: InterruptGuard,
    on_step: Callable[[float], None],  # called with every step's loss
    around: Callable[[], AbstractContextManager[Any]] | None = None,
    schedule: Callable[[int], float] | None = None,  # factor on the learning rate by step
    after_step: Callable[[int], None] | None = None,  # called with the number of steps done
) -> Training:
    """Trains on batches without end for so many steps, or until Ctrl-C; None as schedule falls linearly to zero.

    `around` is entered before the forward and left after the backward pass of every step, and its time counts as the
    optimizer's; None is IVON's sample, or nothing.
    """
    if around is None:
        around = partial(optimizer.sampled_params, train=True) if isinstance(optimizer, IVON) else nullcontext
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or partial(linear, steps=steps))
    training = Training(optimizer)
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    model.train()
    started = _now(device)
    while training.steps < steps and not guard.requested:
        batch = next(batches)
        before = _now(device)
        with around():
            ready = _now(device)
            loss = loss_of(batch)
            loss.backward()
            backward = _now(device)
        optimizer.step()
        training.optimizer_seconds.append((ready - before) + (_now(device) - backward))
        scheduler.step()
        optimizer.zero_grad()
        training.losses.append(loss.item())
        on_step(training.losses[-1])
        if after_step is not None:
            after_step(training.steps)
    training.seconds = _now(device) - started
    return training


def linear(step: int, steps: int) -> float:
    """From 1 to 0 without warmup."""
    return 1 - step / steps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
