"""What the hooks on a model's modules share: they know the optimizer, keep nothing alive, and do nothing on a copy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from ivon_kernels.optimizer import IVON

__all__ = ["HookHandle", "IVONHook", "entrances", "find_ivon", "has_hook", "ivon_of_model"]


def find_ivon(optimizer: object) -> IVON | None:
    """The IVON optimizer inside the wrappers of Accelerate and others, which keep it as ``.optimizer``, or None."""
    while optimizer is not None and not isinstance(optimizer, IVON):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def ivon_of_model(model: nn.Module, optimizer: object, caller: str) -> tuple[IVON, set[nn.Parameter]]:
    """The IVON optimizer in its wrappers, and its parameters that are the model's.

    Raises:
        TypeError: If the optimizer is not IVON.
        ValueError: If no parameter of the model belongs to it.
    """
    ivon = find_ivon(optimizer)
    if ivon is None:
        raise TypeError(f"{caller} needs an IVON optimizer, got {type(optimizer).__name__}")
    own = {param for group in ivon.param_groups for param in group["params"]}.intersection(model.parameters())
    if not own:
        raise ValueError(
            "no parameter of the model belongs to this optimizer: build the optimizer from the parameters of the model "
            "that is trained, after adapters were added to it"
        )
    return ivon, own


class Removable(Protocol):
    """What can be taken away again."""

    def remove(self) -> None:
        """Take it away."""


class HookHandle:
    """What was installed on a model."""

    def __init__(self, handles: list[Removable]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks away again."""
        while self._handles:
            self._handles.pop().remove()


class IVONHook:
    """A hook that knows its optimizer without keeping it alive.

    Copied or unpickled, it does nothing: the copied parameters belong to no optimizer.
    """

    def __init__(self, optimizer: IVON | None = None) -> None:
        self.optimizer: Callable[[], IVON | None] = _nothing if optimizer is None else weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type[IVONHook], tuple[()]]:
        return type(self), ()


def has_hook(hooks: Mapping[int, Any], kind: type[IVONHook], ivon: IVON) -> bool:
    """Whether a hook of this kind and optimizer is installed already."""
    return any(isinstance(hook, kind) and hook.optimizer() is ivon for hook in hooks.values())


def entrances(model: nn.Module, params: set[nn.Parameter], *, root: bool = True) -> Iterator[nn.Module]:
    """The modules by which a forward pass may come to the parameters, but not every layer.

    They are the model and its children (a LightningModule is not called itself, and a loss may call parts of a model),
    and inside a child, as long as one module holds all of its parameters, that one: PEFT's and other wrappers.
    """
    yield model
    inside = [child for child in model.children() if not params.isdisjoint(child.parameters())]
    if not root and len(inside) > 1:
        return
    for child in inside:
        yield from entrances(child, params, root=root and isinstance(child, nn.ModuleDict | nn.ModuleList))


def _nothing() -> None:
    return None
