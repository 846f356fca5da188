"""Who has put a sample into which weights: two at a time would each take the other's sample for the mean."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

__all__ = ["Holder", "hold", "let_go", "refuse_others"]


class Holder(Protocol):
    """Something that puts samples into weights: an optimizer, or a posterior's placement in a model."""

    held_by: str  # who it is, in an error message, and how it lets go

    def holds_any(self, params: Iterable[Tensor]) -> bool:
        """Whether one of these parameters holds its sample."""


_HOLDERS: weakref.WeakSet[Holder] = weakref.WeakSet()


def hold(holder: Holder) -> None:
    """The holder has put a sample into weights."""
    _HOLDERS.add(holder)


def let_go(holder: Holder) -> None:
    """The holder's weights are what they were before."""
    _HOLDERS.discard(holder)


def refuse_others(holder: Holder, params: Iterable[Tensor]) -> None:
    """Refuse to use parameters that hold somebody else's sample.

    Raises:
        RuntimeError: If there are any.
    """
    params = list(params)
    for other in list(_HOLDERS):
        if other is not holder and other.holds_any(params):
            raise RuntimeError(f"the parameters hold a sample of {other.held_by}")
