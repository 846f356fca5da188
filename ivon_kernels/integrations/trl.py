"""Which weights the rollouts of TRL's reinforcement learning trainers are generated with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ivon_kernels.extras import HF, needed_for
from ivon_kernels.noise import MAX_SAMPLES
from ivon_kernels.optimizer import IVON

with needed_for(__name__, HF):
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from ivon_kernels.integrations.transformers import ivon_of

__all__ = ["attach_rollouts"]

# Private in TRL, and the one method in which rollouts are generated and their log-probabilities computed.
_GENERATE = "_generate_and_score_completions"


def attach_rollouts(trainer: Trainer, rollouts: Literal["mean", "sample"] | int) -> None:
    """Choose the weights that rollouts are generated with, in TRL's GRPOTrainer and those with the same loop.

    Left alone, the trainer generates under the training sample of the step that the rollouts are made in; with
    ``steps_per_generation`` or ``num_iterations`` above 1 they also serve later steps, which have other samples.

    - ``"mean"``: at the mean; each update has its own sample.
    - ``"sample"``: each generation under one sample, which all updates on its rollouts replay
      (``optimizer.train(sample=k)``, where k is the step in which they were generated).
    - a number k: all rollouts and updates under sample k, the one of ``optimizer.sampled_params(sample=k)``. For short
      runs: with noise that never changes the Hessian estimate is not averaged over samples.

    Log-probabilities that the loss compares with later are computed under the same weights as the rollouts. Generation
    in an evaluation stays at the mean. To be called before ``trainer.train()``.

    Args:
        trainer: A GRPOTrainer or RLOOTrainer whose optimizer is, or will be, IVON.
        rollouts: The choice.

    Raises:
        TypeError: If the trainer does not generate.
        ValueError: For another choice, or with ``"sample"`` if one step would mix rollouts of two generations.
    """
    if not hasattr(trainer, _GENERATE):
        raise TypeError(
            f"{type(trainer).__name__} generates no rollouts; attach_rollouts is for GRPOTrainer and its like"
        )
    valid = isinstance(rollouts, int) and not isinstance(rollouts, bool) and 0 <= rollouts < MAX_SAMPLES
    if rollouts not in ("mean", "sample") and not valid:
        raise ValueError(f"rollouts must be 'mean', 'sample' or a sample in [0, {MAX_SAMPLES}), got {rollouts!r}")
    if rollouts == "sample":
        _check_whole_steps(trainer)
    callback = _Rollouts(trainer, rollouts)
    trainer.add_callback(callback)
    setattr(trainer, _GENERATE, callback.generate)


def _check_whole_steps(trainer: Trainer) -> None:
    args: Any = trainer.args
    accumulation = args.gradient_accumulation_steps
    every = getattr(args, "steps_per_generation", accumulation) * getattr(args, "num_iterations", 1)
    if accumulation % every and every % accumulation:
        raise ValueError(
            f"rollouts='sample' needs steps that use one generation each: gradient_accumulation_steps={accumulation} "
            f"has to divide, or be a multiple of, the {every} micro-batches between generations"
        )


class _Rollouts(TrainerCallback):
    """Puts the chosen weights in place around each generation and before each step."""

    def __init__(self, trainer: Trainer, rollouts: Literal["mean", "sample"] | int) -> None:
        self._trainer = trainer
        self._rollouts = rollouts
        self._original: Callable[[Any], Any] = getattr(trainer, _GENERATE)
        self._replayed: int | None = None  # the sample of the current rollouts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Forget the rollouts of an earlier run."""
        self._replayed = self._rollouts if isinstance(self._rollouts, int) else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Put the rollouts' sample into the weights; the trainer's own ``train()`` then leaves it there."""
        if self._replayed is not None:
            ivon_of(self._trainer).train(sample=self._replayed)

    def generate(self, inputs: Any) -> Any:
        """The trainer's method, under the chosen weights."""
        model: Any = self._trainer.model
        if not model.training:
            return self._original(inputs)
        ivon = ivon_of(self._trainer)
        if self._rollouts == "mean":
            ivon.eval()
            try:
                return self._original(inputs)
            finally:
                ivon.train()
        if self._rollouts == "sample":
            self._replay(ivon, self._trainer.state.global_step % MAX_SAMPLES)
        return self._original(inputs)

    def _replay(self, ivon: IVON, sample: int) -> None:
        if sample != self._replayed:
            self._replayed = sample
            ivon.discard_samples()  # drawn by the trainer's train(), or for the rollouts before
            ivon.train(sample=sample)
