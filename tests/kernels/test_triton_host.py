"""The Triton backend on the host, without a GPU: tables in device memory, and the direct call of a compiled kernel."""

from __future__ import annotations

import itertools
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_kernels.backends import state, triton_launch
from ivon_kernels.backends.triton_launch import Kernel, Mirror


class _Event:
    """A copy that is still on its way until it is said to be done."""

    def __init__(self) -> None:
        self.done = False
        self.stream: object = None

    def record(self, stream: object = "of the current device") -> None:
        self.done, self.stream = False, stream

    def query(self) -> bool:
        return self.done


class _World:
    """A mirror on a device without memory; every pinned buffer and event that it makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: list[Tensor] = []
        self.events: list[_Event] = []
        self.content = array("q", [0, 0])
        monkeypatch.setattr(triton_launch, "_pinned", self._pin)
        module = SimpleNamespace(Event=self._event, current_stream=lambda device: f"of {device}")
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        self.mirror = Mirror(torch.device("meta"), lambda: self.content)

    def _pin(self, size: int) -> Tensor:
        self.pinned.append(torch.zeros(size, dtype=torch.uint8))
        return self.pinned[-1]

    def _event(self) -> _Event:
        self.events.append(_Event())
        return self.events[-1]

    def upload(self, value: int, *, capturing: bool = False) -> None:
        self.content[0] = value
        self.mirror.address(value, capturing)

    def values(self) -> list[int]:
        return [int(buffer.view(torch.int64)[0]) for buffer in self.pinned]


def test_uploads_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World(monkeypatch)
    world.upload(1)
    assert sorted(world.values()) == [*[0] * triton_launch._SPARE, 1]  # the others are kept for graphs
    world.content[0] = 7
    world.mirror.address(1, False)
    assert 7 not in world.values()


def test_buffers_on_their_way_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World(monkeypatch)
    for value in (1, 2, 3):
        world.upload(value)
    assert [value for value in world.values() if value] == [1, 2, 3]
    world.events[0].done = True
    world.upload(4)
    assert [value for value in world.values() if value] == [4, 2, 3]
    world.upload(5)
    assert [value for value in world.values() if value] == [4, 2, 3, 5]


def test_the_copys_own_stream_says_when_a_buffer_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs the current device may be another than the table's."""
    world = _World(monkeypatch)
    world.upload(1)
    assert [event.stream for event in world.events] == ["of meta"]


def test_graphs_keep_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World(monkeypatch)
    world.upload(1)
    made = len(world.pinned)
    world.upload(10, capturing=True)
    world.upload(11, capturing=True)
    assert len(world.pinned) == made  # nothing is allocated during a capture
    for value in range(2, 6):
        for event in world.events:
            event.done = True
        world.upload(value)
    assert {10, 11} <= set(world.values())


def test_graphs_keep_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World(monkeypatch)
    world.upload(1)
    table, made = world.mirror._table, len(world.pinned)
    world.upload(1, capturing=True)
    assert world.values().count(1) == 1 and len(world.pinned) == made  # it is there already: nothing to copy
    world.upload(2)
    assert world.mirror._table is not table
    table = world.mirror._table
    world.upload(3)
    assert world.mirror._table is table


def test_content_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _World(monkeypatch)
    world.upload(1)
    world.content = array("q", [0] * 5)
    world.upload(2)
    assert world.pinned[-1].numel() == 40


def test_compiled_kernels_are_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first launch, with what Triton itself hands over; in full when the parts are others."""
    triton = pytest.importorskip("triton")
    calls: list[tuple[Any, ...]] = []
    compiled = SimpleNamespace(run=lambda *args: calls.append(args), function="function", packed_metadata="metadata")
    launched: list[tuple[Any, ...]] = []

    class Jitted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*args: Any, **options: Any) -> Any:
                launched.append((grid, args, options))
                return compiled

            return launch

    class Module:
        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        def device(device: object) -> Any:
            return torch.no_grad()

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    monkeypatch.setattr(
        triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda i: 5))
    )
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    kernel = Kernel(Jitted(), torch.device("cuda", 0), ("flag",))
    kernel.launch(3, (1, 2))
    assert launched == [((3,), (1, 2, "flag"), triton_launch.OPTIONS)] and not calls
    kernel.launch(4, (1, 2))
    assert len(launched) == 1
    assert calls == [(4, 1, 1, 5, "function", "metadata", None, None, None, 1, 2, "flag")]

    del compiled.packed_metadata
    kernel = Kernel(Jitted(), torch.device("cuda", 0), ())
    kernel.launch(3, (1, 2))
    kernel.launch(3, (1, 2))
    assert len(launched) == 3


def test_a_mailbox_is_never_given_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of a step may still be under way when its optimizer is dropped."""
    pages: list[Tensor] = []

    def page() -> Tensor:
        pages.append(torch.zeros(state._PER_PAGE, 2, dtype=torch.int64))
        return pages[-1]

    monkeypatch.setattr(state, "_new_page", page)
    monkeypatch.setattr(state, "_pages", [])
    monkeypatch.setattr(state, "_numbers", itertools.count())
    addresses = [state._pinned_mailbox().data_ptr() for _ in range(2 * state._PER_PAGE + 1)]  # dropped at once
    assert len(pages) == len(state._pages) == 3
    assert len(set(addresses)) == len(addresses)
    pages[0][:] = 1  # late
    assert state._pinned_mailbox().tolist() == [0, 0]
