"""One finetuning run: optimizers, training loop, timing, and stopping on Ctrl-C."""

from __future__ import annotations

import functools
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.data import Batch
from benchmarks.finetune.settings import Settings
from ivon_kernels import IVON


class Interrupted(Exception):
    """Ctrl-C was pressed; raised between two steps, where nothing is half done."""


class InterruptGuard:
    """Turns the first Ctrl-C into a request that the loops see between steps; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raises Interrupted if Ctrl-C was pressed."""
        if self.requested:
            raise Interrupted

    def __enter__(self) -> InterruptGuard:
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._previous)

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


def make_optimizer(name: str, parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW (PyTorch's fused one where there is one) or IVON with the paper's switches for LoRA."""
    if name == "adamw":
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, settings.adamw_lr, weight_decay=settings.weight_decay, fused=fused)
    return IVON(
        parameters,
        settings.ivon_lr,
        settings.ess,
        hess_init=settings.hess_init,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        clip_radius=settings.clip_radius,
        rescale_lr=False,
        seed=settings.seed,
    )


def train(
    name: str,
    model: nn.Module,
    score: Callable[[Batch], Tensor],
    batches: Iterator[Batch],
    settings: Settings,
    guard: InterruptGuard,
    on_step: Callable[[float], None],
) -> Training:
    """Trains the model's trainable parameters for `settings.steps` steps, or until Ctrl-C.

    Args:
        name: "adamw" or "ivon".
        model: the model in which `score` computes.
        score: class logits of a batch.
        batches: training batches without end.
        settings: the hyperparameters.
        guard: asked before every step.
        on_step: called with every step's loss.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(name, parameters, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    step = _ivon_step if isinstance(optimizer, IVON) else _plain_step
    training = Training(optimizer)
    clock = _clock(parameters[0].device)

    def loss_of(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(score(batch), batch.labels)

    torch.manual_seed(settings.seed)  # the same dropout for every optimizer
    model.train()
    started = clock()
    while training.steps < settings.steps and not guard.requested:
        loss, seconds = step(optimizer, functools.partial(loss_of, next(batches)), clock)
        schedule.step()
        optimizer.zero_grad()
        training.losses.append(loss)
        training.optimizer_seconds.append(seconds)
        on_step(loss)
    training.seconds = clock() - started
    return training


def _plain_step(optimizer: Any, loss_of: Callable[[], Tensor], clock: Callable[[], float]) -> tuple[float, float]:
    loss = loss_of()
    loss.backward()
    before = clock()
    optimizer.step()
    return loss.item(), clock() - before


def _ivon_step(optimizer: Any, loss_of: Callable[[], Tensor], clock: Callable[[], float]) -> tuple[float, float]:
    before = clock()
    with optimizer.sampled_params(train=True):
        sampled = clock()
        loss = loss_of()
        loss.backward()
        backward = clock()
    optimizer.step()
    return loss.item(), (sampled - before) + (clock() - backward)


def _clock(device: torch.device) -> Callable[[], float]:
    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
