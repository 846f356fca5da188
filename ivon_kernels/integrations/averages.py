"""Averages over training steps are averages of the mean: ``AveragedModel``, ``update_bn``."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from ivon_kernels.integrations.hooks import IVONHook, entrances, has_hook
from ivon_kernels.optimizer import IVON

__all__ = ["average_means", "collect_at_mean"]


def average_means() -> None:
    """Let every ``AveragedModel`` read a model with IVON's hooks while it holds the mean.

    It reads ``model.parameters()``, which no hook sees, so this wraps its method; models without hooks are untouched.
    """
    original = AveragedModel.update_parameters
    if hasattr(original, "_reads_means"):
        return

    @functools.wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        with ExitStack() as stack:
            for ivon in _optimizers_of(model):
                stack.enter_context(ivon.at_mean())
            original(self, model)

    update_parameters._reads_means = True  # type: ignore[attr-defined]
    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


def _optimizers_of(model: nn.Module) -> list[IVON]:
    """Those whose hooks the model has."""
    hooks: list[object] = [hook for module in model.modules() for hook in module._state_dict_hooks.values()]
    found = [hook.optimizer() for hook in hooks if isinstance(hook, IVONHook)]
    return list({id(ivon): ivon for ivon in found if ivon is not None}.values())


class _CollectAtMean(IVONHook):
    """Around a pass of ``update_bn``: the weights hold the mean.

    Such a pass is known by BatchNorm without momentum, in train mode and without gradients: it leaves nothing behind
    but the cumulative average of the activations' statistics.
    """

    def __init__(self, optimizer: IVON | None = None) -> None:
        super().__init__(optimizer)
        self._open: tuple[nn.Module, ExitStack] | None = None

    def __call__(self, module: nn.Module, inputs: object) -> None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not module.training or self._open is not None:
            return
        ivon = self.optimizer()
        if ivon is None or not ivon.holds_sample or not any(map(_collects, module.modules())):
            return
        stack = ExitStack()
        stack.enter_context(ivon.at_mean())
        self._open = module, stack

    def leave(self, module: nn.Module, *_: Any) -> None:
        """After the module's pass, also one that failed."""
        if self._open is not None and self._open[0] is module:
            stack, self._open = self._open[1], None
            stack.close()


class _Leave(IVONHook):
    """The other end of :class:`_CollectAtMean`, of which a copy does nothing either."""

    def __init__(self, collect: _CollectAtMean | None = None) -> None:
        super().__init__()
        self._collect = _CollectAtMean() if collect is None else collect

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._collect.leave(module)


def collect_at_mean(model: nn.Module, ivon: IVON, own: set[nn.Parameter]) -> list[RemovableHandle]:
    """Let passes that collect BatchNorm's statistics run at the mean. Returns the hooks' handles."""
    handles: list[RemovableHandle] = []
    collect = _CollectAtMean(ivon)
    for module in entrances(model, own):
        batch_norm = any(isinstance(inner, _BatchNorm) for inner in module.modules())
        if batch_norm and not has_hook(module._forward_pre_hooks, _CollectAtMean, ivon):
            handles.append(module.register_forward_pre_hook(collect, prepend=True))
            handles.append(module.register_forward_hook(_Leave(collect), always_call=True))
    return handles


def _collects(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training and module.momentum is None
