"""Lightning: a callback that keeps a sample in the weights while, and only while, a batch is trained on.

``Trainer(callbacks=[IVONCallback()])`` is the one line. Automatic optimization calls ``optimizer.step(closure)``, which
samples by itself, but Lightning runs all but the last micro-batch of an accumulation outside of it, and with a gradient
scaler (16-mixed) the last one too.
"""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ivon_kernels.extras import LIGHTNING, needed_for
from ivon_kernels.integrations.hooks import HookHandle
from ivon_kernels.integrations.state_dict import save_mean
from ivon_kernels.integrations.unfrozen import sample_unfrozen
from ivon_kernels.integrations.voice import Voice, count_examples
from ivon_kernels.optimizer import IVON
from ivon_kernels.training.samples import Closure

# Two packages with the same code; a Trainer of either takes a callback of the other.
if TYPE_CHECKING or find_spec("pytorch_lightning") is None or find_spec("lightning") is not None:
    with needed_for(__name__, LIGHTNING):
        from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["IVONCallback"]


class IVONCallback(Callback):
    """Samples the weights at the start of every training batch and restores the mean at its end.

    Every IVON optimizer of the module takes part, in automatic and in manual optimization; others are left alone. The
    micro-batches of one step (``accumulate_grad_batches``) run under one sample, which what ``training_step`` unfreezes
    becomes a part of. Validation, tests, predictions and
    callbacks that come after this one see the mean, and so does everything after an exception or at the end of
    training. Checkpoints hold the mean whenever they are written, from inside ``training_step`` too.

    A line at the start says what was chosen. :meth:`IVON.check` is asked after ten steps and at the end, and a loss
    that has fallen off is said, each once. Every ``log_every_n_steps`` steps :meth:`IVON.glance` is logged:
    ``ivon/sigma``, ``ivon/snr``, ``ivon/clipped`` and ``ivon/hess``, of a second optimizer ``ivon/1/sigma`` and so on.

    In manual optimization, call ``optimizer.train()`` before a second step in the same batch; a module that uses
    ``sampled_params(train=True)`` itself needs no callback.

    Raises:
        RuntimeError: At the start of training, if the module has no IVON optimizer.
        ValueError: If `mc_samples` is above 1 and accumulation or a gradient scaler is used: Lightning would then run
            the further samples on one micro-batch only, or not at all.
    """

    def __init__(self) -> None:
        self._handles: list[HookHandle] = []
        self._sizes: list[int] = []  # of the parameter groups that have hooks
        self._still: list[tuple[IVON, Any]] = []  # optimizers that take no step now, and their own step()
        self._unscaled: list[IVON] = []  # optimizers whose gradients the scaler unscales for the time of training
        self._said: set[str] = set()  # in all runs
        self._voices: list[Voice] = []
        self._steps = self._first_step = self._last_seen = 0  # finished ones: now, at the start; Lightning's count
        self._losses: list[torch.Tensor] = []  # since the last log

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = _optimizers(trainer)
        if not optimizers:
            raise RuntimeError(
                "IVONCallback found no IVON optimizer: return one from configure_optimizers, or remove the callback"
            )
        self._attach(pl_module, optimizers)
        if trainer.gradient_clip_val:
            warnings.warn(
                f"gradient_clip_val={trainer.gradient_clip_val} shrinks IVON's Hessian estimate whenever it binds: "
                "leave it out and use IVON(..., clip_radius=...), which bounds the update instead",
                stacklevel=2,
            )
        if trainer.gradient_clip_val or _clips_itself(pl_module):
            # Under mixed precision Lightning refuses to clip for optimizers that unscale by themselves.
            for optimizer in optimizers:
                optimizer._step_supports_amp_scaling = False
                self._unscaled.append(optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = _optimizers(trainer)
        self._voices = [
            Voice(
                optimizer,
                steps=_planned(trainer, pl_module),
                num_data=count_examples(trainer.train_dataloader),
                speaks=trainer.is_global_zero,
                said=self._said,
            )
            for optimizer in optimizers
        ]
        self._steps = self._first_step = self._last_seen = trainer.global_step
        self._losses.clear()
        for voice in self._voices:
            voice.begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # StochasticWeightAveraging collects BatchNorm's statistics of the averaged weights in an epoch without steps;
        # Lightning calls step() all the same at its end.
        if getattr(trainer.fit_loop, "_skip_backward", False):
            self._hold_still(_optimizers(trainer))
            return
        self._attach(pl_module, _optimizers(trainer))
        for optimizer in _optimizers(trainer):
            if pl_module.automatic_optimization:
                _check_samples(optimizer, trainer)
            optimizer.train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._move_again()
        _restore(trainer)
        self._speak(trainer, pl_module, outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move_again()
        _restore(trainer)  # a module whose on_train_batch_start returns -1 gets no on_train_batch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _restore(trainer)
        for voice in self._voices:
            voice.end(self._steps - self._first_step)
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def _speak(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        """Look at the run early, and log at Lightning's steps for that."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())  # read when they are logged: that waits for the device
        if trainer.global_step == self._last_seen:
            return
        self._last_seen = trainer.global_step
        self._steps += 1
        for voice in self._voices:
            voice.step(self._steps - self._first_step)
        every = int(getattr(trainer, "log_every_n_steps", 0))  # an attribute that Lightning does not declare
        if not every or self._steps % every:
            return
        for number, voice in enumerate(self._voices):
            prefix = f"ivon/{number}/" if number else "ivon/"
            numbers = {name.replace("ivon/", prefix): value for name, value in voice.numbers().items()}
            pl_module.log_dict(numbers)
        if self._losses and self._voices:
            self._voices[0].hear(float(torch.stack(self._losses).float().mean()))
        self._losses.clear()

    def _attach(self, pl_module: LightningModule, optimizers: list[IVON]) -> None:
        """Install the hooks, also for parameters that a callback for finetuning has given to the optimizer since."""
        sizes = [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
        if sizes != self._sizes:
            self._sizes = sizes
            for optimizer in optimizers:
                self._handles += [save_mean(pl_module, optimizer), sample_unfrozen(pl_module, optimizer)]

    def _hold_still(self, optimizers: list[IVON]) -> None:
        """Let ``step()`` run its closure at the mean and change nothing."""
        if self._still:
            return
        for optimizer in optimizers:
            # Schedulers of torch leave a step of their own there.
            self._still.append((optimizer, vars(optimizer).get("step")))
            vars(optimizer)["step"] = _run_only

    def _move_again(self) -> None:
        while self._still:
            optimizer, step = self._still.pop()
            if step is None:
                del vars(optimizer)["step"]
            else:
                vars(optimizer)["step"] = step

    def _finish(self, trainer: Trainer) -> None:
        self._move_again()
        _restore(trainer)
        for optimizer in self._unscaled:
            del optimizer._step_supports_amp_scaling
        self._unscaled.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sizes.clear()
        self._voices.clear()
        self._losses.clear()


def _optimizers(trainer: Trainer) -> list[IVON]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, IVON)]


def _restore(trainer: Trainer) -> None:
    for optimizer in _optimizers(trainer):
        optimizer.eval()


def _planned(trainer: Trainer, module: LightningModule) -> int | None:
    """The optimizer steps of the whole run, where there is one optimizer to count them for."""
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        return None
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps > 0 and math.isfinite(steps) else None


def _run_only(closure: Closure | None = None) -> Any:
    return None if closure is None else closure()


def _clips_itself(module: LightningModule) -> bool:
    defined_in = type(module).configure_gradient_clipping.__module__
    return not defined_in.startswith(("lightning.", "pytorch_lightning."))


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _check_samples(optimizer: IVON, trainer: Trainer) -> None:
    """Refuse what would silently use fewer samples than asked for."""
    samples = optimizer.param_groups[0]["mc_samples"]
    if samples == 1:
        return
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"mc_samples={samples} with accumulate_grad_batches={trainer.accumulate_grad_batches}: Lightning repeats "
            "the last micro-batch only; use one of the two, or manual optimization"
        )
    if _scaler(trainer) is not None:
        raise ValueError(
            f"mc_samples={samples} with a gradient scaler: Lightning runs the batch once; use precision='bf16-mixed', "
            "mc_samples=1 or manual optimization"
        )
