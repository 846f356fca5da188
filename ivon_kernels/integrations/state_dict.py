"""``state_dict()`` of a model holds the mean at any moment, and averages of its weights are averages of the mean."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ivon_kernels.integrations.averages import average_means, collect_at_mean
from ivon_kernels.integrations.evaluated import warn_under_sample
from ivon_kernels.integrations.hooks import HookHandle, IVONHook, find_ivon, has_hook, ivon_of_model
from ivon_kernels.integrations.prompts import prompts_of_mean

__all__ = ["find_ivon", "save_mean"]


class _PutMean(IVONHook):
    """After a module has put its parameters into a state dict: the mean replaces a sample."""

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
        optimizer = self.optimizer()
        if optimizer is None or not optimizer.holds_sample:
            return
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            saved = state_dict.get(prefix + name)
            # With keep_vars=True it is the parameter itself, which a caller asked for in order to write to it.
            if saved is not None and saved is not param and param in optimizer.state:
                state_dict[prefix + name] = optimizer.mean_of(param)


class _LeaveSample(IVONHook):
    """Before a module loads its parameters: the weights hold the mean, so that what is loaded becomes the new one."""

    def __call__(self, *_: object) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.holds_sample:
            optimizer.eval()


def save_mean(model: nn.Module, optimizer: Optimizer) -> HookHandle:
    """Make ``state_dict()`` of a model, and of each module inside it, hold the mean also while the weights are sampled.

    So every save writes the mean, whenever it happens: in the middle of gradient accumulation, after an interrupt, by
    PEFT's ``save_pretrained``, ``accelerator.save_state`` or torch.distributed.checkpoint. The weights themselves stay
    as they are. ``load_state_dict()`` restores the mean first (:meth:`IVON.eval`), so that what is loaded becomes the
    new mean. ``state_dict(keep_vars=True)`` still returns the parameters themselves, whatever they hold, and so does a
    model that is copied or pickled whole: call :meth:`IVON.eval` first.

    Averages of the model's weights are of the mean, too: ``AveragedModel.update_parameters(model)`` of
    ``torch.optim.swa_utils`` and ``update_bn(loader, model)`` run at the mean, whatever the weights hold when they are
    called. An average of your own that reads ``model.parameters()`` goes into a ``with optimizer.at_mean():`` block.

    A pass of the model in eval mode and without gradients while the weights hold the sample of the coming step is
    warned of, once: ``model.eval()`` alone does not bring the mean back.

    Hooks are installed on the modules that own a parameter of the optimizer; calling this again adds only those that
    are missing. The model does not keep the optimizer alive, and hooks on a copy of the model do nothing.

    Args:
        model: The model that is trained, or a wrapper around it.
        optimizer: IVON, or a wrapper around it such as Accelerate's.

    Returns:
        A handle whose ``remove()`` takes away the hooks that this call installed: ``state_dict()`` then returns what
        the weights hold again.

    Raises:
        TypeError: If the optimizer is not IVON.
        ValueError: If no parameter of the model belongs to it.
    """
    ivon, own = ivon_of_model(model, optimizer, "save_mean")
    handles: list[RemovableHandle] = []
    put_mean, leave_sample = _PutMean(ivon), _LeaveSample(ivon)
    for module in model.modules():
        if own.isdisjoint(module.parameters(recurse=False)):
            continue
        if not has_hook(module._state_dict_hooks, _PutMean, ivon):
            handles.append(module.register_state_dict_post_hook(put_mean))
            handles.append(module.register_load_state_dict_pre_hook(leave_sample))
    average_means()
    handles += [*collect_at_mean(model, ivon, own), *warn_under_sample(model, ivon)]
    return HookHandle([*handles, *prompts_of_mean(model, ivon)])
