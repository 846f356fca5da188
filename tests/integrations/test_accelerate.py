"""Accelerate's plain loop: prepared, accumulated, clipped, in mixed precision, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ivon_kernels import IVON
from ivon_kernels.integrations.state_dict import save_mean
from tests.support.helpers import assert_same, snapshot

OPTIONS: dict[str, Any] = {"lr": 0.05, "ess": 50.0, "hess_init": 0.5, "beta2": 0.98, "weight_decay": 1e-3, "seed": 7}
BATCHES = 8
CLIP = 0.5  # binds


def forget_accelerator() -> None:
    """An Accelerator's settings are global, and final."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    yield
    forget_accelerator()


def problem() -> tuple[nn.Module, DataLoader[Any]]:
    torch.manual_seed(0)
    x = torch.randn(4 * BATCHES, 3)
    data: DataLoader[Any] = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), data


class Loop:
    """A training script with Accelerate: AdamW's, plus ``optimizer.train()``."""

    def __init__(self, accumulate: int = 1, precision: str = "no", **options: Any) -> None:
        forget_accelerator()
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulate,
            mixed_precision="no" if precision == "fp16" else precision,
        )
        if precision == "fp16":  # what Accelerator does on a GPU, and refuses to do on a CPU
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)  # type: ignore[attr-defined]
        model, data = problem()
        optimizer = IVON(model.parameters(), **{**OPTIONS, **options})
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=BATCHES)
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, data, scheduler
        )
        self.ivon: IVON = self.optimizer.optimizer

    def run(self, batches: range = range(BATCHES), clip: float | None = None) -> dict[str, Tensor]:
        data = skip_first_batches(self.data, batches.start)
        for _, (x, y) in zip(batches, data, strict=False):
            with self.accelerator.accumulate(self.model):
                self.optimizer.train()
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        self.optimizer.eval()
        return snapshot(self.ivon)


def by_hand(accumulate: int, clip: float | None, precision: str) -> tuple[dict[str, Tensor], float]:
    """The same without Accelerate. Returns the scaler's last scale too."""
    model, data = problem()
    optimizer = IVON(model.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=BATCHES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, enabled=precision == "fp16")  # type: ignore[attr-defined]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    for i, (x, y) in enumerate(data):
        optimizer.train()
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            output = model(x)
        scaler.scale(nn.functional.mse_loss(output.float(), y) / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
    optimizer.eval()
    return snapshot(optimizer), scaler.get_scale()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_a_plain_loop(accumulate: int, clip: float | None, precision: str) -> None:
    """With fp16 the first scales overflow: those steps change nothing and redraw nothing.

    Accelerate calls them, because IVON looks at the scaler itself, and moves the schedule on, as for fused AdamW.
    """
    loop = Loop(accumulate, precision)
    assert isinstance(loop.optimizer, AcceleratedOptimizer) and not hasattr(loop.optimizer, "sampled_params")
    actual = loop.run(clip=clip)
    expected, scale = by_hand(accumulate, clip, precision)
    assert_same(expected, actual)
    steps = int(actual["0.step"])
    if precision == "fp16":
        assert 0 < steps < BATCHES // accumulate and loop.accelerator.scaler.get_scale() == scale < 2.0**18
    else:
        assert steps == BATCHES // accumulate
    if clip is not None and precision == "no":
        assert not torch.equal(by_hand(accumulate, None, precision)[0]["0.hess"], actual["0.hess"])


def test_sample_in_step_changes_nothing() -> None:
    assert_same(Loop().run(), Loop(sample_in_step=True).run())


def test_without_train_the_error_says_what_to_do() -> None:
    loop = Loop()
    x, y = next(iter(loop.data))
    loop.accelerator.backward(nn.functional.mse_loss(loop.model(x), y))
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before the forward pass"):
        loop.optimizer.step()


def test_evaluation_sees_the_mean_and_does_not_disturb() -> None:
    """In the middle of an accumulation of two batches."""
    expected = Loop(accumulate=2).run()
    loop = Loop(accumulate=2)
    loop.run(range(3))
    for p in loop.model.parameters():
        assert torch.equal(p, loop.ivon.state[p]["mean"])
    loop.optimizer.train()
    assert not torch.equal(next(loop.model.parameters()), loop.ivon.state[next(loop.model.parameters())]["mean"])
    assert_same(expected, loop.run(range(3, BATCHES)))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_resumed_equals_uninterrupted(tmp_path: Path, precision: str) -> None:
    expected = Loop(2, precision).run()
    loop = Loop(2, precision)
    loop.run(range(4))
    loop.accelerator.save_state(str(tmp_path))
    resumed = Loop(2, precision, seed=1, lr=1.0)
    torch.manual_seed(99)
    nn.init.zeros_(next(resumed.model.parameters()))
    resumed.accelerator.load_state(str(tmp_path))
    assert_same(snapshot(loop.ivon), snapshot(resumed.ivon))
    assert_same(expected, resumed.run(range(4, BATCHES)))


@pytest.mark.parametrize(
    ("batches", "sampled"),
    [(4, False), (3, False), (3, True)],
    ids=["after a step", "within an accumulation, after eval()", "under the sample"],
)
def test_a_saved_state_holds_the_mean(tmp_path: Path, batches: int, sampled: bool) -> None:
    loop = Loop(accumulate=2)
    loop.run(range(batches))
    if sampled:
        save_mean(loop.model, loop.optimizer)
        loop.optimizer.train()
    loop.accelerator.save_state(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    optimizer = torch.load(tmp_path / "optimizer.bin", weights_only=True)["state"]
    assert len(saved) == len(optimizer) == 4
    for i, (name, p) in enumerate(loop.accelerator.unwrap_model(loop.model).named_parameters()):
        assert torch.equal(saved[name], loop.ivon.state[p]["mean"])
        assert torch.equal(saved[name], optimizer[i]["mean"])
