"""Tensors in nested containers: what models take and return.

Not by ``torch.utils._pytree``, which was tried: it knows containers by their exact class, so that a BatchEncoding, any
other UserDict or mapping, and subclasses of dict, list and tuple would come back as they are, with their tensors
unrepeated; what else it opens depends on which classes other libraries have registered for the whole process; and it
takes 3 (a deep structure) to 90 times (a tensor) as long.
"""

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
        # Copied and filled, as no constructor takes the items alone: BatchEncoding has the tokenizer's encodings beside
        # them, and ModelOutput every value twice, as an item and as the attribute of that name, which a set item keeps.
        new = copy.copy(value)
        for key in value:
            new[key] = item(key)
        return new
    if isinstance(value, Mapping):
        return {key: item(key) for key in value}
    if isinstance(value, (list, tuple)):
        items = [item(position) for position in range(len(value))]
        if hasattr(value, "_fields"):  # a namedtuple takes its items one by one
            return type(value)(*items)
        return type(value)(items)
    return value
