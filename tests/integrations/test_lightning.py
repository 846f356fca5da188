"""Lightning, really run: the Hessian estimate in every combination of its features, and the mean wherever it looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.integrations.lightning import IVONCallback
from tests.support.helpers import slow_but, state
from tests.support.known_curvature import NOISE_ONLY, expected_hessian, hessian_tolerance
from tests.support.lightning_models import (
    MOVING,
    QUIET,
    Quadratic,
    Regression,
    assert_equal,
    by_hand,
    data,
    fp16,
    learned,
    optimizer_of,
    targets,
    trainer,
    weights_and_state,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
    # Lightning 2.6 asks torch's pytree in a way that torch 2.13 deprecates.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # Advice about worker processes, which toy data do not need.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of the checkpoints, in the test of resuming
    pytest.mark.filterwarnings(r"ignore:The '.*_dataloader' does not have many workers"),
]

STEPS = 60
PRECISIONS: dict[str, Any] = {
    "32": dict,
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [fp16()]},
}
CLIPPING: dict[str, Any] = {
    "unclipped": {},
    "norm": {"gradient_clip_val": 1e9},
    "value": {"gradient_clip_val": 1e9, "gradient_clip_algorithm": "value"},
}
advice = pytest.mark.filterwarnings("ignore:gradient_clip_val")  # tested by itself below


class Evaluated(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.run_on(batch, "validate")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.run_on(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.run_on(batch, "predict")


def fitted(module: LightningModule, *callbacks: Callback, **options: Any) -> LightningModule:
    trainer(callbacks=[IVONCallback(), *callbacks], **options).fit(module, data())
    return module


# ---- the Hessian on a problem of known curvature ---------------------------------------------------------------------


@advice
@pytest.mark.parametrize("accumulate", slow_but([1, 2], 2))
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_hessian_is_right_in_every_combination(precision: str, clipping: str, accumulate: int) -> None:
    module = Quadratic(NOISE_ONLY)
    fit = trainer(
        callbacks=[IVONCallback()],
        accumulate_grad_batches=accumulate,
        **CLIPPING[clipping],
        **PRECISIONS[precision](),
    )
    fit.fit(module, targets(STEPS * accumulate))
    optimizer = optimizer_of(fit)
    steps = int(optimizer.state[module.weight]["step"])
    if precision == "16-mixed":
        assert 0 < STEPS - steps < 5, "the first scales overflow in float16"
    else:
        assert steps == STEPS
    hess = float(state(optimizer, "hess").mean())
    assert hess == pytest.approx(expected_hessian(steps), abs=hessian_tolerance())
    assert optimizer._step_supports_amp_scaling is True


@advice
@pytest.mark.parametrize("clipping", CLIPPING)
def test_without_accumulation_the_closure_is_enough(clipping: str) -> None:
    module = Regression()
    trainer(**CLIPPING[clipping]).fit(module, data())
    assert_equal(learned(module), by_hand())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 2}, "IVONCallback"),
        ({"plugins": [fp16()]}, "without a sample"),
    ],
    ids=["accumulation", "16-mixed"],
)
def test_where_the_closure_is_not_enough_the_error_says_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        trainer(**options).fit(Regression(), data())


# ---- the same numbers as a plain loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_training_equals_a_plain_loop(accumulate: int) -> None:
    module = fitted(Regression(), accumulate_grad_batches=accumulate)
    assert_equal(learned(module), by_hand(accumulate))
    assert module.seen == [("train", False)] * 8


def test_sample_in_step_changes_nothing() -> None:
    assert_equal(learned(fitted(Regression(sample_in_step=True))), by_hand())


def test_several_samples_through_the_closure() -> None:
    module = fitted(Regression(mc_samples=2))
    assert [stage for stage, _ in module.seen] == ["train"] * 16
    other = Regression(mc_samples=2)
    optimizer = IVON(other.parameters(), **other.options)
    for x, y in data():
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.mse_loss(other.net(x), y).backward()
        optimizer.step()
    assert_equal(learned(module), list(weights_and_state(other, optimizer)))


class Once(Regression):
    """Skips its second batch, by returning no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Manual(Regression):
    """Manual optimization, sampling in one of several ways; a second optimizer trains a parameter by SGD."""

    def __init__(self, way: str, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way = way
        self.accumulate = accumulate
        self.other = nn.Parameter(torch.ones(2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        ivon, sgd = self.optimizers()  # type: ignore[misc]
        sgd.zero_grad()
        self.manual_backward(self.other.square().sum())
        sgd.step()
        if batch_idx % self.accumulate == 0:
            ivon.zero_grad()
        if self.way == "train":
            ivon.train()
        if self.way == "block":
            with ivon.sampled_params(train=True):
                self.manual_backward(self.run_on(batch, "train"))
        else:
            self.manual_backward(self.run_on(batch, "train") / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            ivon.step()

    def configure_optimizers(self) -> Any:
        return [IVON(self.net.parameters(), **self.options), torch.optim.SGD([self.other], lr=0.1)]


@pytest.mark.parametrize("way", ["callback", "train", "block"])
@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_manual_optimization_equals_a_plain_loop(way: str, precision: str) -> None:
    """``self.optimizers()`` gives wrappers that pass for the optimizer's class."""
    accumulate = 1 if way == "block" else 2
    module = Manual(way, accumulate)
    callbacks = [IVONCallback()] if way == "callback" else []
    plugins = {"plugins": [fp16(2.0**6)]} if precision == "16-mixed" else {}
    trainer(callbacks=callbacks, **plugins).fit(module, data())
    assert module.seen == [("train", False)] * 8
    actual = list(weights_and_state(module.net, optimizer_of(module.trainer)))
    if precision == "32":
        assert_equal(actual, by_hand(accumulate))
    else:  # the matrix products are rounded to float16
        for a, b in zip(actual, by_hand(accumulate), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert float(module.other[0].detach()) == pytest.approx(0.8**8)


def test_manual_optimization_without_a_sample_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"or call optimizer.train\(\) before"):
        trainer().fit(Manual("none"), data())


def test_fabric_equals_a_plain_loop() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    original = Regression()
    net, optimizer = fabric.setup(original.net, IVON(original.parameters(), **MOVING))
    for x, y in data():
        optimizer.train()
        assert optimizer.optimizer.holds_sample
        optimizer.zero_grad()
        fabric.backward(nn.functional.mse_loss(net(x), y))
        optimizer.step()
    assert_equal(list(weights_and_state(original, optimizer.optimizer)), by_hand())


# ---- the mean, wherever Lightning looks ------------------------------------------------------------------------------


def test_evaluation_sees_the_mean_and_does_not_disturb() -> None:
    module = Evaluated()
    fit = trainer(
        callbacks=[IVONCallback()],
        accumulate_grad_batches=4,
        num_sanity_val_steps=1,
        val_check_interval=3,  # in the middle of an accumulation
        limit_val_batches=1,
    )
    fit.fit(module, data(), data())
    after = learned(module)
    fit.validate(module, data(), verbose=False)
    fit.test(module, data(), verbose=False)
    fit.predict(module, data())
    stages = {"train": False, "validate": True, "test": True, "predict": True}
    assert {stage for stage, _ in module.seen} == set(stages)
    assert [stage for stage, _ in module.seen].index("validate") == 0, "the sanity check"
    assert module.seen == [(stage, stages[stage]) for stage, _ in module.seen]
    assert_equal(after, by_hand(4))


class Interrupted(Regression):
    """Fails, or ends the epoch, at the seventh of eight batches, in the middle of an accumulation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.how == "end" and batch_idx == 6 else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.how == "raise" and batch_idx == 6:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


class Saving(ModelCheckpoint):
    """Saves after every batch, which is in the middle of an accumulation after every other one."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.save_checkpoint(Path(str(self.dirpath)) / f"batch{trainer.fit_loop.batch_idx}.ckpt")


def assert_saves_the_mean(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    state = saved["optimizer_states"][0]["state"]
    for i, weight in enumerate(saved["state_dict"].values()):
        assert torch.equal(weight, state[i]["mean"]), f"{path.name}: {i}"


@pytest.mark.parametrize("how", ["raise", "end", "neither"])
def test_every_checkpoint_holds_the_mean(tmp_path: Path, how: str) -> None:
    module = Interrupted(how)
    saving = Saving(dirpath=tmp_path, save_last=True, save_on_exception=True, save_on_train_epoch_end=True)
    try:
        fitted(module, saving, accumulate_grad_batches=4, enable_checkpointing=True)
    except ZeroDivisionError:
        assert how == "raise"
    files = sorted(tmp_path.iterdir())
    assert len(files) > (8 if how == "neither" else 6), "those of Saving and those of ModelCheckpoint"
    for path in files:
        assert_saves_the_mean(path)
    assert module.at_mean()


class SavesInside(Regression):
    """Writes a checkpoint from inside each training step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert optimizer_of(self.trainer).holds_sample
        self.trainer.save_checkpoint(self.folder / f"inside{batch_idx}.ckpt")
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_from_inside_a_step_holds_the_mean(tmp_path: Path) -> None:
    module = SavesInside(tmp_path)
    fitted(module, accumulate_grad_batches=2)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        assert_saves_the_mean(path)
    assert not any(layer._state_dict_hooks for layer in module.modules()), "the hooks end with the training"


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_resumed_equals_uninterrupted(tmp_path: Path, precision: str) -> None:
    def options() -> dict[str, Any]:
        return {"accumulate_grad_batches": 2, **PRECISIONS[precision]()}

    whole = fitted(Regression(), max_epochs=2, **options())
    if precision == "32":
        assert_equal(learned(whole), by_hand(2, epochs=2))
    saving = ModelCheckpoint(dirpath=tmp_path, filename="first")
    fitted(Regression(), saving, max_epochs=1, enable_checkpointing=True, **options())
    resumed = Regression(seed=8, lr=1.0)
    nn.init.zeros_(resumed.net[0].weight)  # type: ignore[arg-type]
    again = trainer(
        callbacks=[IVONCallback(), ModelCheckpoint(dirpath=tmp_path / "again")],
        max_epochs=2,
        enable_checkpointing=True,
        **options(),
    )
    again.fit(resumed, data(), ckpt_path=tmp_path / "first.ckpt")
    assert len(resumed.seen) == 8
    assert_equal(learned(resumed), learned(whole))


def test_the_other_package() -> None:
    """`lightning` installs `pytorch_lightning` too, whose Trainer takes modules of its own."""
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        training_step = Regression.training_step
        run_on = Regression.run_on
        at_mean = Regression.at_mean
        configure_optimizers = Regression.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            original = Regression()
            self.net, self.options, self.seen = original.net, original.options, original.seen

        def configure_gradient_clipping(self, optimizer: IVON, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, 1e9, "norm")

    module = Other()
    fit = pytorch_lightning.Trainer(
        callbacks=[IVONCallback()], accumulate_grad_batches=2, precision="bf16-mixed", **QUIET
    )
    fit.fit(module, data())
    expected = fitted(Regression(), accumulate_grad_batches=2, precision="bf16-mixed")
    assert_equal(learned(module), learned(expected))  # type: ignore[arg-type]
    assert module.at_mean()  # type: ignore[arg-type]


# ---- advice and refusals ---------------------------------------------------------------------------------------------


def test_clipping_warns_and_advises() -> None:
    with pytest.warns(UserWarning, match="shrinks IVON's Hessian estimate.*clip_radius"):
        fitted(Regression(), gradient_clip_val=1.0, fast_dev_run=True)


def test_a_module_without_ivon_is_an_error() -> None:
    class Other(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match="found no IVON optimizer"):
        fitted(Other())


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"plugins": [fp16()]}], ids=["accumulation", "16"])
def test_several_samples_are_refused_where_lightning_would_run_one(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mc_samples=2 with"):
        fitted(Regression(mc_samples=2), **options)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # on purpose
def test_a_batch_without_a_loss_is_skipped() -> None:
    module = fitted(Once())
    assert int(optimizer_of(module.trainer).state[next(module.parameters())]["step"]) == 7
