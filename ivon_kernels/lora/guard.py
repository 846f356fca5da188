"""While samples are stacked, a model's own values of their weights are nobody's: whoever computes with them is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

__all__ = ["COPIED", "CannotStackError", "guard", "unguard"]

COPIED = "this model has samples stacked in it and cannot be copied or pickled: call stack.remove() first"


_CALL = nn.Module._call_impl.__code__


class CannotStackError(ValueError):
    """Found out in a pass: this model, or this batch, does not run with samples stacked in it."""


# What a tensor says about itself, not its elements.
_ATTRIBUTES = (
    "dtype device shape requires_grad is_leaf layout ndim grad_fn is_cpu is_cuda is_xpu is_mps is_meta is_sparse "
    "is_quantized is_nested itemsize nbytes _version"
)
_METHODS = (
    "size dim numel nelement ndimension stride element_size is_floating_point is_complex is_contiguous is_inference "
    "data_ptr get_device untyped_storage __len__ __hash__ __repr__"
)
_COPIES = frozenset([Tensor.detach, Tensor.clone, Tensor.requires_grad_, Tensor.data.__get__])  # type: ignore[attr-defined]
_DESCRIPTIONS = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()] + [getattr(Tensor, n) for n in _METHODS.split()]
)


def _may_be_read(frame: FrameType | None, *, copied: bool) -> bool:
    """Whether the model does not run now: its weights may be saved and merged, but not be computed with otherwise."""
    while frame is not None:
        if frame.f_code is _CALL:
            return False
        own = str(frame.f_globals.get("__name__", "")).startswith("peft.")
        if own and frame.f_code.co_name in ("merge", "unmerge"):  # such layers are refused in the next pass
            return True
        frame = frame.f_back
    return copied


class _Guarded(nn.Parameter):
    """A parameter whose elements cannot be read."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _DESCRIPTIONS or _may_be_read(sys._getframe(1), copied=func in _COPIES):
                return func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        nested = [item for value in given if isinstance(value, (list, tuple)) for item in value]
        name = next((vars(value)["_ivon_name"] for value in [*given, *nested] if isinstance(value, cls)), "a weight")
        raise CannotStackError(
            f"{name!r} is read outside of the module that runs with its samples (a tied weight, a hook that makes "
            "weights): samples cannot be stacked in this model; use stacked=False or "
            "posterior.sampled()"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise RuntimeError(COPIED)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(COPIED)


def guard(params: Mapping[str, nn.Parameter]) -> None:
    """Let nobody compute with these parameters: whoever does gets :class:`CannotStackError`, which names the weight.

    The objects stay what they are, so that it does not matter how somebody has come by one.
    """
    for name, param in params.items():
        if type(param) is nn.Parameter:
            vars(param)["_ivon_name"] = name
            param.__class__ = _Guarded


def unguard(params: Iterable[nn.Parameter]) -> None:
    """Make them ordinary parameters again."""
    for param in params:
        if type(param) is _Guarded:
            param.__class__ = nn.Parameter  # type: ignore[assignment]
            del vars(param)["_ivon_name"]
