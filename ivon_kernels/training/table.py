"""What ``optimizer.state`` shows, and what somebody has done to it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ivon_kernels.backends.state import STATE_KEYS, ParamState
from ivon_kernels.checkpoint import check_entry
from ivon_kernels.training.journal import Entry, Journal, State

__all__ = ["StateTable"]


class StateTable:
    """``optimizer.state``: views of the state that the kernels walk, and whether they are still there.

    Attributes:
        entries: By parameter; the optimizer's users may change or replace it.
    """

    def __init__(self) -> None:
        self._journal = Journal()
        self.entries = State(self._journal)
        self._given: dict[Tensor, dict[str, Any]] = {}  # what was shown of each parameter

    @property
    def changed(self) -> bool:
        """Whether somebody has changed it since :meth:`settle`."""
        return self._journal.changed

    def take(self, entries: Mapping[Tensor, Any]) -> None:
        """Somebody has put other entries in the place of all; :meth:`follow` takes them over."""
        self.entries = State(self._journal, entries)
        self._journal.note(True)

    def clear(self) -> None:
        """Show nothing."""
        self.entries = State(self._journal)
        self._given = {}

    def show(self, state: ParamState, values: Mapping[str, Any]) -> None:
        """Show a state, and what else is in `values`."""
        self._given[state.parameter] = given = state.state()
        changed = self.changed
        self.entries[state.parameter] = Entry(self._journal, {**values, **given})
        self._journal.note(changed)

    def forget(self, param: Tensor) -> None:
        """Show a parameter no more."""
        changed = self.changed
        self._given.pop(param, None)
        self.entries.pop(param, None)
        self._journal.note(changed)

    def follow(self, states: Sequence[ParamState], groups: Sequence[dict[str, Any]], *, idle: bool) -> list[ParamState]:
        """Take over what somebody has written.

        Other tensors are copied to where the kernels work, and shown there; a parameter whose entry is gone or empty
        starts anew from its mean, as a torch optimizer's does.

        Args:
            states: Of all parameters that have some.
            groups: The optimizer's.
            idle: Whether no step is under way and the weights hold the mean.

        Returns:
            The states whose mean is another now.

        Raises:
            ValueError: If an entry does not fit its parameter; nothing is changed then.
            RuntimeError: If a step is under way, which needs the values that its sample was drawn with.
        """
        touched = [state for state in states if not self._is_shown(state)]
        for state in touched:
            entry = self.entries.get(state.parameter)
            if entry:
                check_entry(entry, state.name, state.parameter.shape)
            if not idle and not (entry and _holds_the_same(state, entry)):
                raise RuntimeError(
                    f"optimizer.state of {state.name} was changed between the sample and step(), which needs what the "
                    "sample was drawn with: change it after step(), or call discard_samples() first"
                )
        rewritten = []
        for state in touched:
            entry = self.entries.get(state.parameter)
            if not entry:
                state.start_over(float(groups[state.group]["hess_init"]))
            elif not _holds_the_same(state, entry):
                rewritten += [] if _same_values(state.mean, state.local(entry["mean"])) else [state]
                state.set_state(entry, 0.0)
            self.show(state, entry or {})
        return rewritten

    def others(self, known: Container[Tensor]) -> dict[Tensor, Any]:
        """The entries that somebody gave to parameters without state."""
        return {param: entry for param, entry in self.entries.items() if entry and param not in known}

    def settle(self) -> None:
        """All that was changed was taken over."""
        for param in [param for param, entry in self.entries.items() if not entry]:  # as looking one up leaves
            del self.entries[param]
        self._journal.note(False)

    def _is_shown(self, state: ParamState) -> bool:
        entry = self.entries.get(state.parameter)
        given = self._given[state.parameter]
        return isinstance(entry, Entry) and all(entry.get(key) is value for key, value in given.items())


def _same_values(own: Tensor, value: Tensor) -> bool:
    return torch.equal(own, value.to(own.device, own.dtype))


def _holds_the_same(state: ParamState, entry: Mapping[str, Any]) -> bool:
    """Whether an entry has the values of a state, in whatever tensors."""
    same = all(_same_values(getattr(state, key), state.local(entry[key])) for key in STATE_KEYS)
    return same and int(entry["step"]) == state.step
