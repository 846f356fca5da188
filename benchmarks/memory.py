"""How much memory a block of code takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch


def resident(field: str) -> int:
    """Bytes of this process in memory: ``"VmRSS"`` now, ``"VmHWM"`` at most; OSError on another system than Linux."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """The most that was resident starts anew from here; OSError where the system cannot."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def return_freed_memory() -> None:
    """Give the system what glibc keeps of freed memory, so that it does not hide what comes next."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The peak of memory in a block above what was in use before it: `bytes`, None where the system does not tell.

    On a CUDA device this is what torch has allocated there; elsewhere the resident set of the process, on Linux.
    `highest` is the peak itself, with what was in use before.
    """

    bytes: int | None = None
    highest: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._before: int | None = None

    @property
    def megabytes(self) -> float | None:
        """The same in other units."""
        return None if self.bytes is None else self.bytes / 2**20

    def restart(self) -> None:
        """What the block has taken so far counts only where it is still in use."""
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        elif self._before is not None:
            forget_peak()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
            return self
        return_freed_memory()
        with suppress(OSError):
            forget_peak()
            self._before = resident("VmRSS")
        return self

    def so_far(self) -> int | None:
        """The peak since the last restart, in bytes above what was in use before the block."""
        if self._before is None:
            return None
        self.highest = resident("VmHWM") if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
        return max(0, self.highest - self._before)

    def __exit__(self, *error: object) -> None:
        self.bytes = self.so_far()
