"""What a loss unfreezes, by switching adapters say, becomes a part of the step's sample before it is used."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from ivon_kernels.integrations.hooks import HookHandle, IVONHook, entrances, has_hook, ivon_of_model

__all__ = ["sample_unfrozen"]


class _TakeIn(IVONHook):
    """Before a forward pass that may be trained on."""

    def __call__(self, *_: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.take_in_unfrozen()


def sample_unfrozen(model: nn.Module, optimizer: Optimizer) -> HookHandle:
    """Let every forward pass of a training step take what was unfrozen since ``optimizer.train()`` into the sample.

    For training loops that call ``train()`` themselves and leave the loss to others, who may switch adapters in it.
    Passes without gradients, and those that hold the mean or an evaluation sample, are left alone.

    Args:
        model: The model that is trained.
        optimizer: IVON, or a wrapper around it such as Accelerate's.

    Returns:
        A handle whose ``remove()`` takes away the hooks that this call installed.

    Raises:
        TypeError: If the optimizer is not IVON.
        ValueError: If no parameter of the model belongs to it.
    """
    ivon, own = ivon_of_model(model, optimizer, "sample_unfrozen")
    take_in = _TakeIn(ivon)
    return HookHandle(
        [
            # First of all, lest FSDP has gathered the weights that are written.
            module.register_forward_pre_hook(take_in, prepend=True)
            for module in entrances(model, own)
            if not has_hook(module._forward_pre_hooks, _TakeIn, ivon)
        ]
    )
