"""``optimizer.state`` as a mapping that remembers whether somebody changed it, so that no step has to look."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import register_pytree_node

__all__ = ["Entry", "Journal", "State"]

Method = TypeVar("Method", bound=Callable[..., Any])
_CHANGING = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")


class Journal:
    """Whether a state or one of its entries was changed since its owner last looked."""

    def __init__(self) -> None:
        self.changed = False

    def note(self, changed: bool) -> None:
        """Somebody changed something, or (False) the owner has looked."""
        self.changed = changed


def _noting(name: str, plain: type) -> Callable[..., Any]:
    method = getattr(plain, name)

    @functools.wraps(method)
    def changing(self: Entry | State, *args: Any, **kwargs: Any) -> Any:
        self.journal.note(True)
        return method(self, *args, **kwargs)

    return changing


class Entry(dict[str, Any]):
    """What a parameter's state holds, by name."""

    def __init__(self, journal: Journal, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.journal = journal

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are plain: nobody looks at them
        return dict, (dict(self),)


class State(defaultdict[Tensor, Any]):
    """The entries by parameter. As torch's, it makes an empty one where there is none."""

    def __init__(self, journal: Journal, entries: Mapping[Tensor, Any] | None = None) -> None:
        super().__init__(dict, {} if entries is None else entries)
        self.journal = journal

    def __missing__(self, param: Tensor) -> Entry:
        self[param] = entry = Entry(self.journal, {})
        return entry

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())


for _name in _CHANGING:
    setattr(Entry, _name, _noting(_name, dict))
    setattr(State, _name, _noting(_name, defaultdict))


def _flatten(tree: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(tree.values()), list(tree)


def _unflatten(values: Iterable[Any], keys: Any) -> dict[Any, Any]:
    return dict(zip(keys, values, strict=True))


# torch's tree functions take a subclass that they do not know for a leaf.
for _kind in (Entry, State):
    register_pytree_node(_kind, _flatten, _unflatten)
