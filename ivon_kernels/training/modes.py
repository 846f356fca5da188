"""Train and eval mode, and the blocks that hold a sample or the mean: who asks for samples, and who puts them back."""

from __future__ import annotations

from typing import NamedTuple

from torch._compile import _disable_dynamo

from ivon_kernels.backends import Draw
from ivon_kernels.noise import EVAL_STEP, MAX_SAMPLES, check_sample
from ivon_kernels.training.samples import Samples

__all__ = ["Found", "Modes"]


class Found(NamedTuple):
    """What a block has found, to be put back after it."""

    held: Draw | None
    evaluating: bool
    training: bool


class Modes:
    """What :class:`ivon_kernels.IVON`'s methods of the same names do; their docstrings say what for.

    Args:
        samples: Of the step that is under way.

    Attributes:
        training: ``train()`` was called last, not ``eval()``.
        evaluating: In a block that holds an evaluation sample.
        evaluated: Number of the next evaluation sample.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples, self._weights = samples, samples.weights
        self.resume()

    def resume(self, training: bool = False, evaluating: bool = False, evaluated: int = 0) -> None:
        """Be as another one was."""
        self.training, self.evaluating, self.evaluated = training, evaluating, evaluated

    def _found(self) -> Found:
        return Found(self._weights.held, self.evaluating, self.training)

    @property
    def holds_training_sample(self) -> bool:
        """Whether the weights hold the sample of the coming step."""
        return self._weights.held is not None and not self.evaluating

    def require_no_evaluation(self, call: str) -> None:
        """Refuse a call inside a block that holds an evaluation sample."""
        if self.evaluating:
            raise RuntimeError(
                f"{call} inside a sampled_params() block that holds an evaluation sample: leave it first"
            )

    # ---- blocks ------------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def enter_training(self, sample: int | None) -> int:
        """Returns how many samples were drawn, this one included; 0 in a closure."""
        sample = None if sample is None else check_sample(sample)
        samples = self._samples
        if samples.in_closure:  # step(closure) holds the sample; ivon-opt's closures enter the context themselves
            return 0
        if self._weights.held is not None:
            raise RuntimeError(
                "sampled_params(train=True) inside a sample: leave the other block, or call optimizer.eval() if "
                "optimizer.train() put it there"
            )
        if samples.unused:  # eval() ended the loop that it was drawn for
            samples.forget()
        samples.begin(sample)
        return samples.count

    @_disable_dynamo
    def leave_training(self, drawn: int, failed: bool = False) -> None:
        """`drawn` is what :meth:`enter_training` has returned."""
        if drawn == 0:
            return
        if failed:
            self._samples.abort()
        else:
            self._samples.close(drawn)

    @_disable_dynamo
    def enter_evaluation(self, sample: int | None) -> Found:
        """Put an evaluation sample over what the weights hold."""
        if sample is None:
            sample, self.evaluated = self.evaluated, (self.evaluated + 1) % MAX_SAMPLES
        else:
            sample = check_sample(sample)
        outer = self._found()
        self._samples.put(Draw(self._samples.parameters.seed, sample, step=EVAL_STEP))
        self.evaluating = True
        return outer

    @_disable_dynamo
    def leave_evaluation(self, outer: Found) -> None:
        self.evaluating = outer.evaluating
        if outer.held is None:
            self._samples.restore_unedited()
        else:
            self._samples.put(outer.held)

    @_disable_dynamo
    def enter_mean(self) -> Found:
        outer = self._found()
        self.evaluating = False
        self._samples.pause()
        return outer

    @_disable_dynamo
    def leave_mean(self, outer: Found) -> None:
        self.evaluating = outer.evaluating
        if outer.held is None or self._weights.held is not None or self.training != outer.training:
            return  # or the block has let go of the sample, or stepped
        if outer.evaluating:
            self._samples.put(outer.held)
        elif self._samples.count:
            self._samples.go_on()

    # ---- modes -------------------------------------------------------------------------------------------------------

    def train(self, sample: int | None) -> None:
        self.require_no_evaluation("train()")
        samples = self._samples
        if sample is not None:
            sample = check_sample(sample)
            if samples.unused:
                samples.discard()
        self.training = True
        if samples.unused:
            samples.ask()
        if not samples.count:
            samples.begin(sample)
        elif sample is not None and sample != samples.replay:
            raise RuntimeError(
                f"train(sample={sample}), but this step has another sample: call step() or discard_samples() first"
            )
        elif self._weights.held is not None:
            samples.take_in()
        else:
            samples.go_on()

    def eval(self) -> None:
        self.training = False
        self._samples.pause()

    def next_sample(self) -> None:
        self.require_no_evaluation("next_sample()")
        self.training = True
        self._samples.ask()
        self._samples.begin()

    def take_in_unfrozen(self) -> None:
        if self.holds_training_sample and self._samples.parameters.unfrozen:
            self._samples.take_in()
