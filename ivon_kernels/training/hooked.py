"""Hooks around a step, and its name in a profile, for a fraction of what torch's own wrapper takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch.autograd.profiler import record_function
from torch.optim import optimizer as torch_optimizer

__all__ = ["hooked"]

_Step = TypeVar("_Step", bound=Callable[..., Any])


def hooked(step: _Step) -> _Step:
    """What ``torch.optim.Optimizer`` wraps every ``step`` in, so that it leaves this one as it is.

    Pre and post hooks, of all optimizers and of this one, are called as torch calls them. The step is a record of the
    profiler (``Optimizer.step#IVON.step``) while one is running: making the record takes 10 microseconds, which is as
    long as packing the arguments of a launch for hundreds of tensors.
    """

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not torch._C._autograd._profiler_enabled():
            return _with_hooks(step, self, args, kwargs)
        with record_function(f"Optimizer.step#{type(self).__name__}.step"):
            return _with_hooks(step, self, args, kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]
    return cast(_Step, wrapper)


def _with_hooks(step: Callable[..., Any], self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = (self, *args), kwargs
    for before in chain(torch_optimizer._global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()):
        if (changed := before(self, *given)) is None:
            continue
        if not (isinstance(changed, tuple) and len(changed) == 2):
            raise RuntimeError(f"{step} must return None or a tuple of (new_args, new_kwargs), but got {changed}.")
        given = changed
    result = step(*given[0], **given[1])
    self._optimizer_step_code()  # where torch's profiler looks at the optimizer
    for after in chain(self._optimizer_step_post_hooks.values(), torch_optimizer._global_optimizer_post_hooks.values()):
        after(self, *given)
    return result
