"""``state_dict()`` of a model holds the mean at any moment, also while a sample is in the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ivon_kernels.optimizer import IVON

__all__ = ["SaveMeanHandle", "find_ivon", "save_mean"]


def find_ivon(optimizer: object) -> IVON | None:
    """The IVON optimizer inside the wrappers of Accelerate and others, which keep it as ``.optimizer``, or None."""
    while optimizer is not None and not isinstance(optimizer, IVON):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class SaveMeanHandle:
    """What :func:`save_mean` installed on a model."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Let ``state_dict()`` return what the weights hold again."""
        while self._handles:
            self._handles.pop().remove()


class _Hook:
    """A hook that knows its optimizer without keeping it alive.

    Copied or unpickled, it does nothing: the copied parameters belong to no optimizer.
    """

    def __init__(self, optimizer: IVON | None = None) -> None:
        self.optimizer: Callable[[], IVON | None] = _nothing if optimizer is None else weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _PutMean(_Hook):
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


class _LeaveSample(_Hook):
    """Before a module loads its parameters: the weights hold the mean, so that what is loaded becomes the new one."""

    def __call__(self, *_: object) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.holds_sample:
            optimizer.eval()


def _nothing() -> None:
    return None


def save_mean(model: nn.Module, optimizer: Optimizer) -> SaveMeanHandle:
    """Make ``state_dict()`` of a model, and of each module inside it, hold the mean also while the weights are sampled.

    So every save writes the mean, whenever it happens: in the middle of gradient accumulation, after an interrupt, by
    PEFT's ``save_pretrained``, ``accelerator.save_state`` or torch.distributed.checkpoint. The weights themselves stay
    as they are. ``load_state_dict()`` restores the mean first (:meth:`IVON.eval`), so that what is loaded becomes the
    new mean. ``state_dict(keep_vars=True)`` still returns the parameters themselves, whatever they hold, and so does a
    model that is copied or pickled whole: call :meth:`IVON.eval` first.

    Hooks are installed on the modules that own a parameter of the optimizer; calling this again adds only those that
    are missing. The model does not keep the optimizer alive, and hooks on a copy of the model do nothing.

    Args:
        model: The model that is trained, or a wrapper around it.
        optimizer: IVON, or a wrapper around it such as Accelerate's.

    Returns:
        A handle whose ``remove()`` takes away the hooks that this call installed.

    Raises:
        TypeError: If the optimizer is not IVON.
        ValueError: If no parameter of the model belongs to it.
    """
    ivon = find_ivon(optimizer)
    if ivon is None:
        raise TypeError(f"save_mean needs an IVON optimizer, got {type(optimizer).__name__}")
    owners = [module for module in model.modules() if any(p in ivon.state for p in module.parameters(recurse=False))]
    if not owners:
        raise ValueError(
            "no parameter of the model belongs to this optimizer: build the optimizer from the parameters of the model "
            "that is trained, after adapters were added to it"
        )
    handles: list[RemovableHandle] = []
    put_mean, leave_sample = _PutMean(ivon), _LeaveSample(ivon)
    for module in owners:
        if not any(isinstance(h, _PutMean) and h.optimizer() is ivon for h in module._state_dict_hooks.values()):
            handles.append(module.register_state_dict_post_hook(put_mean))
            handles.append(module.register_load_state_dict_pre_hook(leave_sample))
    return SaveMeanHandle(handles)
