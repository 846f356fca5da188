"""What the GPU backends share: the device decides whether a step is taken, and the host never waits for it."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from ivon_kernels.backends.base import Backend, Draw, Guard

if TYPE_CHECKING:
    from ivon_kernels.backends.state import Launch

_UNGUARDED = Guard()
NOTHING_BAD = 2**62
BLOCK_SIZE = 8
BAD, DONE, SKIPPED = range(3)  # words of the control block


class DeviceFlags:
    """What the kernels of one optimizer share on one device, and how they tell the host of a step that they skipped.

    Attributes:
        block: int64 ``[8]`` on the device: the first parameter whose gradient holds inf or nan (``NOTHING_BAD``: none),
            how many programs of the running launch have finished, how many steps were skipped without a report.
        mailbox: int64 ``[2]``, pinned host memory, which kernels write to directly: how many skipped steps were
            reported, and the parameter at fault in the last one. Reading it waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.block = torch.zeros(BLOCK_SIZE, dtype=torch.int64, device=device)
        self.block[BAD] = NOTHING_BAD
        self.mailbox = torch.zeros(2, dtype=torch.int64, pin_memory=device.type != "cpu")
        self._letters = (ctypes.c_int64 * 2).from_address(self.mailbox.data_ptr())  # read without a tensor operation
        self.seen = 0

    def new_report(self) -> int | None:
        """Index of the parameter at fault in a skipped step that was reported since the last call, or None."""
        count = self._letters[0]
        if count == self.seen:
            return None
        self.seen = count
        return self._letters[1]

    def skipped(self) -> int:
        """Steps skipped without a report. Waits for the device."""
        return int(self.block[SKIPPED])

    def found(self) -> int:
        """The first parameter that the checks found, or ``NOTHING_BAD``. Waits for the device."""
        return int(self.block[BAD])

    def forget(self, *but: int) -> None:
        """Drop what the checks found; `but` are findings to keep instead."""
        self.block[BAD].fill_(min(but, default=NOTHING_BAD))


class DeviceBackend(Backend):
    """A backend whose kernels count steps, check gradients and honour a GradScaler by themselves.

    A list of slots lies on one device, in any number of arenas and dtypes.
    """

    on_device = True

    @abstractmethod
    def check(self, slots: Launch) -> None:
        """Note in the control block if a gradient holds inf or nan; the next final step is then skipped."""

    def find_nonfinite(self, slots: Launch) -> int | None:
        """As every backend; waits for the device. Used where backends of both kinds train together."""
        self.check(slots)
        control = slots.slots[0].arena.control
        assert control is not None
        bad = control.found()
        control.forget()
        return next((i for i, slot in enumerate(slots.slots) if slot.index == bad), None)

    @abstractmethod
    def step(self, slots: Launch, draw: Draw, adopt: bool, draw_next: bool, guard: Guard = _UNGUARDED) -> None: ...
