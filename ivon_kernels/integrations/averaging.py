"""The average of the mean in the Trainer of Transformers: what a loop does with torch's AveragedModel.

One more line, before or after :func:`ivon_kernels.integrations.transformers.use_ivon`::

    trainer.add_callback(AverageCallback())
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivon_kernels.extras import HF, needed_for
from ivon_kernels.integrations.hooks import find_ivon
from ivon_kernels.integrations.saving import checkpoint_folder
from ivon_kernels.optimizer import IVON
from ivon_kernels.sharding import as_dtensor

with needed_for(__name__, HF):
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["AverageCallback"]

_FILE = "ivon_average.safetensors"  # in a checkpoint: the sums by the parameters' names, and under _STEPS their number
_STEPS = "steps"


class AverageCallback(TrainerCallback):
    """When training ends the weights, and so the posterior, become the average of the means of the later steps.

    Stochastic weight averaging (Izmailov et al., UAI 2018, arXiv 1803.05407) around IVON; sigma stays what it is
    (docs/recipe.md has what it gains). It costs one float32 copy of the trained weights, which every checkpoint of the
    later steps has, so that a resumed run ends with the same average. A run that is stopped before they begin ends as
    without it.

    Args:
        start: The share of the steps that are left out of it, in [0, 1).

    Raises:
        ValueError: If start is something else.
    """

    def __init__(self, start: float = 0.5) -> None:
        if not 0.0 <= start < 1.0:
            raise ValueError(f"start must be a share of the steps, at least 0 and below 1, got {start!r}")
        self.start = start
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Begin anew, or where the checkpoint that is resumed from left off.

        Raises:
            TypeError: If the Trainer's optimizer is not IVON.
            ValueError: If the best checkpoint is to be loaded at the end, weights are sharded, or the checkpoint has no
                average.
        """
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end takes the weights of one step, and AverageCallback an average: leave one of "
                "them out"
            )
        if any(as_dtensor(param) is not None for param in context["model"].parameters()):
            raise ValueError("AverageCallback does not average sharded weights (FSDP2): leave it out")
        _ivon(context["optimizer"])
        self._sums, self._steps = {}, 0
        if state.global_step > self.start * state.max_steps:
            self._resume(checkpoint_folder(args, state.global_step) / _FILE, context["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Add the mean of a later step."""
        if state.global_step <= self.start * state.max_steps:
            return
        ivon = _ivon(context["optimizer"])
        for group in ivon.param_groups:
            for param in group["params"]:
                mean = ivon.mean_of(param).float()
                if param in self._sums:
                    self._sums[param].add_(mean)
                else:  # of one that joins later the first mean stands for the steps before
                    self._sums[param] = mean * (self._steps + 1)
        self._steps += 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        """Write the sums into the checkpoint."""
        folder = checkpoint_folder(args, state.global_step)
        if self._steps and args.should_save and folder.is_dir():
            names = {param: name for name, param in context["model"].named_parameters()}
            sums = {names[param]: total.contiguous() for param, total in self._sums.items()}
            save_file({**sums, _STEPS: torch.tensor(self._steps, dtype=torch.int64, device="cpu")}, folder / _FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Write the average into the weights, where the optimizer takes it for its mean."""
        if not self._steps:
            return
        ivon = _ivon(context["optimizer"])
        ivon.eval()
        with torch.no_grad():
            for param, total in self._sums.items():
                param.copy_(total / self._steps)
        self._sums, self._steps = {}, 0

    def _resume(self, file: Path, model: nn.Module) -> None:
        if not file.is_file():
            raise ValueError(
                f"AverageCallback cannot go on: {file} is not there. Resume from a checkpoint that was saved with it "
                "in the trainer's output_dir, from an earlier one, or without it."
            )
        saved = load_file(file)
        self._steps = int(saved.pop(_STEPS))
        params = dict(model.named_parameters())
        self._sums = {params[name]: total.to(params[name].device) for name, total in saved.items()}


def _ivon(optimizer: object) -> IVON:
    found = find_ivon(optimizer)
    if found is None:
        raise TypeError(f"AverageCallback averages the mean of IVON, and the optimizer is {type(optimizer).__name__}")
    return found
