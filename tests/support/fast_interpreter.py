"""Triton's interpreter without what it does over and over: the same results in half of the time.

As it comes, it replaces the functions of ``triton.language`` at every launch and again at every call of a device
function, looks up dtypes in a table that it builds each time, and computes whether integers overflowed for an assertion
that is off.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

_PATCH, _DTYPE = "_patch_lang", "_get_np_dtype"  # of Triton 3.4 to 3.9; where there are others nothing is changed


class _Kept:
    """What a launch undoes at its end: nothing."""

    def restore(self) -> None:
        return


def install() -> None:
    """Change this process's interpreter: functions of ``triton.language`` stay replaced from the first launch on."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, _PATCH):
        setattr(interpreter, _PATCH, _once(getattr(interpreter, _PATCH), (tl, tl.core)))
    if hasattr(interpreter, _DTYPE):
        setattr(interpreter, _DTYPE, _remembering(getattr(interpreter, _DTYPE), tl.dtype))
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if dataclasses.is_dataclass(options) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)  # type: ignore[union-attr, type-var]


def _once(patch: Callable[[Any], Any], languages: tuple[Any, ...]) -> Callable[[Any], _Kept]:
    """Patches the modules that a function sees when they are seen first."""
    known: dict[int, dict[str, Any]] = {}  # the globals of modules, which stay alive
    patched: set[frozenset[str]] = set()

    def patch_once(function: Any) -> _Kept:
        names = function.__globals__
        if id(names) not in known:
            known[id(names)] = names
            seen = frozenset(v.__name__ for v in names.values() if inspect.ismodule(v) and v in languages)
            if seen not in patched:
                patch(function)
                patched.add(seen)
        return _Kept()

    return patch_once


def _remembering(look_up: Callable[[Any], Any], plain: type) -> Callable[[Any], Any]:
    """Remembers the answers for plain dtypes; those of pointers and blocks are no keys."""
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        if type(dtype) is not plain:
            return look_up(dtype)
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    return remembered
