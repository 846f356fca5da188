"""Caches of what was made of weights, which others keep and which nothing but this invalidates."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch
from torch.nn.utils import parametrize

__all__ = ["clear"]

_DORA = "peft.tuners.lora.dora"
_filled: weakref.WeakSet[Any] | None = None  # PEFT's DoRA layers that have something in their cache; None: not watched


def clear() -> None:
    """Forget everything that was made of weights: they were written behind torch's back, or exchanged."""
    # autocast keeps casts of leaf weights until its outermost region ends, whatever their version.
    torch.clear_autocast_cache()
    # parametrize.cached() keeps the weights that parametrizations have made until its block ends.
    if parametrize._cache:
        parametrize._cache.clear()
    # DoraCaching keeps products and norms in the layers, in eval mode, even beyond its block.
    dora = sys.modules.get(_DORA)
    if dora is not None:
        for layer in _filled if _filled is not None else _watch(dora):
            layer._cache_clear()
        if _filled:
            _filled.clear()


def _watch(dora: Any) -> list[Any]:
    """Know from now on which DoRA layers have something in their cache: PEFT keeps no list of them.

    Returns:
        All layers that there are.
    """
    global _filled
    kind = getattr(dora, "DoraLinearLayer", None)
    store = getattr(kind, "_cache_store", None)
    _filled = weakref.WeakSet()
    if kind is None or store is None:  # a PEFT without this cache
        return []

    def watched(layer: Any, key: str, value: Any) -> None:
        if _filled is not None:
            _filled.add(layer)
        store(layer, key, value)

    kind._cache_store = watched
    return [found for found in gc.get_objects() if kind in type(found).__mro__]
