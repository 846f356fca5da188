"""``model.eval()`` alone does not bring the mean back: say so where an evaluation runs under the training sample."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ivon_kernels.integrations.hooks import IVONHook, has_hook
from ivon_kernels.optimizer import IVON
from ivon_kernels.training.advice import Advice, warn_once

__all__ = ["warn_under_sample"]

_SENTENCE = (
    "the model is in eval mode and computes without gradients, but its weights hold the sample of the coming step: "
    "call optimizer.eval() beside model.eval(), which brings the mean back, and optimizer.train() before "
    "training goes on"
)


class _WarnUnderSample(IVONHook):
    """Before a pass of the model."""

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling() or module.training or torch.is_grad_enabled():
            return
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.holds_training_sample:
            warn_once(optimizer.advised, [Advice(_SENTENCE, about="eval")])


def warn_under_sample(model: nn.Module, ivon: IVON) -> list[RemovableHandle]:
    """Warn, once, of passes in eval mode and without gradients under the training sample. Returns the hook's handle."""
    if has_hook(model._forward_pre_hooks, _WarnUnderSample, ivon):
        return []
    return [model.register_forward_pre_hook(_WarnUnderSample(ivon))]
