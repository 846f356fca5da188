"""The gradients of an unfinished step: read as late as possible, so that clipping and unscaling take effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ivon_kernels.backends.state import ParamState
from ivon_kernels.training.checks import check_gradient

__all__ = ["Closed", "EarlierGradient", "closed_gradients", "computed_at_mean", "refuse_zeroed", "take_gradients"]

Closed = Mapping[ParamState, tuple[Tensor, int]]
"""Gradients at the end of a block and their versions, kept in case ``zero_grad`` drops them before they are read."""


def closed_gradients(states: Iterable[ParamState]) -> Closed:
    """The gradients at the end of a block."""
    grads = ((state, state.grad_now()) for state in states)
    return {state: (grad, grad._version) for state, grad in grads if grad is not None}


def take_gradients(states: Iterable[ParamState], closed: Closed) -> None:
    """Give each state the gradient of the last sample, or None."""
    strided, double = torch.strided, torch.float64  # looked up once: this runs for every parameter of every sample
    for state in states:
        grad = state.grad_now()
        if grad is None and state in closed:
            grad = closed[state][0]
        if grad is not None and (grad.layout is not strided or grad.dtype is double):
            grad = check_gradient(state, grad)
        state.take_grad(grad)


def computed_at_mean(left: Closed | None, states: Sequence[ParamState], *, changed: bool) -> str | None:
    """The name of a parameter whose gradient came while the weights held the mean.

    Args:
        left: The gradients when the sample went; None: it is there.
        states: Of the parameters that were sampled.
        changed: Whether what was added to one of these gradients counts. Clipping and unscaling change them, too.
    """
    if left is None or (len(left) == len(states) and not changed):
        return None
    for state in states:
        grad = state.grad_now()
        if grad is None:
            continue
        known, version = left.get(state, (None, 0))
        if known is None or (changed and grad is known and grad._version != version and bool(grad.any())):
            return state.name
    return None


def refuse_zeroed(closed: Closed) -> None:
    """Refuse to average a sample whose gradients were overwritten with zeros before they were read.

    Raises:
        RuntimeError: If every remembered gradient changed since its block ended and is now zero.
    """
    changed = [grad for grad, version in closed.values() if grad._version != version]
    if changed and len(changed) == len(closed) and not any(bool(grad.any()) for grad in changed):
        raise RuntimeError(
            "the gradients of an MC sample were zeroed in place before they were read; between samples call "
            "optimizer.zero_grad(), or zero_grad(set_to_none=True) on the model"
        )


class EarlierGradient:
    """Tells whether a gradient from before a sample was drawn is still part of the gradient after it.

    That happens in ``step(closure)`` with a closure that does not clear the gradients: those of earlier micro-batches,
    computed at the mean, would pass for the sample's. One parameter, the smallest, is watched, with a copy in place of
    its gradient: what clears gradients leaves another tensor there, or writes zeros before anything is added.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        present = [param for param in params if param.grad is not None]
        self.param = min(present, key=lambda param: param.numel(), default=None)
        if self.param is not None and self.param.grad is not None:
            self.before = self.param.grad
            self.param.grad = self.copy = self.before.detach().clone()
            self.version = self.copy._version

    def kept(self) -> bool:
        """Whether that gradient was left as it was or added to."""
        if self.param is None or self.param.grad is not self.copy:
            return False
        writes = self.copy._version - self.version
        return bool(self.before.any()) and (writes == 0 or (writes == 1 and bool(self.copy.any())))
