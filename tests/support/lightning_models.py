"""Small Lightning modules with known answers, and a quiet Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ivon_kernels import IVON
from tests.support.known_curvature import initial_weights, quadratic

for package in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(package).setLevel(logging.ERROR)

MOVING: dict[str, Any] = {"lr": 0.05, "ess": 50.0, "hess_init": 0.5, "beta2": 0.98, "weight_decay": 1e-3, "seed": 7}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


class Quadratic(LightningModule):
    """The loss of known curvature; the batches' targets average to the initial weights."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_weights())
        self.options = options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return quadratic(self.weight, batch.float())

    def configure_optimizers(self) -> Any:
        return IVON([self.weight], **self.options)


def targets(number: int) -> DataLoader[float]:
    """Batches of one number each, alternating in sign."""
    return DataLoader([0.1 * (-1.0) ** i for i in range(number)], batch_size=1)  # type: ignore[arg-type]


def trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that writes nothing."""
    return Trainer(**{**QUIET, **options})


def fp16(init_scale: float = 2.0**14) -> MixedPrecision:
    """16-mixed, which Lightning itself offers on a GPU only."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))  # type: ignore[attr-defined]


def weights_and_state(module: nn.Module, optimizer: IVON) -> Iterator[Tensor]:
    """Copies of everything that training changes."""
    for p in module.parameters():
        yield p.detach().clone()
        for value in optimizer.state[p].values():
            yield value.clone()


def optimizer_of(fitted: Trainer) -> IVON:
    return fitted.optimizers[0]  # type: ignore[return-value]


def data() -> DataLoader[Any]:
    """Eight batches of four rows of a linear problem."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator)
    return DataLoader([(x[i], x[i].sum(0, keepdim=True) + 0.1) for i in range(32)], batch_size=4)  # type: ignore[arg-type]


class Regression(LightningModule):
    """Notes in `seen` whether each call of a step ran at the mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.options = {**MOVING, **options}
        self.seen: list[tuple[str, bool]] = []

    def at_mean(self) -> bool:
        optimizer = optimizer_of(self.trainer)
        return all(torch.equal(p, optimizer.state[p]["mean"]) for p in self.net.parameters())

    def run_on(self, batch: Any, stage: str) -> Tensor:
        if self.trainer.optimizers:
            self.seen.append((stage, self.at_mean()))
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.run_on(batch, "train")

    def configure_optimizers(self) -> Any:
        return IVON(self.parameters(), **self.options)


def by_hand(accumulate: int = 1, epochs: int = 1, **options: Any) -> list[Tensor]:
    """What a plain loop learns from the same data."""
    module = Regression(**options)
    optimizer = IVON(module.parameters(), **module.options)
    for _ in range(epochs):
        for i, (x, y) in enumerate(data()):
            optimizer.train()
            if i % accumulate == 0:
                optimizer.zero_grad()
            (nn.functional.mse_loss(module.net(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
    return list(weights_and_state(module, optimizer))


def learned(module: LightningModule) -> list[Tensor]:
    return list(weights_and_state(module, optimizer_of(module.trainer)))


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
