"""Tensors in nested containers: what models take and return."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["concatenate", "map_tensors", "tensors"]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with `function` applied to its tensors; dicts of any kind, lists, tuples. The rest stays."""
    if isinstance(value, Tensor):
        return function(value)
    return _rebuild(value, lambda key: map_tensors(function, value[key]))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a structure."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def concatenate(values: list[Any]) -> Any:
    """One structure whose tensors are those of `values` one after the other along the first dimension."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    return _rebuild(first, lambda key: concatenate([value[key] for value in values]))


def _rebuild(value: Any, item: Callable[[Any], Any]) -> Any:
    """A container like `value` with ``item(key)`` in every place; anything else as it is."""
    if isinstance(value, MutableMapping):
        new = copy.copy(value)  # keeps the class: BatchEncoding, transformers' ModelOutput
        for key in value:
            new[key] = item(key)
        return new
    if isinstance(value, Mapping):
        return {key: item(key) for key in value}
    if isinstance(value, (list, tuple)):
        items = [item(position) for position in range(len(value))]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value
